"""PEFT's plain LoRA layers, each as one node of autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tralign_fast.model.patching import Patches, runs_only
from tralign_fast.ops.lora import LoraFactors, lora_linear

FUSED = "LoRA"  # the kind of the patches
# An attribute of a layer: `function(adapter) -> LoraFactors | None`, which it then runs in place of
# the adapter's own, without gradient.
STAND_IN = "_tralign_lora_factors"
# Fake tensors: a traced step is the real one. No other class: shards, quantised weights.
PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))


def fuse_lora(model: nn.Module) -> Callable[[], None]:
    """Runs the model's LoRA layers by `lora_linear` where one plain adapter is active; returns its
    undo.

    What else a layer may be is asked at every call, and PEFT's own forward then runs: other or
    merged adapters, none, dropout, DoRA and other variants, `lora_bias`, a batch with an adapter
    for each row (`adapter_names`), quantised or sharded weights, hooks on the layer's parts, a base
    that is no `nn.Linear`. While PyTorch compiles it runs too: there the graph's compiler fuses,
    and it would copy what is accumulated into.
    """
    patches = Patches()
    peft = sys.modules.get("peft.tuners.lora.layer")  # imported by whoever made such a layer
    for module in model.modules():
        if peft is not None and type(module) is peft.Linear and runs_only(module, FUSED):
            patches.forward(module, FUSED, _forward)
    return patches.undo


def _forward(own_forward: Any, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or torch.compiler.is_compiling():
        return own_forward(layer, x, *args, **kwargs)
    factors = _plain_factors(layer, x)
    if factors is None:
        return own_forward(layer, x)
    base = layer.base_layer
    return lora_linear(x, base.weight, base.bias, factors)


def lora_without_value(layer: Any, x: Tensor) -> Tensor | None:
    """What the layer would return, with its gradients and any values; None: it does not run by
    `lora_linear`."""
    factors = _plain_factors(layer, x)
    if factors is None or torch.compiler.is_compiling():
        return None
    base = layer.base_layer
    return lora_linear(x, base.weight, base.bias, factors, value=False)


def _plain_factors(layer: Any, x: Tensor) -> LoraFactors | None:
    """The factors of the one adapter that PEFT would add to the base's product here; None: not so,
    or not as plain products.

    Asked hundreds of times a step: what a module holds is read from its dictionaries, which
    takes less than `Module.__getattr__`.
    """
    if layer.disable_adapters or layer.merged_adapters:
        return None
    modules = layer._modules
    downs = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in downs]
    if len(active) != 1:
        return None
    (name,) = active
    base, down, up = modules["base_layer"], downs[name], modules["lora_B"]._modules[name]
    dropout, scale = modules["lora_dropout"]._modules[name], layer.scaling[name]
    if not (_is_linear(base) and _is_linear(down) and _is_linear(up)):
        return None
    of_base, of_down, of_up = base._parameters, down._parameters, up._parameters
    weight, bias, a, b = of_base["weight"], of_base["bias"], of_down["weight"], of_up["weight"]
    if (
        name in layer.lora_variant
        or not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p == 0.0))
        or not isinstance(scale, int | float)
        or of_up["bias"] is not None
        or not runs_only(base, "oneDNN")
        or not (_is_plain(x, weight, a, b) and (bias is None or _is_plain(bias)))
        or not _have_dtypes(layer, x, weight, bias, a, b)
    ):
        return None
    stand_in = layer.__dict__.get(STAND_IN)
    if stand_in is not None and not torch.is_grad_enabled():
        factors = stand_in(name)
        if factors is not None:
            return factors
    if not (runs_only(down) and runs_only(up)):
        return None
    return LoraFactors(a, b, scale, a.dtype)


def _is_linear(module: Any) -> bool:
    """Whether nobody would miss that the module is called: ZeRO-3 and FSDP bring weights in by
    hooks, and others look at what it returns."""
    own = module.__dict__
    return type(module) is nn.Linear and not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
    )


def _is_plain(*tensors: Tensor | None) -> bool:
    return PLAIN.issuperset(map(type, tensors))


def _have_dtypes(
    layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> bool:
    """Whether PEFT's products of these take no error, and no cast that `lora_linear` does not."""
    if torch.is_autocast_enabled(x.device.type):  # casts all but what is no less than fp64
        tensors = (x, weight, down, up) if bias is None else (x, weight, down, up, bias)
        return all(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
    return (
        x.dtype == weight.dtype
        and (bias is None or bias.dtype == weight.dtype)
        and down.dtype == up.dtype
        and (layer.cast_input_dtype_enabled or x.dtype == down.dtype)
    )
