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


def turns_by_halves(original: Callable[..., Any]) -> bool:
    """Whether `original(q, k, cos, sin)` is `turn` of both, to the bit, with its gradients."""
    return all(_same_bits(original, dtype, dtype) for dtype in (torch.float32, torch.bfloat16))


@functools.cache
def _same_bits(original: Callable[..., Any], of_tokens: torch.dtype, of_cos: torch.dtype) -> bool:
    """The same for queries and keys of one dtype, cosines and sines of another."""
    with _disable_current_modes():  # real numbers in a traced step too
        try:
            return _is_turn(original, of_tokens, of_cos)
        except Exception:  # it takes something else
            return False


def _is_turn(original: Callable[..., Any], of_tokens: torch.dtype, of_cos: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = of_tokens) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    with torch.enable_grad(), torch.inference_mode(False):
        cos, sin = made(2, 5, 8, dtype=of_cos), made(2, 5, 8, dtype=of_cos)  # halves that differ
        q, k = made(2, 5, 3, 8).requires_grad_(), made(2, 5, 1, 8).requires_grad_()
        views = q.transpose(1, 2), k.transpose(1, 2)
        expected = original(*views, cos, sin)
        found = [turn(x, *_signed(cos, sin)) for x in views]
        if any(a.dtype != b.dtype for a, b in zip(expected, found, strict=True)):
            return False
        slopes = [made(*output.shape, dtype=output.dtype) for output in found]
        expected = *expected, *torch.autograd.grad(expected, (q, k), slopes)
        found += torch.autograd.grad(found, (q, k), slopes)
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _in_place_of(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What is called in place of the function, which still takes whatever is called otherwise."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            args
            or kwargs
            or not PLAIN.issuperset((type(q), type(k), type(cos), type(sin)))
            or sin.dim() != 3
            or not q.shape[-2:] == k.shape[-2:] == sin.shape[-2:] == cos.shape[-2:]
            or sin.shape[-1] % 2
            or cos.requires_grad
            or sin.requires_grad
            or k.dtype != q.dtype
            or sin.dtype != cos.dtype
            # autocast; or a model's own, whose function may give back the dtype of the queries
            or (q.dtype != cos.dtype and not _same_bits(original, q.dtype, cos.dtype))
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
    keeps = not (cos.is_inference() or sin.is_inference() or torch.is_inference_mode_enabled())
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
