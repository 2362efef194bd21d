"""Liger's layer kernels as nodes of autograd: RMSNorm, SwiGLU and GeGLU, rotary embeddings.

Called through Liger's launchers, as its own autograd functions do. Those write a norm's gradient
over the one that came in, which a residual connection may hand to others too, and let a second
backward read gradients where activations were; they also ask of every call what is known here.

Importing this module imports Liger.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops.consumption import Consumption, refuse_second_derivative, saved_tensors

MODULES = tuple(f"liger_kernel.ops.{name}" for name in ("rms_norm", "swiglu", "geglu", "rope"))
_rms_norm, _swiglu, _geglu, _rope = (importlib.import_module(name) for name in MODULES)

# Frozen weights need no gradient: Liger 0.8.1 knows none
_HAS_NEEDS_DW = "needs_dw" in inspect.signature(_rms_norm.rms_norm_backward).parameters


# --- RMSNorm --------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,  # (..., H)
    weight: Tensor,  # (H,), of the dtype of x
    eps: float,
    offset: float,
    casting: str,  # "llama": x is rounded before the product with the weight; "gemma": after it
) -> Tensor:  # (..., H)
    """`x / sqrt(mean(x²) + eps) * (offset + weight)`, in the dtype of x."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, offset, casting)  # pyright: ignore[reportReturnType]
    return _rms_norm.rms_norm_forward(x.contiguous(), weight, eps, offset, casting, None)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, casting: str
    ) -> Tensor:
        y, x, rstd, *ctx.launch = _rms_norm.rms_norm_forward(
            x.contiguous(), weight, eps, offset, casting, None
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative("Liger's RMSNorm")
        x, weight, rstd = ctx.saved_tensors
        block, warps, casting = ctx.launch
        wanted = {"needs_dw": ctx.needs_input_grad[1]} if _HAS_NEEDS_DW else {}
        # not in place: where the norm's output is added to a residual, both get this gradient
        grad_x, grad_weight = _rms_norm.rms_norm_backward(
            grad.contiguous(), x, weight, rstd, ctx.offset, casting, block, warps, False, None,
            **wanted,
        )  # fmt: skip
        return grad_x, grad_weight, None, None, None


# --- SwiGLU and GeGLU -----------------------------------------------------------------------------


def silu_product(gate: Tensor, up: Tensor) -> Tensor:  # (..., I) each
    """`silu(gate) * up`. The backward writes the gradients over `gate` and `up`."""
    if torch.is_grad_enabled():
        return _Product.apply(gate, up, _silu)  # pyright: ignore[reportReturnType]
    return _silu[0](gate.contiguous(), up.contiguous())[2]


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:  # (..., I) each
    """`gelu(gate, approximate="tanh") * up`. The backward writes over `gate` and `up`."""
    if torch.is_grad_enabled():
        return _Product.apply(gate, up, _gelu)  # pyright: ignore[reportReturnType]
    return _gelu[0](gate.contiguous(), up.contiguous())[2]


_silu = (_swiglu.swiglu_forward, _swiglu.swiglu_backward)
_gelu = (_geglu.geglu_forward, _geglu.geglu_backward)
_USED = (
    "a gated MLP runs by Liger's kernel, whose backward overwrites what it needs: a second one "
    'over the same graph wants layer_kernels="none"'
)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, launchers: Any) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = launchers[0](gate, up)[2]
        # not the views that it returns: autograd refuses those by another message
        ctx.save_for_backward(gate, up)
        ctx.consumption = Consumption(gate)
        ctx.launcher = launchers[1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative("Liger's gated product")
        gate, up = saved_tensors(ctx, _USED)
        ctx.consumption.check(gate, _USED)
        # a kernel's writes are not seen
        torch.autograd.graph.increment_version((gate, up))
        rows = (t.view(-1, t.shape[-1]) for t in (gate, up, grad.contiguous()))
        grads = ctx.launcher(*rows)
        return *(t.view(gate.shape) for t in grads), None


# --- rotary embeddings ----------------------------------------------------------------------------


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions, in halves as Llama has it.

    Args:
        q, k: (B, heads, T, D), views of (B, T, heads, D), **which are overwritten**: a projection's
            output, which nobody else reads.
        cos, sin: (1 or B, T, R) with R ≤ D, both halves alike.
    """
    if torch.is_grad_enabled():
        return _Rotary.apply(q, k, cos, sin)  # pyright: ignore[reportReturnType]
    return _rope.rope_forward(q, k, cos, sin)[:2]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # whoever has kept them for a backward is told of it by autograd
        torch.autograd.graph.increment_version((q, k))
        q, k, cos, sin = _rope.rope_forward(q, k, cos, sin)
        ctx.save_for_backward(cos, sin)
        return q, k

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        refuse_second_derivative("Liger's rotary embedding")
        cos, sin = ctx.saved_tensors
        return *_rope.rope_backward(grad_q, grad_k, cos, sin), None, None


@functools.cache
def kernels() -> tuple[tuple[Any, str], ...]:
    """(module, name) of every Triton kernel of Liger's that is launched from here."""
    return tuple(
        (module, name)
        for module in (_rms_norm, _swiglu, _geglu, _rope)
        for name, value in vars(module).items()
        if name.startswith("_") and hasattr(value, "fn") and hasattr(value, "run")
    )
