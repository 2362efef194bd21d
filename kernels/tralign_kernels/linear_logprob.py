"""hidden @ Wᵀ → running logsumexp and target logit in one kernel; no logits in device memory.

Letters: N scored tokens (rows), H hidden size, W rows of the weight: the vocabulary's columns
[start, start + W). Scores z of the softmax as in `logprob`, of logits rounded to the dtype of
hidden, as a Linear layer and the tile path round them: a policy that keeps its logits and a
reference that never makes them must agree (the first DPO loss is ln 2).

A work item is one block of rows and `SPLIT` columns. It keeps the maximum of its scores and the sum
of their exponentials in registers and stores two numbers a row; a second, small kernel combines the
items of a row in the order of their columns. Which columns an item has depends on the shape alone,
so that results do not depend on the number of multiprocessors, nor on the order of the items.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .ema import round_nearest
from .launch import FLOAT_PRECISION, DotLaunch, architecture, device_of, dot, pick
from .logprob import (
    DTYPES,
    check_logsumexp,
    check_vector,
    fold,
    logprob_naive,
    score,
    store_logsumexp,
)

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
    "sm_100": (DotLaunch(64, 64, 16, 8, 2),),
    "gfx942": (DotLaunch(64, 64, 16, 8, 1),),
}

# Where the powers of the scores are stored too, of aligned halves. Not timed. Their tile passes
# shared memory on its way, 64 kB of 128×256, which leaves stages of half the depth.
POWERS_LAUNCH = {
    "sm_80": (DotLaunch(128, 128, 64, 8, 3),),
    "sm_90": (
        DotLaunch(128, 256, 32, 8, 6, tma=True, persistent=True),
        DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),
    ),
    "sm_100": (DotLaunch(128, 128, 64, 8, 4, tma=True, persistent=True),),
    "gfx942": (DotLaunch(128, 128, 64, 8, 2),),
}

# Columns of a work item: 16 tiles of 128. Llama 3's vocabulary has 63 items a row, so that 2,048
# rows make 504 of them (3.8 for each of an H100's 132 SMs) and leave 0.5 kB a row to combine.
SPLIT = 2048
# Rows whose hidden states stay in the L2 cache (16 MB at H = 4,096, of an A100's 40 and an H100's
# 50) while all of the weight passes by; it is read from device memory once for every such group.
GROUP = 2048
_COMBINE_BLOCK = 128


@triton.jit
def _load_tile(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of a row-major matrix, zeros outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        address = source + i.to(tl.int64)[:, None] * stride + j[None, :]
        tile = tl.load(address, mask=inside, other=0.0)
    return tile


@triton.jit
def place_of(item, row_blocks, splits, GROUP_BLOCKS: tl.constexpr):
    """(block of rows, split): rows vary fastest within a group of blocks, then splits, then groups.

    Programs that run together read the same part of the weight, which thus comes from device memory
    once a group, and hidden states that the L2 cache holds.
    """
    if GROUP_BLOCKS == 0:  # all rows are one group
        block, split = item % row_blocks, item // row_blocks
    else:
        first = item // (GROUP_BLOCKS * splits) * GROUP_BLOCKS
        blocks = tl.minimum(GROUP_BLOCKS, row_blocks - first)
        place = item % (GROUP_BLOCKS * splits)
        block, split = first + place % blocks, place // blocks
    return block, split


@triton.jit
def scores_of_tile(
    hidden, weight, bias_ptr, first_row, first_column, N, W, H, hidden_stride, weight_stride,
    inner, outer, dtype: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) fp32 scores; -inf in columns that are not there."""
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < W
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BIAS:  # first, not last: registers are scarcest after the product
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in range(0, H, DEPTH):
        a = _load_tile(hidden, first_row, k, N, H, hidden_stride, ROWS, DEPTH, TMA)
        b = _load_tile(weight, first_column, k, W, H, weight_stride, COLUMNS, DEPTH, TMA)
        x = dot(a, b.T, x, PRECISION)
    z = score(round_nearest(x, dtype).to(tl.float32), inner, outer, SOFTCAP)
    return tl.where(inside[None, :], z, -float("inf"))


