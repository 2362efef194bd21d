"""One step of AdamW on one parameter: two launches, up to 4,096 elements one.

Letters: W the weight, G the gradient, m and v the running means of G and G², t the step:

    m ← m + (1-β₁)·(G - m),   v ← β₂·v + (1-β₂)·G²
    W ← W·(1 - wd·lr) - lr/(1-β₁ᵗ) · m / (sqrt(v/(1-β₂ᵗ)) + ε)

The first launch looks for what is not finite and works out 1-βᵗ, since t lies on the device; the
second writes. No step is made, and t stays, where `found_inf` is 1, which a gradient that is not
finite sets.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adafactor import not_finite, round_into
from .ema import LANES, TRITON_DTYPE
from .launch import INTERPRETED, device_of

_BLOCK, _WARPS = 4096, 8  # 16 elements a thread on NVIDIA
# Elements of a program, so that what it reads first is paid once per 130 to 400 kB of traffic.
_CHUNK = 1 << 15


class AdamWOptions(NamedTuple):
    """What a step of one group of parameters is given, but for weights and states."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@triton.jit
def correction(step, log_beta):
    """1 - βᵗ, which fp32 would make of two numbers near 1."""
    return (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def _adamw_check_kernel(
    grad_ptr,
    step_ptr,  # () float32: t - 1
    corrections_ptr,  # (3,) float32, written: t, 1 - β₁ᵗ, 1 - β₂ᵗ
    found_inf_ptr,  # () float32, 1 is written
    size,
    log_beta1,
    log_beta2,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    begin = program.to(tl.int64) * CHUNK
    left = tl.minimum(size - begin, CHUNK).to(tl.int32)
    grad_ptr += begin
    bad = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, left, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + index, mask=index < left, other=0.0).to(tl.float32)
        bad += tl.where(tl.abs(grad) < float("inf"), 0, 1)
    tl.store(found_inf_ptr, 1.0, mask=tl.sum(bad) > 0)
    if program == 0:
        step = tl.load(step_ptr) + 1.0
        tl.store(corrections_ptr, step)
        tl.store(corrections_ptr + 1, correction(step, log_beta1))
        tl.store(corrections_ptr + 2, correction(step, log_beta2))


@triton.jit(do_not_specialize=["seed", "first_counter"])
def _adamw_kernel(
    weight_ptr,  # written
    grad_ptr,
    mean_ptr,  # m, written
    square_ptr,  # v, written
    step_ptr,  # () float32, written: t
    corrections_ptr,
    found_inf_ptr,
    size,
    lr,
    new1,  # 1 - β₁
    beta2,
    new2,  # 1 - β₂
    eps,
    weight_decay,
    log_beta1,
    log_beta2,
    seed,
    first_counter,
    ALONE: tl.constexpr,  # one program, one block: checks too
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    begin = program.to(tl.int64) * CHUNK
    left = tl.minimum(size - begin, CHUNK).to(tl.int32)
    found_inf = tl.load(found_inf_ptr)
    if ALONE:
        index = tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + index, mask=index < left, other=0.0).to(tl.float32)
        found_inf = tl.where(not_finite(grad) > 0, 1.0, found_inf)
        tl.store(found_inf_ptr, 1.0, mask=found_inf > 0.0)
        step = tl.load(step_ptr) + 1.0
        correction1, correction2 = correction(step, log_beta1), correction(step, log_beta2)
    else:
        step = tl.load(corrections_ptr)
        correction1 = tl.load(corrections_ptr + 1)
        correction2 = tl.load(corrections_ptr + 2)
    if found_inf == 0.0:
        tl.store(step_ptr, step, mask=program == 0)
        root = tl.sqrt(correction2)
        rate = lr / correction1
        weight_ptr += begin
        grad_ptr += begin
        mean_ptr += begin
        square_ptr += begin
        # counters of the weight, of m and of v follow each other
        apart = tl.cdiv(size, LANES)
        first = first_counter + begin // LANES
        for offset in range(0, left, BLOCK):
            index = offset + tl.arange(0, BLOCK)
            inside = index < left
            grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + index, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + index, mask=inside, other=0.0).to(tl.float32)
            square = tl.load(square_ptr + index, mask=inside, other=0.0).to(tl.float32)
            mean += new1 * (grad - mean)
            square = square * beta2 + new2 * grad * grad
            moved = weight * (1.0 - lr * weight_decay)
            moved -= rate * mean / (tl.sqrt(square) / root + eps)
            counters = first + offset // LANES + tl.arange(0, BLOCK // LANES)
            result = round_into(moved, weight_ptr, seed, counters, (BLOCK,))  # pyright: ignore[reportArgumentType]
            tl.store(weight_ptr + index, result, mask=inside)
            result = round_into(mean, mean_ptr, seed, counters + apart, (BLOCK,))  # pyright: ignore[reportArgumentType]
            tl.store(mean_ptr + index, result, mask=inside)
            result = round_into(square, square_ptr, seed, counters + 2 * apart, (BLOCK,))  # pyright: ignore[reportArgumentType]
            tl.store(square_ptr + index, result, mask=inside)


