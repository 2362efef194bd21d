"""A whole model that follows a LoRA policy: its weights are `W + s·B·A`, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.ops.ema import ema_update_, is_quantised, lora_merge_
from tralign_fast.reference.deltas import expert_factors, is_out_first
from tralign_fast.reference.lora import refusal


@dataclass(frozen=True)
class LoraWeight:
    """`weight + scale·b·a`, not yet computed; of stacked experts, all with E in front."""

    weight: Tensor  # (R, C)
    a: Tensor  # (r, C)
    b: Tensor  # (R, r)
    scale: float

    def move_(self, ref: Tensor, alpha: float, **options: Any) -> None:
        """`lora_merge_`, an expert at a time."""
        stacks = (ref, self.weight, self.a, self.b)
        for tensors in [stacks] if ref.dim() == 2 else zip(*stacks, strict=True):
            lora_merge_(*tensors, self.scale, alpha, **options)


def has_adapters(policy: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into a model, or a model of its own around it."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return False
    return any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in policy.modules())


@torch.no_grad()
def follow_merged_(
    names_and_refs: list[tuple[str, Tensor]],
    policy: nn.Module,
    alpha: float,
    *,
    rounding: Any,
    generator: torch.Generator | None,
) -> None:
    """Moves the weights of a whole model towards those of a LoRA policy, `B·A` never in memory.

    Args:
        names_and_refs: the parameters of the whole model, by their names there.
        alpha, rounding, generator: as in `ema_update_`.

    Raises:
        ValueError: as `merged_weights`.
    """
    found = merged_weights(names_and_refs, policy)
    plain = [(r, w) for (_, r), w in zip(names_and_refs, found, strict=True) if _is_plain(w)]
    options = {"rounding": rounding, "generator": generator}
    ema_update_([r for r, _ in plain], [w for _, w in plain], alpha, **options)  # pyright: ignore[reportArgumentType]
    for (_, ref), own in zip(names_and_refs, found, strict=True):
        if isinstance(own, LoraWeight):
            own.move_(ref, alpha, **options)


def _is_plain(weight: Tensor | LoraWeight) -> bool:
    return isinstance(weight, Tensor)


def merged_weights(
    names_and_refs: list[tuple[str, Tensor]], policy: nn.Module
) -> list[Tensor | LoraWeight]:
    """What a LoRA policy has in place of each parameter of a whole model.

    Layers of `modules_to_save`, biases and what has no adapter are tensors; so is a layer whose
    adapter PEFT has merged.

    Raises:
        ValueError: a parameter that the policy has not, in another shape or place, or quantised;
            something trained that is neither a weight of the whole model nor a plain LoRA factor.
    """
    base = _base_model(policy)
    used: set[int] = set()
    found: list[Tensor | LoraWeight] = []
    for name, ref in names_and_refs:
        *path, last = name.split(".")
        own = _weight_of(_walk(base, path, name), last, name, used)
        weight = own.weight if isinstance(own, LoraWeight) else own
        if weight.shape != ref.shape or is_quantised(weight) or is_quantised(ref):
            raise ValueError(
                f"{name} is {tuple(ref.shape)} in ref_model and {tuple(weight.shape)} of "
                f"{weight.dtype} in the policy: expected one architecture, in floating point (the "
                "reference of a quantised base shares it: leave ref_model out)"
            )
        if weight.device != ref.device:
            raise ValueError(
                f"{name} is on {weight.device}, its reference on {ref.device}: put both models on "
                "one device"
            )
        found.append(own)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and id(parameter) not in used:
            raise ValueError(
                f"the policy trains {name}, which is no weight of ref_model and no factor of plain "
                "LoRA on a weight of its own (tied ones are not): leave ref_model out, and the "
                "reference shares the policy's base"
            )
    return found


def _base_model(policy: Any) -> nn.Module:
    """The model that PEFT has put its layers into, out of all wrappers."""
    while (
        inner := getattr(policy, "_orig_mod", None) or getattr(policy, "module", None)
    ) is not None:
        policy = inner
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def _walk(module: Any, path: list[str], name: str) -> nn.Module:
    """The module that holds parameter `name`, through PEFT's copies of `modules_to_save` and what
    it has around embeddings."""
    from peft.utils.other import ModulesToSaveWrapper

    for part in (None, *path):
        if part is not None:
            module = getattr(module, part, None)
        if isinstance(module, ModulesToSaveWrapper):
            active = [a for a in module.active_adapters if a in module.modules_to_save]
            module = module.modules_to_save[active[0]] if active else module.original_module
        module = getattr(module, "token_adapter", module)
        if module is None:
            raise ValueError(
                f"policy and reference are different models (only the reference has {name}): "
                "expected one architecture"
            )
    return module


def _weight_of(module: Any, last: str, name: str, used: set[int]) -> Tensor | LoraWeight:
    """Parameter `last` of a module, with its adapters; notes what of the policy it covers."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = isinstance(module, BaseTunerLayer)
    layer: Any = module.get_base_layer() if adapted else module
    own = getattr(layer, last, None)
    if not isinstance(own, Tensor):
        raise ValueError(
            f"policy and reference are different models (only the reference has {name}): expected "
            "one architecture"
        )
    used.add(id(own))
    if not adapted:
        return own.detach()
    if isinstance(module, TrainableTokensLayer):
        return _with_tokens(module, used)
    factors = list(_factors(module, last, name, used))
    if not factors:
        return own.detach()
    a, b, scale = factors[0]
    if len(factors) > 1:  # several active adapters are one of their ranks' sum
        a = torch.cat([a.float() for a, _, _ in factors], -2)
        b = torch.cat([b.float() * scale for _, b, scale in factors], -1)
        scale = 1.0
    if getattr(module, "fan_in_fan_out", False):  # GPT-2 keeps its weights as (in, out)
        a, b = b.T.contiguous(), a.T.contiguous()
    return LoraWeight(own.detach(), a, b, scale)


