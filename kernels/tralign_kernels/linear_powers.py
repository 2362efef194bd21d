"""Powers of the scores in place of logits: what the products of the head's backward take as it is.

Letters as in `linear_logprob`: N scored tokens (rows), H hidden size, W columns of a tile.

The gradient of the scores z, of a row whose log-prob has the gradient g, is

    g · (onehot - exp(z - logsumexp))  =  factor · E,    factor = -g · exp(shift - logsumexp),
    E = exp(z - shift), at the target's column  exp(z - shift) - exp(logsumexp - shift)

where `shift` is any number of the row. E needs no logsumexp but at N places, so the product that
makes the scores can store it, and the backward is two products of E in which the factor goes to the
other side: to the rows of hidden states for the gradient of the weight, to the rows of the product
for that of the hidden states. No pass over logits remains. The target's element is rounded where it
stands, g · (1 - p) with its own relative precision, as if d logits were rounded.

The shift is 0 where the logsumexp lies between those of `_LOW` and `_HIGH` (language models: 5 to
40): there no power overflows, and what is lost below is under 1e-12 of the row's mass. It is only
known when the product is done: rows elsewhere are made again, with their logsumexp for a shift.
bf16 alone has the range.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import round_nearest
from .head_tiles import (
    check_powers,
    grid_of,
    item_of,
    operands_of,
    product_of_tile,
    scores_of,
    sizes_of,
    store_tile,
    target_of,
    tile_options,
)
from .launch import DotLaunch, Launch, architecture, backend, device_of, exp, pick
from .linear_logprob import POWERS_LAUNCH
from .logprob import check_logsumexp, check_vector, fold

_LOW, _HIGH = tl.constexpr(-30.0), tl.constexpr(60.0)
# 16 bytes a thread per load in bf16
SCALE_LAUNCH = {"cuda": Launch(block=2048, num_warps=4), "hip": Launch(block=2048, num_warps=4)}


@triton.jit
def _shift_of(high):
    """(whether the shift is 0, the shift) of rows, by their logsumexp."""
    is_moderate = (high > _LOW) & (high < _HIGH)  # NaN is not
    return is_moderate, tl.where(is_moderate, 0.0, high)


@triton.jit(do_not_specialize=["start", "N"])
def _linear_powers_kernel(
    hidden,  # (N, H): pointer or, with TMA, descriptor
    weight,  # (W, H): likewise
    bias_ptr,  # (W,)
    targets_ptr,  # (N,) int64
    logsumexp_ptr,  # (N, 2) fp32
    logps_ptr,  # (N,) fp32
    powers,  # (N, W): likewise
    powers_ptr,  # the same, as a pointer
    start,
    N,
    W,
    H,
    hidden_stride,
    weight_stride,
    powers_stride,
    inner,
    outer,
    BIAS: tl.constexpr,
    REPAIR: tl.constexpr,  # the powers are there, but for the targets and rows with a shift
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    dtype: tl.constexpr = hidden.dtype if TMA else hidden.dtype.element_ty
    row_blocks, splits = tl.cdiv(N, ROWS), tl.cdiv(W, SPLIT)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        _, first_row, row, row_inside, begin, end, target = item_of(
            item, targets_ptr, start, N, W, row_blocks, splits, SPLIT, GROUP, ROWS
        )
        own = target >= 0
        high = tl.load(logsumexp_ptr + 2 * row, mask=row_inside, other=0.0)
        low = tl.load(logsumexp_ptr + 2 * row + 1, mask=row_inside, other=0.0)
        is_moderate, shift = _shift_of(high)
        logp = tl.load(logps_ptr + row, mask=own, other=0.0)
        own_power = exp(high - shift + low) * (exp(logp) - 1.0)
        wrong, count = row_inside, 1
        if REPAIR:
            own_place = powers_ptr + row.to(tl.int64) * powers_stride + target
            tl.store(own_place, round_nearest(own_power, dtype), mask=own & is_moderate)
            wrong = row_inside & (is_moderate == 0)
            count = tl.max(wrong.to(tl.int32), axis=0)
        if count > 0:
            for first_column in range(begin, end, COLUMNS):
                x = product_of_tile(
                    hidden, weight, bias_ptr, first_row, first_column, N, W, H, hidden_stride,
                    weight_stride, BIAS, TMA, PRECISION, ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
                column = first_column + tl.arange(0, COLUMNS)
                z = scores_of(x, column, W, inner, outer, dtype, False)
                at_target = column[None, :] == target[:, None]
                if REPAIR:  # rare; `exp` spills there on sm_100, at 128 registers
                    power = tl.exp(z - shift[:, None])
                else:
                    power = exp(z - shift[:, None])
                power = tl.where(at_target, own_power[:, None], power)
                if REPAIR:
                    tl.store(
                        powers_ptr + row.to(tl.int64)[:, None] * powers_stride + column[None, :],
                        round_nearest(power, dtype),
                        mask=wrong[:, None] & (column < W)[None, :],
                    )
                else:
                    store_tile(powers, first_row, first_column, N, W, powers_stride, power, TMA)


@triton.jit
def _scale_rows_kernel(
    source_ptr,  # (N, H)
    scaled_ptr,  # (N, H)
    logsumexp_ptr,  # (N, 2) fp32
    grad_ptr,  # (N,) fp32
    slope,
    H,
    source_stride,
    scaled_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    high, low = tl.load(logsumexp_ptr + 2 * row), tl.load(logsumexp_ptr + 2 * row + 1)
    _, shift = _shift_of(high)
    factor = -tl.load(grad_ptr + row) * exp(shift - high - low) * slope
    x = tl.load(source_ptr + row * source_stride + column, mask=inside, other=0.0).to(tl.float32)
    scaled = round_nearest(x * factor, scaled_ptr.dtype.element_ty)
    tl.store(scaled_ptr + row * scaled_stride + column, scaled, mask=inside)


def linear_powers_(
    hidden: Tensor,  # (N, H) bf16, aligned rows
    weight: Tensor,  # (W, H) likewise
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32, over all V columns
    logps: Tensor,  # (N,) float32 log-probs of the targets
    powers: Tensor,  # (N, W) bf16, written
    *,
    repair: bool = False,
    bias: Tensor | None = None,  # (W,) of the same dtype
    **transform: float | None,  # of `logprob.fold`, no softcap
) -> None:
    """powers ← E of the module's equation, for the columns [start, start + W).

    To `repair` are those that `linear_logprob_forward_(..., powers=powers)` left: what it could not
    know is written, one element a row, and rows whose logsumexp is out of the ordinary, for whose
    blocks alone the product is made again.
    """
    N, H = hidden.shape
    W = weight.shape[0]
    inner, outer, softcap = fold(**transform)
    check_powers(powers, hidden, weight, softcap)
    check_vector(targets, N, torch.int64)
    check_logsumexp(logsumexp, N)
    check_vector(logps, N, torch.float32)
    if N == 0 or W == 0:
        return
    name = architecture(hidden.device)

    def run(launch: DotLaunch) -> None:
        _linear_powers_kernel[grid_of(N, W, launch, hidden.device)](
            *operands_of(hidden, weight, launch),
            hidden if bias is None else bias,  # any pointer, not read
            targets.contiguous(),
            logsumexp.contiguous(),
            logps.contiguous(),
            powers if repair else target_of(powers, launch),
            powers,
            start,
            *sizes_of(hidden, weight, powers),
            inner,
            outer,
            BIAS=bias is not None,
            REPAIR=repair,
            **tile_options(launch, name),
        )

    with device_of(hidden):
        if repair:  # pointers take registers, and there is hardly a product
            run(POWERS_LAUNCH[name][-1])
        else:
            key = (_linear_powers_kernel, name, N, W, H, bias is None)
            run(pick(POWERS_LAUNCH[name], key, run))


def scale_rows_(
    scaled: Tensor,  # (N, H), written
    source: Tensor,  # (N, H), the same or another
    logsumexp: Tensor,  # (N, 2) float32
    grad: Tensor,  # (N,) float32, gradient of the log-probs
    slope: float,  # of the scores by the logits
) -> None:
    """scaled ← each row times its factor of the module's equation; fp32 inside, rounded once."""
    N, H = source.shape
    assert scaled.shape == source.shape, (scaled.shape, source.shape)
    check_logsumexp(logsumexp, N)
    check_vector(grad, N, torch.float32)
    for matrix in (scaled, source):
        assert H <= 1 or matrix.stride(1) == 1, matrix.stride()
    if source.numel() == 0:
        return
    launch = SCALE_LAUNCH[backend()]
    programs = N * triton.cdiv(H, launch.block)
    assert programs < 2**31, (N, H)
    with device_of(source):
        _scale_rows_kernel[(programs,)](
            source,
            scaled,
            logsumexp.contiguous(),
            grad.contiguous(),  # a sum's is expanded
            float(slope),
            H,
            source.stride(0),
            scaled.stride(0),
            BLOCK=launch.block,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )


def linear_powers_naive(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    grad: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    dtype: torch.dtype = torch.float64,
    logit_scale: float = 1.0,
    inverse_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(E (N, V), factor (N,), logsumexp (N,)) in `dtype`, in plain PyTorch."""
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    slope = logit_scale * inverse_temperature
    z = z * slope
    logsumexp = z.logsumexp(1)
    is_moderate = (logsumexp > _LOW.value) & (logsumexp < _HIGH.value)
    shift = torch.where(is_moderate, 0.0, logsumexp)
    powers = torch.exp(z - shift[:, None])
    rows = torch.arange(len(targets), device=targets.device)
    powers[rows, targets] -= torch.exp(logsumexp - shift)
    return powers, -grad.to(dtype) * torch.exp(shift - logsumexp) * slope, logsumexp
