"""A linear layer with LoRA, `W x + b + s·B A x`, as one node of autograd.

Composed of modules it is a dozen operators: the factors' products are scaled, cast and added in
passes of their own over (M, O), and the two gradients of x are added up. Here each of these
products is accumulated into that of the base weight.

Letters: M rows, I inputs, O outputs, R rank; `base` and `factors`: the dtypes of their products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tralign_fast.ops.cpu import onednn


class LoraFactors(NamedTuple):
    """What is added to a layer's product: `s·B diag(c) A`.

    Concatenated along the rank, with a weight c for each of its columns, this is any number of
    adapters in one product; those are for forwards without gradient.
    """

    down: Tensor | None  # A (R, I); None: the identity, R = I
    up: Tensor  # B (O, R)
    scale: float  # s
    dtype: torch.dtype  # of the products, outside of autocast
    coefficients: Tensor | None = None  # c (R,); None: all are 1


def lora_linear(
    x: Tensor,  # (..., I)
    weight: Tensor,  # (O, I)
    bias: Tensor | None,  # (O,)
    factors: LoraFactors,
    *,
    value: bool = True,
) -> Tensor:  # (..., O)
    """`F.linear(x, weight, bias) + s * (x.to(dtype) @ A.T * c) @ B.T`, in the dtype of the first.

    Products have the dtypes that modules would give them: under autocast its own, else the base's
    is that of x and weight, and the factors' is `factors.dtype`. Their sum is rounded once. For the
    backward x is kept as it is, `A x`, and the factors' casts, but none of x or weight.

    Args:
        value: False, where a gradient is wanted alone: the output has any values.
    """
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtypes = (autocast or x.dtype, autocast or factors.dtype)
    down, up, scale = factors.down, factors.up, factors.scale
    if torch.is_grad_enabled() and (
        x.requires_grad
        or up.requires_grad
        or (down is not None and down.requires_grad)
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        assert down is not None
        assert factors.coefficients is None
        return _LoraLinear.apply(x, weight, bias, down, up, scale, dtypes, value)
    return _forward(x, weight, bias, factors, dtypes)[0]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dtypes: tuple[torch.dtype, torch.dtype],  # base, factors
        value: bool,
    ) -> Tensor:
        ctx.factor_dtypes = down.dtype, up.dtype
        down, up = (
            _cast(down, dtypes[1]),
            _cast(up, dtypes[1]),
        )  # once: launches cost more
        if value:
            out, h = _forward(x, weight, bias, LoraFactors(down, up, scale, dtypes[1]), dtypes)
        else:
            h = _cast(x.reshape(-1, x.shape[-1]), dtypes[1]) @ down.t()
            out = x.new_empty((), dtype=dtypes[0]).expand(*x.shape[:-1], weight.shape[0])
        _, of_weight, _, of_down, of_up, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if of_weight or of_down else None, h if of_up else None, weight, down, up
        )
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.x_shape, ctx.scale, ctx.dtypes = x.shape, scale, dtypes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 8
        x, h, weight, down, up = ctx.saved_tensors
        of_x, of_weight, of_bias, of_down, of_up, *_ = ctx.needs_input_grad
        scale, (base, factors) = ctx.scale, ctx.dtypes
        grad = grad.reshape(-1, grad.shape[-1])  # (M, O)
        for_factors = _cast(grad, factors)
        rows = None if x is None else x.reshape(-1, x.shape[-1])  # (M, I)
        down_dtype, up_dtype = ctx.factor_dtypes
        grad_h = grad_x = grad_weight = grad_bias = grad_down = grad_up = None
        if of_x or of_down:
            grad_h = _scaled_product(for_factors, up, scale)  # (M, R)
        if of_up:
            grad_up = _cast(_scaled_product(for_factors.t(), h, scale), up_dtype)
        del for_factors, h
        if of_x:
            assert grad_h is not None
            grad_x = _input_gradient(grad, _cast(weight, base))
            _add_product_(grad_x, grad_h, down, 1.0)
            grad_x = _cast(grad_x, ctx.x_dtype).view(ctx.x_shape)
        if of_down:
            assert grad_h is not None
            assert rows is not None
            grad_down = _cast(grad_h.t() @ _cast(rows, factors), down_dtype)
        if of_weight:
            assert rows is not None
            grad_weight = _cast(grad.t() @ _cast(rows, base), weight.dtype)
        if of_bias:
            grad_bias = _cast(grad.sum(0), ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_down, grad_up, None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoraFactors,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor]:
    """The output (..., O), and A x (M, R)."""
    base, factors = dtypes
    rows = x.reshape(-1, x.shape[-1])  # (M, I)
    for_base = _cast(rows, base)
    out = _product(for_base, _cast(weight, base), None if bias is None else _cast(bias, base))
    h = for_base if base == factors else _cast(rows, factors)
    del for_base
    if lora.down is not None:
        h = h @ _cast(lora.down, factors).t()
    if lora.coefficients is not None:
        h = (h * lora.coefficients).to(factors)
    _add_product_(out, h, _cast(lora.up, factors).t(), lora.scale)
    # not as a view, which the caller's model could not change in place
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])), h


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which asks the dispatcher also where there is nothing to do: fourteen
    times a layer."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if onednn.fits(x, weight, bias):
        return onednn.product(x, weight, bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if onednn.fits(grad, weight):
        return onednn.product(grad.contiguous(), weight.t())
    return grad @ weight


def _add_product_(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """`out += scale·a b`; where the dtypes differ the product is rounded to that of `out` once."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=scale)
    else:
        out.add_(a @ b, alpha=scale)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return a @ b
    # beta = 0: what the memory held is not read, NaN neither
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)