def _with_tokens(layer: Any, used: set[int]) -> Tensor:
    """(V, H): an embedding, or a head tied to it, with the tokens that PEFT trains."""
    active = [a for a in layer.active_adapters if a in layer.trainable_tokens_delta]
    used.update(id(layer.trainable_tokens_delta[adapter]) for adapter in active)
    return layer.base_layer.weight.detach() if layer.merged else layer.get_merged_weights(active)


def _factors(
    layer: Any, last: str, name: str, used: set[int]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The factors on parameter `last`; PEFT nests the layers of stacked experts' parameters."""
    while hasattr(layer, "parameter_name") and layer.parameter_name != last:
        layer = layer.base_layer
    adapted = last if hasattr(layer, "adapter_layer_names") else None
    if adapted != getattr(layer, "parameter_name", "weight"):
        return
    kinds = [getattr(layer, kind) for kind in layer.adapter_layer_names]
    for adapter in layer.active_adapters:
        if not any(adapter in kind for kind in kinds):
            continue
        if why := refusal(layer, adapter, "leave ref_model out", variants=False):
            raise ValueError(
                f"ref_model cannot follow the policy: {name.removesuffix('.weight')} is {why}"
            )
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        used.update((id(a), id(b)))
        if adapter not in layer.merged_adapters:  # else the weight holds it
            yield *_matrices(layer, adapter), float(layer.scaling[adapter])


def _matrices(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """(…, r, C) and (…, R, r), as the parameter (…, R, C) is stored."""
    if not hasattr(layer, "parameter_name"):
        return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    down, up = expert_factors(layer, adapter)
    a, b = (down, up) if is_out_first(layer) else (up.mT, down.mT)
    a, b = a.contiguous(), b.contiguous()
    return (a, b) if layer.get_param().dim() == 3 else (a[0], b[0])
