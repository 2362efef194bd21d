"""Rotary embeddings as transformers' attention layers call them, and the same in fewer operators.

transformers turns queries and keys in halves: `x * cos + rotate_half(x) * sin`, where
`rotate_half` slices, negates and joins, which autograd takes back by two tensors of zeros. A roll
by half the head swaps the halves as well, and the minus can stand with `sin`, once a step for all
layers: the same products, the same sums, the same bits, in half of the operators.

Letters: B rows, A heads, T tokens, D head size.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tralign_fast.model.fused_lora import PLAIN
from tralign_fast.model.patching import Patches, has_forward, runs_only

ROTARY = "apply_rotary_pos_emb"  # what the layers look up and call
FEWER_OPERATORS = "rotary operators"  # the kind of the patches
# An attribute of sin: (its version, cos, cos and sin as layers multiply with them)
_SIGNED = "_tralign_signed"


def fewer_rotary_operators(model: nn.Module) -> Callable[[], None]:
    """Runs the rotary embeddings of the model's attention layers in fewer operators, where those
    give the same bits; returns its undo. Layers that have a kernel for it keep that."""
    patches = Patches()
    for module in model.modules():
        original = rotary_of(type(module).forward)
        if original is None or not turns_by_halves(original):
            continue
        if runs_only(module, FEWER_OPERATORS) or has_forward(module, FEWER_OPERATORS):
            fast = _attention_with(type(module).forward, original)
            patches.forward(module, FEWER_OPERATORS, fast)
    return patches.undo


@functools.cache
def _attention_with(forward: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    return unless_compiled(with_rotary(forward, _in_place_of(original)))


@functools.cache
def turns_by_halves(original: Callable[..., Any]) -> bool:
    """Whether `original(q, k, cos, sin)` is `turn` of both, to the bit, with its gradients."""
    with _disable_current_modes():  # real numbers in a traced step too
        try:
            return all(_same_bits(original, dtype) for dtype in (torch.float32, torch.bfloat16))
        except Exception:  # it takes something else
            return False


def _same_bits(original: Callable[..., Any], dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    cos, sin = made(1, 5, 8), made(1, 5, 8)  # halves that differ
    q, k = made(1, 5, 3, 8).requires_grad_(), made(1, 5, 1, 8).requires_grad_()
    slopes = [made(1, heads, 5, 8) for heads in (3, 1)]
    found = []
    with torch.enable_grad(), torch.inference_mode(False):
        for function in (original, _in_place_of(None)):
            outputs = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            found.append([*outputs, *torch.autograd.grad(outputs, (q, k), slopes)])
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def _in_place_of(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What is called in place of the function, which still takes whatever is called otherwise."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            args
            or kwargs
            or not PLAIN.issuperset((type(q), type(k), type(cos), type(sin)))
            or sin.dim() != 3
            or not q.shape[-1] == k.shape[-1] == sin.shape[-1] == cos.shape[-1]
            or sin.shape[-1] % 2
            or cos.requires_grad
            or sin.requires_grad
        ):
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = _signed(cos, sin)
        return turn(q, cos, sin), turn(k, cos, sin)

    return rotate


def turn(
    x: Tensor,  # (B, A, T, D)
    cos: Tensor,  # (1 or B, 1, T, D)
    sin: Tensor,  # like cos, the first half with the minus of `rotate_half`
) -> Tensor:  # (B, A, T, D)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(1 or B, 1, T, D) of (1 or B, T, D), made once for all layers that get the same tensors."""
    keeps = not (sin.is_inference() or torch.is_inference_mode_enabled())
    if keeps:
        held = sin.__dict__.get(_SIGNED)
        if held is not None and held[1] is cos and held[0] == (sin._version, cos._version):
            return held[2]
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    made = cos.unsqueeze(1), signed.unsqueeze(1)
    if keeps:
        setattr(sin, _SIGNED, ((sin._version, cos._version), cos, made))
    return made


# --- attention layers that call another function --------------------------------------------------


def rotary_of(forward: Any) -> Callable[..., Any] | None:
    """The function that an attention layer's forward looks up as its rotary embedding; None: it
    does not."""
    while isinstance(forward, types.FunctionType):
        if ROTARY in forward.__code__.co_names:
            return forward.__globals__.get(ROTARY)
        forward = getattr(forward, "__wrapped__", None)
    return None


def unless_compiled(fast: Callable[..., Any]) -> Callable[..., Any]:
    def forward(own_forward: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own_forward(attention, *args, **kwargs)
        return fast(attention, *args, **kwargs)

    return forward


class _Globals(dict):
    """A module's globals as they are at every moment, but for one name."""

    def __init__(self, below: dict[str, Any], name: str, value: Any) -> None:
        super().__init__({name: value, "__builtins__": below["__builtins__"]})
        self._below = below

    def __missing__(self, name: str) -> Any:
        return self._below[name]


def with_rotary(forward: Any, rotary: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with another function where it looks the rotary embedding up: no module of Python
    is changed, and no other instance or thread sees it."""
    inner, closure = getattr(forward, "__wrapped__", None), forward.__closure__
    scope = forward.__globals__
    if ROTARY in forward.__code__.co_names:
        scope = _Globals(scope, ROTARY, rotary)
    else:  # a decorator
        closure = tuple(
            types.CellType(with_rotary(inner, rotary)) if cell.cell_contents is inner else cell
            for cell in closure or ()
        )
    copied = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, closure
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied
