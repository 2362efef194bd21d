"""hidden @ Wᵀ → running logsumexp and target logit in one kernel; no logits in device memory.

Letters: N scored tokens (rows), H hidden size, W rows of the weight: the vocabulary's columns
[start, start + W). Scores z of the softmax as in `logprob`, of logits rounded to the dtype of
hidden, as a Linear layer and the tile path round them: a policy that keeps its logits and a
reference that never makes them must agree (the first DPO loss is ln 2).

A work item (`head_tiles`) keeps the maximum of its scores and the sum of their exponentials in
registers and stores two numbers a row; a second, small kernel combines the items of a row in the
order of their columns. With statistics it is six numbers (`statistics`): what the scores are summed
up to as they stand in registers, so that no logits need to be read for them.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head_tiles import (
    check_powers,
    grid_of,
    halves_of,
    is_aligned,
    item_of,
    operands_of,
    product_of_tile,
    scores_of,
    sizes_of,
    splits_of,
    store_tile,
    target_of,
    tile_options,
)
from .launch import DotLaunch, architecture, device_of, exp, pick
from .logprob import (
    DTYPES,
    check_logsumexp,
    check_statistics,
    check_vector,
    fold,
    fold_logsumexp,
    logprob_naive,
)
from .statistics import distance_of, fold_statistics, moved_energy

# Halves whose rows are multiples of 16 elements. The first of a row is the default, the others are
# tried with TRALIGN_AUTOTUNE=1. sm_90 was timed; the others are what fits without a spill.
#   sm_80   128×128: 64 accumulators a thread; three stages of 32 kB fit the 99 kB that a program
#           may have on sm_86, sm_89 and sm_120 as well.
#   sm_90   128×256, a half for each of two warpgroups: 6 bytes from the L2 cache for 256 products,
#           where 128×128 reads 8. TMA frees the registers of addresses for 128 accumulators. On an
#           H200, N = 1,024, Llama 3's head: 721 TFLOP/s, with 256×128 704, with 128×128 662; 687
#           with three stages, 636 with a program an item. cuBLAS's product alone: 740.
#   sm_100  128×128; the product leaves tensor memory for registers, of which 256×128 had too few.
#   gfx942  64 kB of shared memory, whose second stage waits in registers.
WIDE_LAUNCH = {
    "sm_80": (DotLaunch(128, 128, 64, 8, 3), DotLaunch(64, 128, 64, 8, 3)),
    "sm_90": (
        DotLaunch(128, 256, 64, 8, 4, tma=True, persistent=True),
        DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),
    ),
    "sm_100": (
        DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),
        DotLaunch(128, 64, 64, 4, 4, tma=True, persistent=True),
    ),
    "gfx942": (DotLaunch(128, 128, 64, 8, 2), DotLaunch(64, 128, 64, 4, 2)),
}
# fp32 (tests, small models), and halves that neither TMA nor 16-byte loads can address. One stage
# on AMD: with two, masks spill from scalar registers.
SMALL_LAUNCH = {
    "sm_80": (DotLaunch(64, 32, 16, 4, 2),),
    "sm_90": (DotLaunch(64, 64, 16, 8, 2),),
    "sm_100": (DotLaunch(64, 32, 16, 4, 2),),
    "gfx942": (DotLaunch(64, 64, 16, 8, 1),),
}

# Where the powers of the scores are stored too, of aligned halves. Not timed. Their tile passes
# shared memory on its way, 64 kB of 128×256, which leaves stages of half the depth.
POWERS_LAUNCH = {
    "sm_80": (DotLaunch(128, 128, 32, 8, 4),),
    "sm_90": (
        DotLaunch(128, 256, 32, 8, 6, tma=True, persistent=True),
        DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),
    ),
    "sm_100": (DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),),
    "gfx942": (DotLaunch(128, 128, 64, 8, 2),),
}
# Where statistics are made too, with powers and without. Not timed. Beside each score there are its
# power and its distance from the peak, for which sm_90 has registers if a quarter of the tile is
# looked at a time, and sm_80 with a tile of half the rows; on gfx942 addresses of a deeper slice
# spill from scalar registers.
STATISTICS_LAUNCH = {
    "sm_80": (DotLaunch(64, 128, 64, 8, 3),),
    "sm_90": (
        DotLaunch(128, 256, 64, 8, 4, tma=True, persistent=True, parts=4),
        DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),
    ),
    "sm_100": (DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),),
    "gfx942": (DotLaunch(128, 128, 32, 8, 2),),
}
_COMBINE_BLOCK = 128


# In place of a target's column, where another column of the item has a larger score, or an earlier
# one the same.
_BEATEN = tl.constexpr(-2)


@triton.jit
def _fold_scores(
    x, first_row, first_column, N, W, inner, outer, powers, powers_stride, target,
    target_logit, peak, mass, energy, squares, total, dtype: tl.constexpr, SOFTCAP: tl.constexpr,
    POWERS: tl.constexpr, STATISTICS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(target, target_logit, peak, mass, energy, squares, total) with the logits x of a tile, or a
    part of one, in them; stores their powers."""
    COLUMNS: tl.constexpr = x.shape[1]
    column = first_column + tl.arange(0, COLUMNS)
    if STATISTICS:
        total += tl.sum(x, axis=1)
    z = scores_of(x, column, W, inner, outer, dtype, SOFTCAP)
    if not STATISTICS:
        target_logit += _picked(z, column, target)
    # maxima skip NaN, sums do not; a row of -inf so far: exp(-inf - 0) = 0, not NaN
    highest = tl.max(z, axis=1)
    new_peak = tl.maximum(peak, highest)
    pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    if STATISTICS:
        # a branch, which few tiles take: what it needs is not alive beside what follows
        is_here = (target >= first_column) & (target < first_column + COLUMNS)
        if tl.max(is_here.to(tl.int32), axis=0) > 0:
            target_logit += _picked(z, column, target)
            first = tl.min(tl.where(z == highest[:, None], column[None, :], 2**31 - 1), axis=1)
            is_first_peak = (highest > peak) & (first == target)
            target = tl.where(is_here & (is_first_peak == 0), _BEATEN, target)
        energy = moved_energy(energy, mass, peak, pivot)
    scale, power = exp(peak - pivot), exp(z - pivot[:, None])
    mass = mass * scale + tl.sum(power, axis=1)
    if STATISTICS:
        energy += tl.sum(power * distance_of(z, pivot[:, None]), axis=1)
        squares = squares * (scale * scale) + tl.sum(power * power, axis=1)
    if POWERS:
        power *= exp(pivot)[:, None]
        store_tile(powers, first_row, first_column, N, W, powers_stride, power, TMA)
    return target, target_logit, new_peak, mass, energy, squares, total


