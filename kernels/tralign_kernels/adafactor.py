"""One step of Adafactor on one parameter: three launches for a matrix, one or two for a vector.

Letters: M matrices (a stack of experts; else one) of R rows and C columns, G the gradient, W the
weight, ν the share of the new gradient in the running means, U the update:

    r ← (1-ν)·r + ν·(mean over columns of G² + ε),   c the same over rows
    U = G / sqrt(r·cᵀ / mean(r)),   ρ = RMS(U)
    W ← W·(1 - wd·lr) - lr·U / max(1, ρ/d)

G is read twice. ρ needs all of r and of c, but c only in a sum over rows:
ρ² = mean(r)·Σ_j t_j/c_j / RC with t_j = Σ_i G²_ij / r_i, where r_i is known as soon as row i has
been read. So the first launch keeps a row in registers, and adds it to two partial sums a column;
the second adds these up; the third reads G again and writes W. A vector has its own mean of squares
an element.

No step is made where `found_inf` is 1, which a gradient that is not finite sets: then nothing is
written but `left_out`, a count on the device by which the host's number of steps is too large.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import LANES, TRITON_DTYPE, random_bits16, round_stochastic
from .launch import INTERPRETED, device_of

# Elements of a row that a program of the first launch keeps in registers with the two sums of each,
# 16 a thread on NVIDIA (32 spill), and its warps. Longer rows are cut: each part's program reads
# the other parts too, at about the same time as their own programs, so from a cache. Rows that are
# no multiple of 16 take more registers an element.
_BLOCKS = {256: 1, 1024: 2, 4096: 8, 8192: 16}
_BLOCKS_UNALIGNED = {256: 1, 1024: 4, 4096: 16}
# Rows of a program there: its two fp32 sums a column are written once for so many rows of G. Enough
# programs for every GPU (512) come first.
_FEWEST_ROWS, _MOST_ROWS, _PROGRAMS = 16, 256, 512
# (rows, columns) of the tile that the last launch updates at a time: 16 elements a thread.
_TILES = {64: 64, 256: 16, 1024: 4}  # columns: rows
_WARPS = 8
# Tile of the second launch: partial sums by columns.
_PARTIALS, _COLUMNS = 32, 64
_VECTOR = 4096  # elements of a program
_SUMS = 256  # partial sums that are added up at a time


class AdafactorOptions(NamedTuple):
    """What a step of one group of parameters is given, but for the weights."""

    lr: float
    step: int  # 1 for the first; those that were left out count
    decay: float  # ν = step ** decay, transformers' decay_rate (-0.8)
    eps: float  # ε, added to the squares
    eps_scale: float = 0.0  # the least RMS(W) that scales lr
    threshold: float = 1.0  # d, clip_threshold
    weight_decay: float = 0.0
    scale: bool = False  # scale_parameter: lr · max(eps_scale, RMS(W))


@triton.jit
def share(left_out_ptr, new, step, decay):
    """ν: `new`, of the host, unless steps were left out, of which the host does not know."""
    left = tl.load(left_out_ptr)
    return tl.where(left > 0.0, tl.exp2(decay * tl.log2(tl.maximum(step - left, 1.0))), new)


@triton.jit
def add_up(sums_ptr, count, SUMS: tl.constexpr):
    """The sum of `count` fp32 numbers, the same in every program, `SUMS` at a time."""
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, count, SUMS):
        index = first + tl.arange(0, SUMS)
        total += tl.load(sums_ptr + index, mask=index < count, other=0.0)
    return tl.sum(total)


@triton.jit
def not_finite(x):
    """How many elements are NaN or infinite."""
    return tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1))


@triton.jit
def round_into(x, pointer, seed, counters, SHAPE: tl.constexpr):
    """fp32 in the dtype of `pointer`: bf16 and fp16 are rounded stochastically."""
    if pointer.dtype.element_ty == tl.float32:
        result = x
    else:
        noise = random_bits16(seed, counters, SHAPE)
        result = round_stochastic(x, noise, pointer.dtype.element_ty)
    return result


@triton.jit(do_not_specialize=["R", "groups", "rows"])
def _adafactor_statistics_kernel(
    grad_ptr,  # (M, R, C)
    weight_ptr,  # (M, R, C), read where SCALED
    row_ptr,  # (M, R) float32: r before the step
    rows_ptr,  # (M, R) float32, written: r
    totals_ptr,  # (M·groups,) float32, written: sums of r
    squares_ptr,  # (M·groups, parts) float32, written where SCALED: sums of W²
    partials_ptr,  # (2, M·groups, C) float32, written: sums of G² and of G²/r
    found_inf_ptr,  # () float32, 1 is written
    left_out_ptr,  # (1,) float32
    R,
    C,
    groups,  # of rows, a matrix
    rows,  # of a group
    new,
    step,
    decay,
    eps,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,  # a row is several parts
    BLOCK: tl.constexpr,  # columns of a part
):
    part, program = tl.program_id(0), tl.program_id(1)
    parts, programs = tl.num_programs(0), tl.num_programs(1)
    matrix = program // groups
    first = (program % groups) * rows
    last = tl.minimum(first + rows, R)
    new = share(left_out_ptr, new, step, decay)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    line = matrix.to(tl.int64) * R + first
    sums = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    total, weights = 0.0, 0.0
    # the row after this one is on its way while this one is summed
    following = tl.load(grad_ptr + line * C + column, mask=inside, other=0.0)
    for index in range(first, last):
        grad = following.to(tl.float32)
        more = column < tl.where(index + 1 < last, C, 0)
        following = tl.load(grad_ptr + (line + 1) * C + column, mask=more, other=0.0)
        square = grad * grad
        norm = tl.sum(square)
        if not norm < float("inf"):  # the sum of finite elements may overflow: ask them
            tl.store(found_inf_ptr, 1.0, mask=not_finite(grad) > 0)
        if SPLIT:
            for other in range(parts):
                there = other * BLOCK + tl.arange(0, BLOCK)
                mask = there < tl.where(part == other, 0, C)
                others = tl.load(grad_ptr + line * C + there, mask=mask, other=0.0)
                norm += tl.sum(others.to(tl.float32) * others.to(tl.float32))
        row = tl.load(row_ptr + line) * (1.0 - new) + new * (norm / C + eps)
        tl.store(rows_ptr + line, row, mask=part == 0)
        total += row
        sums += square
        ratios += square * (1.0 / row)
        if SCALED:
            weight = tl.load(weight_ptr + line * C + column, mask=inside, other=0.0)
            weights += tl.sum(weight.to(tl.float32) * weight.to(tl.float32))
        line += 1
    tl.store(totals_ptr + program, total, mask=part == 0)
    if SCALED:
        tl.store(squares_ptr + program * parts + part, weights)
    start = partials_ptr + program.to(tl.int64) * C
    tl.store(start + column, sums, mask=inside)
    tl.store(start + programs.to(tl.int64) * C + column, ratios, mask=inside)


@triton.jit(do_not_specialize=["M", "R", "groups", "squares"])
def _adafactor_factors_kernel(
    column_ptr,  # (M, C) float32, written: c
    totals_ptr,
    squares_ptr,
    partials_ptr,
    means_ptr,  # (M,) float32, written: mean(r)
    sums_ptr,  # (M, blocks) float32, written: parts of ρ²·R·C
    rms_ptr,  # () float32, written where SCALED: RMS(W)
    found_inf_ptr,
    left_out_ptr,
    M,
    R,
    C,
    groups,
    squares,  # sums of W²
    numel,  # of W, as a float
    new,
    step,
    decay,
    eps,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    matrix, block = tl.program_id(0), tl.program_id(1)
    found_inf = tl.load(found_inf_ptr)
    new = share(left_out_ptr, new, step, decay)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    start = matrix.to(tl.int64) * groups
    apart = tl.full((), 1, tl.int64) * M * groups * C
    sums = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        totals += tl.load(totals_ptr + start + group, mask=group < groups, other=0.0)
        pointers = partials_ptr + (start + group)[:, None] * C + column[None, :]
        mask = (group < groups)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
        ratios += tl.sum(tl.load(pointers + apart, mask=mask, other=0.0), 0)
    mean = tl.sum(totals) / R
    old = tl.load(column_ptr + matrix.to(tl.int64) * C + column, mask=inside, other=1.0)
    new_column = old * (1.0 - new) + new * (sums / R + eps)
    written = tl.where(inside, found_inf, 1.0) == 0.0  # the interpreter has no scalar & block
    tl.store(column_ptr + matrix.to(tl.int64) * C + column, new_column, mask=written)
    total = tl.sum(tl.where(inside, ratios / new_column, 0.0)) * mean
    tl.store(sums_ptr + matrix * tl.num_programs(1) + block, total)
    tl.store(means_ptr + matrix, mean, mask=block == 0)
    if SCALED and matrix + block == 0:
        rms = tl.sqrt(add_up(squares_ptr, squares, SUMS) / numel)
        tl.store(rms_ptr, rms, mask=found_inf == 0.0)


@triton.jit(do_not_specialize=["R", "sums", "seed", "first_counter"])
def _adafactor_update_kernel(
    weight_ptr,  # (M, R, C), written
    grad_ptr,  # (M, R, C)
    row_ptr,  # (M, R) float32, written
    column_ptr,  # (M, C) float32
    rows_ptr,
    means_ptr,
    sums_ptr,
    rms_ptr,
    found_inf_ptr,
    left_out_ptr,  # (1,) float32, written where the step is left out
    R,
    C,
    sums,  # M·blocks
    numel,
    lr,
    eps_scale,
    threshold,
    weight_decay,
    seed,
    first_counter,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(R, ROWS)
    matrix = (program // blocks).to(tl.int64)
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    valid = row < R
    line = matrix * R + row
    if tl.load(found_inf_ptr) == 0.0:
        if SCALED:
            lr = lr * tl.maximum(eps_scale, tl.load(rms_ptr))
        size = lr / tl.maximum(tl.sqrt(add_up(sums_ptr, sums, SUMS) / numel) / threshold, 1.0)
        keep = 1.0 - weight_decay * lr
        means = tl.load(rows_ptr + line, mask=valid, other=1.0)
        tl.store(row_ptr + line, means, mask=valid)
        by_row = tl.rsqrt(means / tl.load(means_ptr + matrix))
        for first in range(0, C, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = valid[:, None] & (column < C)[None, :]
            by_column = tl.load(column_ptr + matrix * C + column, mask=column < C, other=1.0)
            index = line[:, None] * C + column[None, :]
            grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
            update = by_row[:, None] * tl.rsqrt(by_column)[None, :] * grad
            moved = weight * keep - update * size
            lanes = first // LANES + tl.arange(0, BLOCK // LANES)
            counters = first_counter + line[:, None] * tl.cdiv(C, LANES) + lanes[None, :]
            result = round_into(moved, weight_ptr, seed, counters, (ROWS, BLOCK))  # pyright: ignore[reportArgumentType]
            tl.store(weight_ptr + index, result, mask=mask)
    else:
        if program == 0:
            tl.store(left_out_ptr, tl.load(left_out_ptr) + 1.0)


@triton.jit(do_not_specialize=["programs", "seed", "first_counter"])
def _adafactor_vector_kernel(
    weight_ptr,  # (C,), written
    grad_ptr,  # (C,)
    square_ptr,  # (C,) float32, written: running mean of G²
    sums_ptr,  # (2, programs) float32: sums of U² and W²
    rms_ptr,  # () float32, written where SCALED
    found_inf_ptr,  # () float32, 1 is written
    left_out_ptr,  # (1,) float32, written where the step is left out
    C,
    programs,
    numel,
    new,
    step,
    decay,
    eps,
    lr,
    eps_scale,
    threshold,
    weight_decay,
    seed,
    first_counter,
    MEASURES: tl.constexpr,  # ρ and what is not finite; a program that does both is alone
    UPDATES: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    program = tl.program_id(0)
    new = share(left_out_ptr, new, step, decay)
    index = program * BLOCK + tl.arange(0, BLOCK)
    inside = index < C
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(square_ptr + index, mask=inside, other=1.0) * (1.0 - new)
    square += new * (grad * grad + eps)
    update = tl.where(inside, grad * tl.rsqrt(square), 0.0)
    found_inf = tl.load(found_inf_ptr)
    total, weights = 0.0, 0.0
    if MEASURES:
        found_inf = tl.where(not_finite(grad) > 0, 1.0, found_inf)
        tl.store(found_inf_ptr, 1.0, mask=found_inf > 0.0)
        total = tl.sum(update * update)
        if SCALED:
            weights = tl.sum(weight * weight)
        if not UPDATES:
            tl.store(sums_ptr + program, total)
            tl.store(sums_ptr + programs + program, weights, mask=SCALED)
    if UPDATES:
        if not MEASURES:
            total = add_up(sums_ptr, programs, SUMS)
            if SCALED:
                weights = add_up(sums_ptr + programs, programs, SUMS)
        if SCALED:
            rms = tl.sqrt(weights / numel)
            tl.store(rms_ptr, rms, mask=(found_inf == 0.0) & (program == 0))
            lr = lr * tl.maximum(eps_scale, rms)
        size = lr / tl.maximum(tl.sqrt(total / numel) / threshold, 1.0)
        moved = weight * (1.0 - weight_decay * lr) - update * size
        counters = first_counter + program * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)
        result = round_into(moved, weight_ptr, seed, counters, (BLOCK,))  # pyright: ignore[reportArgumentType]
        written = tl.where(inside, found_inf, 1.0) == 0.0  # the interpreter has no scalar & block
        tl.store(square_ptr + index, square, mask=written)
        tl.store(weight_ptr + index, result, mask=written)
        left = tl.load(left_out_ptr)
        tl.store(left_out_ptr, left + 1.0, mask=(found_inf > 0.0) & (program == 0))


class _Scratch(NamedTuple):
    """fp32 buffers between the launches, parts of one allocation at multiples of 16 bytes."""

    rows: Tensor
    totals: Tensor
    squares: Tensor
    partials: Tensor
    means: Tensor
    sums: Tensor


def _scratch(sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    padded = [-(-size // 4) * 4 for size in sizes]
    return list(torch.empty(sum(padded), dtype=torch.float32, device=device).split(padded))


class _Plan(NamedTuple):
    """How the first and the third launch cut M matrices (R, C)."""

    rows: int  # of a group
    groups: int  # of a matrix
    parts: int  # of a row
    block: int  # columns of a part
    num_warps: int
    tile: int  # columns of the tile of the update


def plan_of(M: int, R: int, C: int) -> _Plan:
    rows = _FEWEST_ROWS
    while rows < _MOST_ROWS and rows * _PROGRAMS < M * R:
        rows *= 2
    blocks = _BLOCKS if C % 16 == 0 else _BLOCKS_UNALIGNED
    block = next((b for b in blocks if b >= C), max(blocks))
    tile = next((t for t in _TILES if t >= C), max(_TILES))
    return _Plan(rows, -(-R // rows), -(-C // block), block, blocks[block], tile)


@torch.no_grad()
def adafactor_step_(
    weight: Tensor,  # any shape, fp32, bf16 or fp16, contiguous; written
    grad: Tensor,  # like weight
    squares: tuple[Tensor, ...],  # float32, written: (r (..., R), c (..., C)), or a vector's own
    found_inf: Tensor,  # () float32: 0, or 1 where no step is to be made; 1 is written
    left_out: Tensor,  # (1,) float32, written: how many of the steps were left out
    rms: Tensor | None,  # () float32, written with `scale`: RMS(W) before the step
    options: AdafactorOptions,
    *,
    seed: int = 0,
    first_counter: int = 0,
) -> None:
    """One step of transformers' Adafactor without first moment, in fp32, rounded once.

    bf16 and fp16 weights are rounded stochastically. The random bits of an element follow from
    (seed, first_counter, its place): the same call gives the same bits with every launch
    configuration; it uses `counters_of(weight)` Philox counters from `first_counter` on.

    Traffic: the gradient is read twice (rows of more than 8,192 elements once
    more for each part, from a cache), the weight read
    and written once (read once more with `scale`). Memory: 8 bytes a column for every 16 to 256
    rows. Three launches; a vector takes two, up to 4,096 elements one.
    """
    _check(weight, grad, squares, found_inf, left_out, rms if options.scale else None)
    if not weight.numel():
        return
    rms = found_inf if rms is None else rms
    step = float(options.step)
    running = (options.step**options.decay, step, options.decay, options.eps)
    update = (options.lr, options.eps_scale, options.threshold, options.weight_decay)
    shared = (rms, found_inf, left_out)
    random = (seed, first_counter)
    with device_of(weight):
        if len(squares) == 1:
            _vector_step(weight, grad, squares[0], shared, running, update, random, options.scale)
        else:
            _matrix_step(weight, grad, squares, shared, running, update, random, options.scale)


def _matrix_step(weight, grad, squares, shared, running, update, random, scaled) -> None:
    rms, found_inf, left_out = shared
    R, C = weight.shape[-2:]
    M, numel = weight.numel() // (R * C), float(weight.numel())
    plan, blocks = plan_of(M, R, C), triton.cdiv(C, _COLUMNS)
    groups = M * plan.groups
    sizes = (M * R, groups, groups * plan.parts, 2 * groups * C, M, M * blocks)
    scratch = _Scratch(*_scratch(sizes, weight.device))
    _adafactor_statistics_kernel[(plan.parts, groups)](
        grad, weight, squares[0], scratch.rows, scratch.totals, scratch.squares, scratch.partials,
        found_inf, left_out, R, C, plan.groups, plan.rows, *running,
        SCALED=scaled, SPLIT=plan.parts > 1, BLOCK=plan.block,
        num_warps=plan.num_warps,
    )  # fmt: skip
    _adafactor_factors_kernel[(M, blocks)](
        squares[1], scratch.totals, scratch.squares, scratch.partials, scratch.means, scratch.sums,
        rms, found_inf, left_out, M, R, C, plan.groups, groups * plan.parts, numel, *running,
        SCALED=scaled, GROUPS=_PARTIALS, BLOCK=_COLUMNS, SUMS=_SUMS, num_warps=4,
    )  # fmt: skip
    rows = _TILES[plan.tile]
    _adafactor_update_kernel[(M * triton.cdiv(R, rows),)](
        weight, grad, squares[0], squares[1], scratch.rows, scratch.means, scratch.sums, rms,
        found_inf, left_out, R, C, M * blocks, numel, *update, *random,
        SCALED=scaled, ROWS=rows, BLOCK=plan.tile, SUMS=_SUMS, num_warps=_WARPS,
    )  # fmt: skip


def _vector_step(weight, grad, square, shared, running, update, random, scaled) -> None:
    size = weight.numel()
    programs = triton.cdiv(size, _VECTOR)
    alone = programs == 1
    (sums,) = (shared[0],) if alone else _scratch((2 * programs,), weight.device)
    for measures, updates in ((True, True),) if alone else ((True, False), (False, True)):
        _adafactor_vector_kernel[(programs,)](
            weight, grad, square, sums, *shared, size, programs, float(size), *running, *update,
            *random, MEASURES=measures, UPDATES=updates, SCALED=scaled, BLOCK=_VECTOR,
            SUMS=_SUMS, num_warps=_WARPS,
        )  # fmt: skip


def launches_of(weight: Tensor) -> int:
    """Kernels that a step of `weight` launches."""
    if not weight.numel():
        return 0
    return 3 if weight.dim() > 1 else 1 if weight.numel() <= _VECTOR else 2


def counters_of(weight: Tensor) -> int:
    """Philox counters that a step of `weight` uses: a row begins with a counter of its own."""
    if weight.dim() < 2:
        return -(-weight.numel() // LANES.value)
    columns = weight.shape[-1]
    return weight.numel() // max(columns, 1) * -(-columns // LANES.value)


def _check(weight, grad, squares, found_inf, left_out, rms) -> None:
    assert weight.dtype in TRITON_DTYPE, weight.dtype
    assert grad.dtype == weight.dtype, (grad.dtype, weight.dtype)
    assert grad.shape == weight.shape, (grad.shape, weight.shape)
    shape = weight.shape
    own = [shape] if len(shape) < 2 else [shape[:-1], shape[:-2] + shape[-1:]]
    assert [s.shape for s in squares] == own, ([s.shape for s in squares], own)
    singles = [found_inf, left_out] if rms is None else [found_inf, left_out, rms]
    for tensor in (*squares, *singles):
        assert tensor.dtype == torch.float32, tensor.dtype
    for tensor in (weight, grad, *squares, *singles):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.device == weight.device, (tensor.device, weight.device)
    assert all(single.numel() == 1 for single in singles)
    assert not (INTERPRETED.value and weight.is_cuda), "interpreted kernels need CPU tensors"
