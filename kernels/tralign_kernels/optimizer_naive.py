"""The steps of `adafactor` and `adamw` in PyTorch, as their modules write them."""

import torch
from torch import Tensor

from .adafactor import AdafactorOptions
from .adamw import AdamWOptions


def adafactor_naive(
    weight: Tensor,
    grad: Tensor,
    squares: tuple[Tensor, ...],
    options: AdafactorOptions,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weight and the running means after the step, in `dtype`, out of place, in PyTorch."""
    w, g = weight.to(dtype), grad.to(dtype)
    new, square = options.step**options.decay, g.square() + options.eps
    averages = (square,) if len(squares) == 1 else (square.mean(-1), square.mean(-2))
    after = tuple(
        old.to(dtype) * (1 - new) + average * new
        for old, average in zip(squares, averages, strict=True)
    )
    if len(after) == 1:
        update = g * after[0].rsqrt()
    else:
        row = (after[0] / after[0].mean(-1, keepdim=True)).rsqrt()
        update = g * row[..., None] * after[1].rsqrt()[..., None, :]
    lr = options.lr
    if options.scale:
        lr *= max(options.eps_scale, w.square().mean().sqrt().item())
    rho = update.square().mean().sqrt().item()
    size = lr / max(1.0, rho / options.threshold)
    return w * (1 - options.weight_decay * lr) - update * size, after


def adamw_naive(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,  # 1 for the first
    options: AdamWOptions,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, m and v after the step, in `dtype`, out of place, in PyTorch."""
    (beta1, beta2), g = options.betas, grad.to(dtype)
    m = mean.to(dtype).lerp(g, 1 - beta1)
    v = square.to(dtype) * beta2 + (1 - beta2) * g.square()
    update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + options.eps)
    decayed = weight.to(dtype) * (1 - options.lr * options.weight_decay)
    return decayed - options.lr * update, m, v