@triton.jit
def store_tile(target, first_row, first_column, rows, columns, stride, values, TMA: tl.constexpr):
    """`values` into a row-major matrix, what lies outside of it left out."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    if TMA:
        target.store([first_row, first_column], round_nearest(values, target.dtype))
    else:
        row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        address = target + row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(address, round_nearest(values, target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "N"])
def _linear_logprob_kernel(
    hidden,  # (N, H): pointer or, with TMA, descriptor
    weight,  # (W, H): likewise
    bias_ptr,  # (W,)
    targets_ptr,  # (N,) int64
    peak_ptr,  # (splits, N) fp32: maximum of an item's scores
    mass_ptr,  # (splits, N) fp32: sum of exp(score - maximum)
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
        block, split = place_of(item, row_blocks, splits, GROUP // ROWS)
        first_row = block * ROWS
        row = first_row + tl.arange(0, ROWS)
        row_inside = row < N
        begin = split * SPLIT
        end = tl.minimum(begin + SPLIT, W)
        # a target lies in one item, which alone writes it; 32 bits, as the columns it is sought in
        target = tl.load(targets_ptr + row, mask=row_inside, other=-1) - start
        own = row_inside & (target >= begin) & (target < end)
        target = tl.where(own, target, -1).to(tl.int32)
        peak = tl.full((ROWS,), -float("inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        target_logit = tl.zeros((ROWS,), tl.float32)
        for first_column in range(begin, end, COLUMNS):
            z = scores_of_tile(
                hidden, weight, bias_ptr, first_row, first_column, N, W, H, hidden_stride,
                weight_stride, inner, outer, dtype, BIAS, SOFTCAP, TMA, PRECISION, ROWS, COLUMNS,
                DEPTH,
            )  # fmt: skip
            column = first_column + tl.arange(0, COLUMNS)
            at_target = column[None, :] == target[:, None]
            target_logit += tl.sum(tl.where(at_target, z, 0.0), axis=1)
            # maxima skip NaN, sums do not; a row of -inf so far: exp(-inf - 0) = 0, not NaN
            new_peak = tl.maximum(peak, tl.max(z, axis=1))
            pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            power = tl.exp(z - pivot[:, None])
            mass = mass * tl.exp(peak - pivot) + tl.sum(power, axis=1)
            peak = new_peak
            if POWERS:
                power *= tl.exp(pivot)[:, None]
                store_tile(powers, first_row, first_column, N, W, powers_stride, power, TMA)
        partial = split.to(tl.int64) * N + row
        tl.store(peak_ptr + partial, peak, mask=row_inside)
        tl.store(mass_ptr + partial, mass, mask=row_inside)
        tl.store(target_logit_ptr + row, target_logit, mask=own)


@triton.jit(do_not_specialize=["N"])
def _combine_kernel(
    peak_ptr,  # (splits, N) fp32
    mass_ptr,  # (splits, N) fp32
    logsumexp_ptr,  # (N, 2) fp32, running
    N,
    splits,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    peak = tl.load(logsumexp_ptr + 2 * row, mask=inside, other=0.0)
    mass = tl.exp(tl.load(logsumexp_ptr + 2 * row + 1, mask=inside, other=0.0))
    for _ in range(0, splits):
        other_peak = tl.load(peak_ptr + row, mask=inside, other=0.0)
        other_mass = tl.load(mass_ptr + row, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, other_peak)
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        mass = mass * tl.exp(peak - pivot) + other_mass * tl.exp(other_peak - pivot)
        peak = new_peak
        peak_ptr += N
        mass_ptr += N
    pivot = tl.where(peak == -float("inf"), 0.0, peak)
    store_logsumexp(logsumexp_ptr, row, pivot, tl.log(mass), inside)


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
    **transform: float | None,  # of `logprob.fold`
) -> None:
    """`logprob_forward_(F.linear(hidden, weight, bias), ...)` without the logits.

    One difference: products of fp32 inputs are summed in another order than torch's. Products are
    accumulated in fp32, plus bias, rounded once to the dtype of the inputs; fp32 inputs are
    multiplied to fp32's precision (TF32 three times over on NVIDIA, IEEE on AMD).

    Traffic: the weight is read once from device memory for every 2,048 rows; memory: two floats a
    row for every 2,048 columns. The result is the same on every run, and does not
    depend on the number of multiprocessors.
    """
    N, H = hidden.shape
    W = weight.shape[0]
    _check(hidden, weight, targets, bias, logsumexp, target_logit)
    if N == 0 or W == 0:
        return
    name = architecture(hidden.device)
    wide = is_wide(hidden, weight)
    candidates = (WIDE_LAUNCH if wide else SMALL_LAUNCH)[name]
    inner, outer, softcap = fold(**transform)  # pyright: ignore[reportArgumentType]
    if powers is not None:
        check_powers(powers, hidden, weight, softcap)
        candidates = POWERS_LAUNCH[name]
    elif softcap:
        candidates = [c for c in candidates if fits_softcap(c)]
    splits = triton.cdiv(W, SPLIT)
    peaks, masses = hidden.new_empty((2, splits, N), dtype=torch.float32)

    def run(launch: DotLaunch) -> None:
        items = triton.cdiv(N, launch.rows) * splits
        assert items < 2**31, (N, W)
        _linear_logprob_kernel[(programs_of(items, launch, hidden.device),)](
            *operands_of(hidden, weight, launch),
            hidden if bias is None else bias,  # any pointer, not read
            targets.contiguous(),
            peaks,
            masses,
            target_logit,
            target_of(powers, launch) if powers is not None else hidden,  # likewise
            start,
            N,
            W,
            H,
            hidden.stride(0),
            weight.stride(0),
            0 if powers is None else powers.stride(0),
            inner,
            outer,
            BIAS=bias is not None,
            SOFTCAP=softcap,
            POWERS=powers is not None,
            TMA=launch.tma,
            PRECISION=FLOAT_PRECISION[name],
            SPLIT=SPLIT,
            GROUP=GROUP if wide else 0,  # small tiles have no registers left for it on sm_80
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
            num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
        )

    with device_of(hidden):
        key = (_linear_logprob_kernel, name, hidden.dtype, N, W, H, bias is None, softcap,
               powers is None)  # fmt: skip
        run(pick(candidates, key, run))
        _combine_kernel[(triton.cdiv(N, _COMBINE_BLOCK),)](
            peaks,
            masses,
            logsumexp,
            N,
            splits,
            BLOCK=_COMBINE_BLOCK,  # pyright: ignore[reportArgumentType]
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


def fits_softcap(launch: DotLaunch) -> bool:
    """tanh takes more registers than 128 accumulators a thread leave: the tile may have 64."""
    return launch.rows * launch.columns <= 64 * 32 * launch.num_warps


def is_wide(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.dtype != torch.float32 and is_aligned(hidden) and is_aligned(weight)


def check_powers(powers: Tensor, hidden: Tensor, weight: Tensor, softcap: bool) -> None:
    assert not softcap, "a softcap's slope is not in the powers"
    assert powers.shape == (len(hidden), len(weight)), powers.shape
    assert powers.dtype == hidden.dtype == torch.bfloat16, (powers.dtype, hidden.dtype)
    for matrix in (powers, hidden, weight):
        assert matrix.stride(1) == 1, matrix.stride()
        assert is_aligned(matrix), (matrix.data_ptr(), matrix.shape, matrix.stride())


def programs_of(items: int, launch: DotLaunch, device: torch.device) -> int:
    return min(items, _multiprocessors(device)) if launch.persistent else items


def operands_of(hidden: Tensor, weight: Tensor, launch: DotLaunch) -> tuple[Any, Any]:
    """As pointers or, with TMA, descriptors."""
    if not launch.tma:
        return hidden, weight
    return (
        _describe(hidden, launch.rows, launch.depth),
        _describe(weight, launch.columns, launch.depth),
    )


def target_of(powers: Tensor, launch: DotLaunch) -> Any:
    return _describe(powers, launch.rows, launch.columns) if launch.tma else powers


def is_aligned(matrix: Tensor) -> bool:
    """Whether TMA can address it, and pointers 16 bytes a thread: as every language model's."""
    return (matrix.data_ptr() | matrix.stride(0) | matrix.shape[1]) % 16 == 0


def _describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: fewer programs than items, as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    no_grad = torch.zeros(len(targets), device=hidden.device)
    return logprob_naive(logits, targets, no_grad, dtype=dtype, **options)[:2]