@torch.no_grad()
def adamw_step_(
    weight: Tensor,  # any shape, fp32, bf16 or fp16, contiguous; written
    grad: Tensor,  # like weight
    mean: Tensor,  # m, of weight's shape, fp32, bf16 or fp16; written
    square: Tensor,  # v, like m; written
    step: Tensor,  # () float32, written: steps so far
    found_inf: Tensor,  # () float32: 0, or 1 where no step is to be made; 1 is written
    options: AdamWOptions,
    *,
    seed: int = 0,
    first_counter: int = 0,
) -> None:
    """One step of `torch.optim.AdamW`, in fp32, every number rounded once.

    bf16 and fp16, weights and states, are rounded stochastically: with β₂ = 0.999 a v in bf16 would
    never become smaller by rounding to nearest. The random bits of an element follow from
    (seed, first_counter, its index), as in `ema_update_`; a step uses `3 · counters_of(weight)`
    Philox counters from `first_counter` on.

    Traffic: the gradient is read twice (once up to 4,096 elements); weight, m and v are read and
    written once. Memory: 12 bytes.
    """
    _check(weight, grad, mean, square, step, found_inf)
    size = weight.numel()
    if not size:
        return
    beta1, beta2 = options.betas
    logs = [math.log(beta) if beta > 0.0 else -math.inf for beta in options.betas]
    alone = size <= _BLOCK
    programs = triton.cdiv(size, _CHUNK)
    with device_of(weight):
        corrections = step
        if not alone:
            corrections = torch.empty(3, dtype=torch.float32, device=weight.device)
            _adamw_check_kernel[(programs,)](
                grad, step, corrections, found_inf, size, *logs,
                CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        _adamw_kernel[(programs,)](
            weight, grad, mean, square, step, corrections, found_inf, size, options.lr,
            1.0 - beta1, beta2, 1.0 - beta2, options.eps, options.weight_decay, *logs, seed,
            first_counter, ALONE=alone, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def launches_of(weight: Tensor) -> int:
    """Kernels that a step of `weight` launches."""
    return 0 if not weight.numel() else 1 if weight.numel() <= _BLOCK else 2


def _check(weight, grad, mean, square, step, found_inf) -> None:
    assert weight.dtype in TRITON_DTYPE, weight.dtype
    assert mean.dtype in TRITON_DTYPE, mean.dtype
    assert (grad.dtype, square.dtype) == (weight.dtype, mean.dtype), (grad.dtype, square.dtype)
    assert grad.shape == mean.shape == square.shape == weight.shape, (grad.shape, weight.shape)
    for single in (step, found_inf):
        assert single.numel() == 1, single.shape
        assert single.dtype == torch.float32, single.dtype
    for tensor in (weight, grad, mean, square, step, found_inf):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.device == weight.device, (tensor.device, weight.device)
    assert not (INTERPRETED.value and weight.is_cuda), "interpreted kernels need CPU tensors"
