"""Gradient checkpointing of decoder layers, each as one node of autograd.

`torch.utils.checkpoint` without `use_reentrant` runs a layer with gradient, and a hook in Python
takes every tensor that autograd would save, in both forwards, while a GPU with a small batch waits
for the host. Here the first forward runs without gradient, and the node
holds the layer's input alone. Its backward runs the layer again, as far as a gradient needs it, and
returns the gradients of input and parameters: hooks of DDP and of optimizers see them as ever.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    _has_any_global_hook,  # pyright: ignore[reportPrivateUsage]
    register_module_forward_hook,
)
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tralign_fast.data.layout import PrefixLayout
from tralign_fast.model.checkpointed_layers import FIRST, FirstLayers, leave_out, take_in
from tralign_fast.model.fused_lora import FUSED, PLAIN, lora_without_value
from tralign_fast.model.patching import Patches, causal_lm_of, has_forward, runs_own_forward
from tralign_fast.ops.backend import device_kind
from tralign_fast.ops.cpu import onednn

# Modules whose parameters are all that they train: others may hold a tensor with a gradient
# elsewhere (X-LoRA's scalings), which the node would not know of.
_KNOWN = ("torch.nn.", "transformers.", "peft.tuners.lora.", "bitsandbytes.nn.", "liger_kernel.")
# What a layer may be given beside tensors: none of these holds one with a gradient.
_CONSTANTS = (types.NoneType, bool, int, float, str, PrefixLayout)


def lean_checkpoints(model: nn.Module, layers: float | None = None) -> Callable[[], None]:
    """Makes layers that transformers checkpoints one node of autograd each; returns its undo.

    With `layers` only so many of the decoder's layers are checkpointed, from the first on (under 1:
    that share of them); the others keep their activations. Of several callers the newest decides,
    who says None for all, too, until its undo.

    It holds for those that are checkpointed now, and for later calls of
    `gradient_checkpointing_enable`. What a layer is, is asked at every call. PyTorch's own function
    runs where it was asked for with other arguments than `use_reentrant=False`, where layer or
    parameters have hooks (FSDP, ZeRO-3, gradient release, router logits), in compiled layers, under
    hooks on saved tensors (offloading), and for modules that are not transformers', PyTorch's or
    PEFT's LoRA.

    Raises:
        ValueError: `layers` of a model that has fewer, or no list of them.
    """
    causal_lm = causal_lm_of(model)
    first = None if layers is None else FirstLayers(causal_lm, layers)
    own = getattr(type(causal_lm), "_set_gradient_checkpointing", None)
    patches = Patches()
    if own is None or "value" in signature(own).parameters:  # code on the hub from before 4.35
        return patches.undo

    @functools.wraps(own)
    def enable(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        take_in(self)
        own(self, *args, **kwargs)
        _install(self)

    # bound: a deep copy of the model finds it bound to itself
    bound = types.MethodType(enable, causal_lm)
    patches.attribute(causal_lm, "_set_gradient_checkpointing", bound)
    patches.attribute(causal_lm, FIRST, first)
    _install(causal_lm)
    held = weakref.ref(causal_lm)

    def undo() -> None:
        patches.undo()
        kept = held()
        if kept is not None:
            leave_out(kept)
        if kept is not None and not _is_lean(kept):
            for layer in _layers(kept):
                function = layer.__dict__.get("_gradient_checkpointing_func")
                if _is_ours(function):
                    layer._gradient_checkpointing_func = function.args[0]

    return undo


def _is_lean(model: nn.Module) -> bool:
    """Whether somebody else has made it so and not taken it back."""
    return "_set_gradient_checkpointing" in model.__dict__


def _install(model: nn.Module) -> None:
    leave_out(model)
    for layer in _layers(model):
        function = layer.__dict__.get("_gradient_checkpointing_func")
        if (
            isinstance(function, functools.partial)
            and function.func is checkpoint
            and not function.args
            and function.keywords == {"use_reentrant": False}
        ):
            layer._gradient_checkpointing_func = functools.partial(checkpoint_layer, function)


def _is_ours(function: Any) -> bool:
    return isinstance(function, functools.partial) and function.func is checkpoint_layer


def _layers(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def checkpoint_layer(own: Callable[..., Any], function: Any, *args: Any) -> Any:
    """`function(*args)`, a decoder layer with its keywords, computed again in the backward.

    Args:
        own: PyTorch's function with its options, for what is not done here.
    """
    layer = _layer_of(function)
    if layer is None or layer in _several or len(args) != 1 or not _takes(function, args[0]):
        return own(function, *args)
    held = _held(layer)
    if held is None:
        return own(function, *args)
    parameters, modules = held
    if not (parameters or args[0].requires_grad):
        return function(*args)
    try:
        return _Layer.apply(_Run(function, layer, modules, args[0].device), args[0], *parameters)
    except _NotOneTensor:
        _several.add(layer)
        return own(function, *args)


def _layer_of(function: Any) -> Any:
    """The layer whose class's forward, or call, this is with keywords; None: something else, such
    as a compiled one."""
    if not isinstance(function, functools.partial):
        return None
    if len(function.args) == 1:  # transformers checkpoints inside of `forward`
        (layer,) = function.args
        forward = getattr(type(layer).forward, "__wrapped__", None)
        return layer if function.func is forward else None
    # before, it did so around the call
    layer = getattr(function.func, "__self__", None)
    is_call = getattr(function.func, "__func__", None) is nn.Module.__call__
    return layer if is_call and vars(layer).get("_compiled_call_impl") is None else None


def _takes(function: functools.partial[Any], hidden: Any) -> bool:
    return (
        type(hidden) in PLAIN
        and device_kind(hidden.device) in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # pyright: ignore[reportAttributeAccessIssue]
        and not _has_any_global_hook()
        and all(map(_is_constant, function.keywords.values()))
    )


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_constant, value))
    return not value.requires_grad if isinstance(value, Tensor) else type(value) in _CONSTANTS


@functools.cache
def _is_known(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_KNOWN) and "FSDPModule" not in (
        base.__name__ for base in kind.__mro__
    )


def _held(layer: nn.Module) -> tuple[list[Tensor], list[int]] | None:
    """The parameters that a layer trains, and its modules' identities; None: they are not what a
    node can stand for."""
    found: list[Tensor] = []
    met: set[int] = set()  # a tensor's own hash is a function of Python
    seen: list[int] = []
    modules: list[nn.Module | None] = [layer]
    while modules:
        module = modules.pop()
        if module is None:
            continue
        seen.append(id(module))
        own = module.__dict__
        if (
            "_is_replica" in own  # of DataParallel, which holds parameters as mere attributes
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or not _is_known(type(module))
            or ("forward" in own and not runs_own_forward(module))
        ):
            return None
        for parameter in own["_parameters"].values():
            if parameter is None or not parameter.requires_grad or id(parameter) in met:
                continue
            # a hook on the tensor would see its gradient twice, one on what is accumulated all of
            # a layer's at once
            if (
                type(parameter) not in PLAIN
                or not parameter.is_leaf
                or parameter._backward_hooks
                or getattr(parameter, "_post_accumulate_grad_hooks", None)
            ):
                return None
            met.add(id(parameter))
            found.append(parameter)
        if own["_modules"]:
            modules.extend(own["_modules"].values())
    return found, seen


class _NotOneTensor(Exception):
    """What the layer returned."""


_several: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers that did


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, hidden: Tensor, *parameters: Tensor) -> Tensor:
        output = run.first(hidden)
        if not isinstance(output, Tensor):
            raise _NotOneTensor
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(hidden)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None, None, *(None for _ in ctx.parameters))
        (hidden,) = ctx.saved_tensors
        of_hidden = ctx.needs_input_grad[1]
        hidden = hidden.detach().requires_grad_(of_hidden)
        outputs = [output for output in ctx.run.again(hidden) if output.requires_grad]
        wanted = (hidden, *ctx.parameters) if of_hidden else ctx.parameters
        ends = [grad.to(output.dtype) for output in outputs]
        grads = torch.autograd.grad(outputs, wanted, ends, allow_unused=True)
        return (None, *grads) if of_hidden else (None, None, *grads)


class _Run:
    """A layer's forward with its keywords, and what the state was that it ran in."""

    def __init__(
        self, function: Any, layer: nn.Module, modules: list[int], device: torch.device
    ) -> None:
        self._function, self._layer, self._device = function, layer, device
        self._modules = modules
        kind = device.type
        self._autocast = None
        if torch.is_autocast_enabled(kind):
            self._autocast = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
        self._random: _Random | None = None  # None: the layer draws nothing

    def first(self, hidden: Tensor) -> Any:
        """The layer's output, without gradient."""
        if type(hidden) is FakeTensor:  # a trace has no numbers, and no bytes of a state
            with self._no_cached_casts():
                return self._function(hidden)
        before = _Random.now(self._device)
        with self._no_cached_casts():
            output = self._function(hidden)
        if before != _Random.now(self._device):
            self._random = before
            if not isinstance(output, Tensor):  # it runs again, as if for the first time
                before.set(self._device)
        return output

    def again(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Tensors whose gradients are all that of the layer's output: the output itself, or the
        two that it is the sum of, where nobody needs the sum."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._as_first_time())
            if self._autocast is not None:
                # no leaf: of those it keeps a cast, whose gradients it would add up in bf16
                hidden = hidden.view_as(hidden)
            if self._random is not None:
                stack.enter_context(self._random.again(self._device))
            # an adapter that came since, or dropout where there was none, moves the end
            seen = self._random is None, self._modules
            found = _ends.get(self._layer)
            if found is None or found[0] != seen:
                output, end = _with_end(self._layer, functools.partial(self._function, hidden))
                _ends[self._layer] = seen, end
                return (output,)
            end = found[1]
            last, norm = (None, None) if end is None else (end.last(), end.norm())
            if last is None or norm is None:
                return (self._function(hidden),)
            return _run_to(last, norm, functools.partial(self._function, hidden))

    @contextlib.contextmanager
    def _no_cached_casts(self) -> Iterator[None]:
        """Inside, autocast does not keep its copies of weights, which nobody reads again; without
        gradient, as PyTorch before 2.11 makes them here, they would have none in the backward."""
        if self._autocast is None:
            yield
            return
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _as_first_time(self) -> contextlib.AbstractContextManager[Any]:
        kind = self._device.type
        if self._autocast is not None:
            dtype, cache = self._autocast
            return torch.autocast(kind, dtype, cache_enabled=cache)
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()


class _Random(NamedTuple):
    """The state of the random numbers that a layer may draw."""

    host: bytes
    device: tuple[int, int] | None  # a GPU's: seed, and how many were drawn

    @classmethod
    def now(cls, device: torch.device) -> _Random:
        host = torch.default_generator.get_state().numpy().tobytes()
        if device.type != "cuda":
            return cls(host, None)
        generator = torch.cuda.default_generators[device.index]
        return cls(host, (generator.initial_seed(), generator.get_offset()))

    @contextlib.contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Inside, the same numbers are drawn."""
        with torch.random.fork_rng([device] if self.device is not None else []):
            self.set(device)
            yield

    def set(self, device: torch.device) -> None:
        state = torch.frombuffer(bytearray(self.host), dtype=torch.uint8)
        torch.default_generator.set_state(state)
        if self.device is not None:
            generator = torch.cuda.default_generators[device.index]
            seed, offset = self.device
            generator.manual_seed(seed)
            generator.set_offset(offset)


# --- the end of a layer, which a gradient does not need -------------------------------------------


class _End(NamedTuple):
    """A layer's last sum: `residual + last(x)`. Its gradient needs no value of either.

    Attributes:
        last: a weak reference to the linear layer, plain or with LoRA, whose output is one term.
        norm: to the module whose input is the other one.
    """

    last: Callable[[], Any]
    norm: Callable[[], Any]


def _run_to(last: Any, norm: Any, forward: Callable[[], Any]) -> tuple[Tensor, ...]:
    """The two terms, the last one without its value; or the sum, where the last module has to run
    as it is, or on other rows than the layer."""
    residual: list[Tensor] = []

    def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        residual.append(hidden)
        return norm_forward(hidden, *args, **kwargs)

    def stop(x: Tensor) -> Tensor:
        if len(residual) == 1 and residual[0].shape[:-1] == x.shape[:-1]:
            out = _without_value(last, x)
            if out is not None:
                raise _Stop(out)
        return last_forward(x)

    norm_forward, last_forward = norm.forward, last.forward
    with _own_attribute(norm, "forward", keep), _own_attribute(last, "forward", stop):
        try:
            return (forward(),)
        except _Stop as stopped:
            return residual[0], stopped.out


class _Stop(Exception):
    """The layer's forward has come to its last product."""

    def __init__(self, out: Tensor) -> None:
        self.out = out


# With what they were found for; None: the layer ends otherwise.
_ends: weakref.WeakKeyDictionary[nn.Module, tuple[Any, _End | None]] = weakref.WeakKeyDictionary()


def _with_end(layer: nn.Module, forward: Callable[[], Any]) -> tuple[Any, _End | None]:
    """The layer's output, and what it is the sum of."""
    inputs: dict[Any, nn.Module] = {}  # node of autograd -> the module whose input it made
    linear: dict[Any, nn.Module] = {}

    own = set(layer.modules()) - {layer}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module not in own:
            return
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            inputs.setdefault(args[0].grad_fn, module)
        if isinstance(output, Tensor) and output.grad_fn is not None and _is_plain_linear(module):
            linear[output.grad_fn] = module

    # not of the modules: one that has a hook of its own runs otherwise (`fuse_lora`)
    handle = register_module_forward_hook(see)
    try:
        output = forward()
    finally:
        handle.remove()
    node, end = output.grad_fn, None
    if node is not None and node.name() == "AddBackward0" and node._saved_alpha == 1:
        terms = [term for term, _ in node.next_functions]
        for residual, last in (terms, terms[::-1]):
            if residual in inputs and last in linear:
                end = _End(weakref.ref(linear[last]), weakref.ref(inputs[residual]))
    return output, end


def _is_plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear or has_forward(module, FUSED)


def _without_value(module: Any, x: Tensor) -> Tensor | None:
    """What a linear layer would return, with its gradients and any values; None: it has to run."""
    if type(module) is not nn.Linear:
        return lora_without_value(module, x)
    weight, bias = module.weight, module.bias
    if type(weight) not in PLAIN:  # a quantised one may know no other product
        return None
    through_onednn = has_forward(module, "oneDNN") and onednn.fits(x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if any(t.dtype == torch.float64 for t in (x, weight)):
            return None
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _Product.apply(x, weight, bias, through_onednn)


class _Product(torch.autograd.Function):
    """The gradients of `F.linear`, as this or oneDNN's makes them, without the product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, through_onednn: bool
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.through_onednn = through_onednn
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *onednn.gradients(x, weight, grad, ctx.needs_input_grad, ctx.through_onednn), None


@contextlib.contextmanager
def _own_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