@triton.jit
def _fold_halves(
    x, first_row, first_column, N, W, inner, outer, powers, powers_stride, target,
    target_logit, peak, mass, energy, squares, total, dtype: tl.constexpr, SOFTCAP: tl.constexpr,
    POWERS: tl.constexpr, STATISTICS: tl.constexpr, TMA: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_fold_scores` of the left columns, then of the right ones, which wait for the left's peak:
    what stands beside every score is alive for half of them."""
    left, right = halves_of(x)
    target, target_logit, peak, mass, energy, squares, total = _fold_scores(
        left, first_row, first_column, N, W, inner, outer, powers, powers_stride, target,
        target_logit, peak, mass, energy, squares, total, dtype, SOFTCAP, POWERS, STATISTICS, TMA,
    )  # fmt: skip
    return _fold_scores(
        right, first_row, first_column + COLUMNS // 2, N, W, inner, outer, powers,
        powers_stride, target, target_logit, peak, mass, energy, squares, total, dtype, SOFTCAP,
        POWERS, STATISTICS, TMA,
    )  # fmt: skip


@triton.jit
def _picked(z, column, target):
    """Scores of the targets that lie in these columns, else 0."""
    return tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)


@triton.jit(do_not_specialize=["start", "N"])
def _linear_logprob_kernel(
    hidden,  # (N, H): pointer or, with TMA, descriptor
    weight,  # (W, H): likewise
    bias_ptr,  # (W,)
    targets_ptr,  # (N,) int64
    partial_ptr,  # (2 or 6, splits, N) fp32: peak, mass, energy, squares, total, is top-1
    target_logit_ptr,  # (N,) fp32
    powers,  # (N, W) exp(score), where asked for: pointer or, with TMA, descriptor
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
    SOFTCAP: tl.constexpr,
    POWERS: tl.constexpr,
    STATISTICS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
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
        split, first_row, row, row_inside, begin, end, target = item_of(
            item, targets_ptr, start, N, W, row_blocks, splits, SPLIT, GROUP, ROWS
        )
        target_logit = tl.zeros((ROWS,), tl.float32)
        peak = tl.full((ROWS,), -float("inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        energy = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)  # of logits before they are rounded
        for first_column in range(begin, end, COLUMNS):
            x = product_of_tile(
                hidden, weight, bias_ptr, first_row, first_column, N, W, H, hidden_stride,
                weight_stride, BIAS, TMA, PRECISION, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
            if PARTS == 1:
                target, target_logit, peak, mass, energy, squares, total = _fold_scores(
                    x, first_row, first_column, N, W, inner, outer, powers, powers_stride, target,
                    target_logit, peak, mass, energy, squares, total, dtype, SOFTCAP, POWERS,
                    STATISTICS, TMA,
                )  # fmt: skip
            else:
                left, right = halves_of(x)
                target, target_logit, peak, mass, energy, squares, total = _fold_halves(
                    left, first_row, first_column, N, W, inner, outer, powers, powers_stride,
                    target, target_logit, peak, mass, energy, squares, total, dtype, SOFTCAP,
                    POWERS, STATISTICS, TMA, COLUMNS // 2,
                )  # fmt: skip
                target, target_logit, peak, mass, energy, squares, total = _fold_halves(
                    right, first_row, first_column + COLUMNS // 2, N, W, inner, outer, powers,
                    powers_stride, target, target_logit, peak, mass, energy, squares, total, dtype,
                    SOFTCAP, POWERS, STATISTICS, TMA, COLUMNS // 2,
                )  # fmt: skip
        partial = partial_ptr + split.to(tl.int64) * N + row
        part = splits.to(tl.int64) * N
        tl.store(partial, peak, mask=row_inside)
        tl.store(partial + part, mass, mask=row_inside)
        if STATISTICS:
            is_top1 = (target >= 0) & (target_logit == peak)
            tl.store(partial + 2 * part, energy, mask=row_inside)
            tl.store(partial + 3 * part, squares, mask=row_inside)
            tl.store(partial + 4 * part, total * inner, mask=row_inside)
            tl.store(partial + 5 * part, tl.where(is_top1, 1.0, 0.0), mask=row_inside)
        tl.store(target_logit_ptr + row, target_logit, mask=target != -1)


@triton.jit(do_not_specialize=["N", "statistics_stride"])
def _combine_kernel(
    partial_ptr,  # (2 or 6, splits, N) fp32
    logsumexp_ptr,  # (N, 2) fp32, running
    statistics_ptr,  # (5, N) fp32, running
    N,
    splits,
    statistics_stride,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    part = splits.to(tl.int64) * N
    partial_ptr += row
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    if STATISTICS:
        energy = tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        top1 = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        other_peak = tl.load(partial_ptr, mask=inside, other=0.0)
        other_mass = tl.load(partial_ptr + part, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, other_peak)
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        scale, other_scale = exp(peak - pivot), exp(other_peak - pivot)
        if STATISTICS:
            more = tl.load(partial_ptr + 2 * part, mask=inside, other=0.0)
            energy = moved_energy(energy, mass, peak, pivot)
            energy += moved_energy(more, other_mass, other_peak, pivot)
            more = tl.load(partial_ptr + 3 * part, mask=inside, other=0.0)
            squares = squares * (scale * scale) + more * (other_scale * other_scale)
            total += tl.load(partial_ptr + 4 * part, mask=inside, other=0.0)
            other_top1 = tl.load(partial_ptr + 5 * part, mask=inside, other=0.0)
            top1 = tl.where(other_peak > peak, other_top1, top1)
        mass = mass * scale + other_mass * other_scale
        peak = new_peak
        partial_ptr += N
    before, new = fold_logsumexp(logsumexp_ptr, row, peak, mass, inside)
    if STATISTICS:
        fold_statistics(
            statistics_ptr + row, statistics_stride.to(tl.int64), before, new, mass, energy,
            squares, peak, top1 > 0.0, total, inside,
        )  # fmt: skip


def linear_logprob_forward_(
    hidden: Tensor,  # (N, H) fp32, bf16 or fp16, unit column stride, any row stride
    weight: Tensor,  # (W, H) of the same dtype, unit column stride, any row stride
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32, read and written: see `logprob_forward_`
    target_logit: Tensor,  # (N,) float32, written where the target lies in the tile
    *,
    bias: Tensor | None = None,  # (W,) of the same dtype
    powers: Tensor | None = None,  # (N, W) bf16, written: see `linear_powers`
    statistics: Tensor | None = None,  # (5, N) float32, read and written, of aligned halves
    **transform: float | None,  # of `logprob.fold`
) -> None:
    """`logprob_forward_(F.linear(hidden, weight, bias), ...)` without the logits.

    One difference: products of fp32 inputs are summed in another order than torch's. Products are
    accumulated in fp32, plus bias, rounded once to the dtype of the inputs; fp32 inputs are
    multiplied to fp32's precision (TF32 three times over on NVIDIA, IEEE on AMD).

    Traffic: the weight is read once from device memory for every 2,048 rows; memory: two floats a
    row for every 2,048 columns, six with statistics. The result is the same on every run, and does
    not depend on the number of multiprocessors.
    """
    N, H = hidden.shape
    W = weight.shape[0]
    _check(hidden, weight, targets, bias, logsumexp, target_logit)
    if N == 0 or W == 0:
        return
    name = architecture(hidden.device)
    wide = is_wide(hidden, weight)
    candidates = (WIDE_LAUNCH if wide else SMALL_LAUNCH)[name]
    inner, outer, softcap = fold(**transform)
    if statistics is not None:
        assert wide, "statistics are of aligned halves"
        assert not softcap, "statistics are of scores without a softcap"
        check_statistics(statistics, N)
    if powers is not None:
        check_powers(powers, hidden, weight, softcap)
    if statistics is not None:
        candidates = [c for c in STATISTICS_LAUNCH[name] if bias is None or is_roomy(c)]
    elif powers is not None:
        candidates = [c for c in POWERS_LAUNCH[name] if bias is None or is_roomy(c)]
    elif softcap:
        candidates = [c for c in candidates if is_roomy(c)]
    splits = splits_of(W)
    parts = 2 if statistics is None else 6
    partial = hidden.new_empty((parts, splits, N), dtype=torch.float32)

    def run(launch: DotLaunch) -> None:
        _linear_logprob_kernel[grid_of(N, W, launch, hidden.device)](
            *operands_of(hidden, weight, launch),
            hidden if bias is None else bias,  # any pointer, not read
            targets.contiguous(),
            partial,
            target_logit,
            target_of(powers, launch) if powers is not None else hidden,  # likewise
            start,
            *sizes_of(hidden, weight, powers),
            inner,
            outer,
            BIAS=bias is not None,
            SOFTCAP=softcap,
            POWERS=powers is not None,
            STATISTICS=statistics is not None,
            **tile_options(launch, name, grouped=wide),
            PARTS=launch.parts,
        )

    with device_of(hidden):
        key = (_linear_logprob_kernel, name, hidden.dtype, N, W, H, bias is None, softcap,
               powers is None, parts)  # fmt: skip
        run(pick(candidates, key, run))
        _combine_kernel[(triton.cdiv(N, _COMBINE_BLOCK),)](
            partial,
            logsumexp,
            logsumexp if statistics is None else statistics,  # any pointer, not read
            N,
            splits,
            0 if statistics is None else statistics.stride(0),
            STATISTICS=statistics is not None,
            BLOCK=_COMBINE_BLOCK,
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    target_logit: Tensor,
) -> None:
    N, H = hidden.shape
    assert weight.shape[1] == H, (hidden.shape, weight.shape)
    assert hidden.dtype in DTYPES, hidden.dtype
    assert weight.dtype == hidden.dtype, (hidden.dtype, weight.dtype)
    for matrix in (hidden, weight):
        assert H <= 1 or matrix.stride(1) == 1, matrix.stride()
    if bias is not None:
        check_vector(bias, weight.shape[0], hidden.dtype)
        assert bias.is_contiguous(), bias.stride()
    check_vector(targets, N, torch.int64)
    check_logsumexp(logsumexp, N)
    check_vector(target_logit, N, torch.float32)
    for vector in (logsumexp, target_logit):
        assert vector.is_contiguous(), vector.stride()


def is_roomy(launch: DotLaunch) -> bool:
    """tanh takes more registers than 128 accumulators a thread leave, and so does a bias beside
    statistics or powers: the tile may have 64."""
    return launch.rows * launch.columns <= 64 * 32 * launch.num_warps


def is_wide(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.dtype != torch.float32 and is_aligned(hidden) and is_aligned(weight)


def linear_logprob_naive(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64; outside [0, V): no target
    *,
    bias: Tensor | None = None,  # (V,)
    dtype: torch.dtype = torch.float64,
    **options,
) -> tuple[Tensor, Tensor]:
    """(logsumexp (N,), target_logit (N,)) of unrounded logits in `dtype`, in plain PyTorch."""
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    no_grad = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    return logprob_naive(logits, targets, no_grad, dtype=dtype, **options)[:2]
