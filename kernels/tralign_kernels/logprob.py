"""One tile of logits → running logsumexp and target logit; the tile → its gradient, in place.

Letters: N scored tokens (rows), V vocabulary, W columns of the tile: the vocabulary's columns
[start, start + W). A raw logit x becomes the score z of the softmax in fp32:

    s = x · logit_scale;  s = softcap · tanh(s / softcap) if softcap;  z = s · inverse_temperature

which the kernels compute with two constants, folded on the host in fp64 and rounded once:

    z = x · inner               inner = logit_scale · inverse_temperature
    z = tanh(x · inner) · outer inner = logit_scale / softcap, outer = softcap · inverse_temperature

A logsumexp is a pair of fp32 numbers, whose sum it is: the nearest one, and what that is off by.
Logits of 1,000 have a spacing of 6e-5, and so would their log-probs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import round_nearest
from .launch import Launch, backend, device_of, exp
from .statistics import distance_of, fold_statistics, moved_energy

# Both read (and the backward writes) 16 bytes a thread per load in bf16. Forward: one program walks
# a row, so a block must be wide enough to hide the one reduction over warps per block: 32 columns a
# thread. Backward: nothing is reduced; 16 columns a thread leave room for tanh. On an H200 at
# N = 4,096, V = 128,256 they moved 3.3 and 4.2 TB/s (3.0 and 4.0 with twice the warps), a copy 4.2,
# when the forward's loop took 13 instructions a column. It takes 10 since.
FORWARD_LAUNCH = {"cuda": Launch(block=4096, num_warps=4), "hip": Launch(block=4096, num_warps=8)}
# Three more numbers a column: a quarter of the columns a thread (80 registers on sm_90 with Triton
# 3.6; with half of them 138, which leave an SM 12 warps in place of 24).
STATISTICS_LAUNCH = {
    "cuda": Launch(block=2048, num_warps=8),
    "hip": Launch(block=4096, num_warps=8),
}
BACKWARD_LAUNCH = {"cuda": Launch(block=2048, num_warps=4), "hip": Launch(block=2048, num_warps=4)}

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def tanh_and_slope(u):
    """(tanh(u), 1 - tanh²(u)) in fp32, any u, relative errors under 2⁻²¹ and 2⁻²⁰ + |u|·2⁻²¹.

    Triton has no tanh that NVIDIA, AMD and the interpreter share. From ½ on it is made from
    r = 1 / (exp(2u) + 1), whose exp may overflow to inf: tanh = 1 - 2r, and the slope 4r(1 - r)
    keeps its digits where 1 - tanh² has none left. Below ½, 1 - 2r would cancel (an absolute 6e-8,
    2e-6 after a softcap of 30), hence an odd polynomial: a Chebyshev fit of (tanh(u) - u) / u³ in
    u² on [0, ½], whose own error is under 2⁻²⁴.
    """
    a = tl.abs(u)
    square = u * u
    small = 0.0179977858 * square - 0.0533904273
    small = (small * square + 0.133305059) * square - 0.333333114
    small = a + a * square * small
    r = 1.0 / (exp(2.0 * a) + 1.0)
    is_small = a < 0.5  # NaN is not, and exp keeps it
    magnitude = tl.where(is_small, small, 1.0 - 2.0 * r)
    slope = tl.where(is_small, 1.0 - small * small, 4.0 * r * (1.0 - r))
    return tl.where(u < 0.0, -magnitude, magnitude), slope


@triton.jit
def score(x, inner, outer, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        t, _ = tanh_and_slope(x * inner)
        z = t * outer
    else:
        z = x * inner
    return z


@triton.jit
def score_and_slope(x, inner, outer, SOFTCAP: tl.constexpr):
    """(z, dz/dx)"""
    if SOFTCAP:
        t, slope = tanh_and_slope(x * inner)
        z = t * outer
        slope *= inner * outer
    else:
        z = x * inner
        slope = inner
    return z, slope


@triton.jit
def store_logsumexp(logsumexp_ptr, row, pivot, rest, mask=None):
    """logsumexp[row] ← pivot + rest, as a pair."""
    high = pivot + rest
    # what rounding cut off (Knuth 1969, 4.2.2, theorem B); infinities have none
    part = high - pivot
    low = (pivot - (high - part)) + (rest - part)
    low = tl.where(tl.abs(high) < float("inf"), low, 0.0)
    tl.store(logsumexp_ptr + 2 * row, high, mask=mask)
    tl.store(logsumexp_ptr + 2 * row + 1, low, mask=mask)


@triton.jit
def fold_logsumexp(logsumexp_ptr, row, peak, mass, mask=None):
    """logsumexp[row] ← that of it and of a tile, whose largest score and mass these are.

    Returns the shares of all mass: (of what was there, of the tile).
    """
    high = tl.load(logsumexp_ptr + 2 * row, mask=mask)
    low = tl.load(logsumexp_ptr + 2 * row + 1, mask=mask)
    top = tl.maximum(peak, high)
    pivot = tl.where(top == -float("inf"), 0.0, top)
    new, old = mass * exp(peak - pivot), exp(high - pivot + low)
    store_logsumexp(logsumexp_ptr, row, pivot, tl.log(new + old), mask)
    divisor = tl.where(new + old == 0.0, 1.0, new + old)
    return old / divisor, new / divisor


@triton.jit
def _target_of(logits_ptr, targets_ptr, row, start, W, inner, outer, SOFTCAP: tl.constexpr):
    """(column in the tile or -1, whether it lies there, score)"""
    column = tl.load(targets_ptr + row) - start
    inside = (column >= 0) & (column < W)
    column = tl.where(inside, column, -1).to(tl.int32)
    x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return column, inside, score(x, inner, outer, SOFTCAP)


@triton.jit
def _beats(z, highest, column, first, target, target_score, BLOCK: tl.constexpr):
    """1 where an argmax would take a column of the block before the target, else 0.

    The block's highest score tells, but where columns on either side of the target are.
    """
    if (target >= first) & (target < first + BLOCK):
        better = (z > target_score) | ((z == target_score) & (column < target))
        found = tl.max(better.to(tl.int32), axis=0)
    else:
        same = (highest == target_score) & (first < target)
        found = ((highest > target_score) | same).to(tl.int32)
    return found


@triton.jit(do_not_specialize=["start", "statistics_stride"])
def _logprob_forward_kernel(
    logits_ptr,  # (N, W)
    targets_ptr,  # (N,) int64
    logsumexp_ptr,  # (N, 2) fp32, running
    target_logit_ptr,  # (N,) fp32
    start,
    W,
    row_stride,
    inner,
    outer,
    statistics_ptr,  # (5, N) fp32, running
    statistics_stride,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    # the maximum is one number a row, the sum one a column of the block: the sum is reduced over
    # the threads once a row instead of once a block
    peak = -float("inf")
    mass = tl.zeros((BLOCK,), tl.float32)
    if STATISTICS:
        target, has_target, target_score = _target_of(
            logits_ptr, targets_ptr, row, start, W, inner, outer, SOFTCAP
        )
        energy = tl.zeros((BLOCK,), tl.float32)  # Σ exp(z - pivot) · (z - pivot)
        squares = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        beaten = 0  # not 0 once an argmax would take another column before the target
    for first in range(0, W, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < W
        x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = score(x, inner, outer, SOFTCAP)
        if STATISTICS:
            total += z  # 0 beside the tile
        z = tl.where(inside, z, -float("inf"))
        # maxima skip NaN, the sum below does not
        highest = tl.max(z, axis=0)
        new_peak = tl.maximum(peak, highest)
        # a row of -inf so far: exp(-inf - 0) = 0, where exp(-inf + inf) would be NaN
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        scale, power = exp(peak - pivot), exp(z - pivot)
        if STATISTICS:
            own = power * distance_of(z, pivot)
            energy = moved_energy(energy, mass, peak, pivot) + own
            squares = squares * (scale * scale) + power * power
            beaten |= _beats(z, highest, column, first, target, target_score, BLOCK)  # pyright: ignore[reportOperatorIssue]
        mass = mass * scale + power
        peak = new_peak

    tile_mass = tl.sum(mass, axis=0)
    before, new = fold_logsumexp(logsumexp_ptr, row, peak, tile_mass)
    if (
        not STATISTICS
    ):  # else it is known before the loop, where it would take registers for nothing
        _, has_target, target_score = _target_of(
            logits_ptr, targets_ptr, row, start, W, inner, outer, SOFTCAP
        )
    tl.store(target_logit_ptr + row, target_score, mask=has_target)
    if STATISTICS:
        fold_statistics(
            statistics_ptr + row,
            statistics_stride.to(tl.int64),
            before,
            new,
            tile_mass,
            tl.sum(energy, axis=0),
            tl.sum(squares, axis=0),
            peak,
            has_target & (beaten == 0),
            tl.sum(total, axis=0),
        )


@triton.jit(do_not_specialize=["start"])
def _logprob_backward_kernel(
    logits_ptr,  # (N, W), overwritten
    targets_ptr,  # (N,) int64
    logsumexp_ptr,  # (N, 2) fp32
    grad_ptr,  # (N,) fp32
    start,
    W,
    row_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # columns vary fastest, so that programs that run together touch memory that lies together
    blocks = tl.cdiv(W, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < W
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row) - start
    high, low = tl.load(logsumexp_ptr + 2 * row), tl.load(logsumexp_ptr + 2 * row + 1)
    grad = tl.load(grad_ptr + row)
    x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = score_and_slope(x, inner, outer, SOFTCAP)
    at_target = tl.where(column == target, 1.0, 0.0)
    result = grad * (at_target - exp(z - high - low)) * slope
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    tl.store(logits_ptr + column, round_nearest(result, dtype), mask=inside)


def logprob_forward_(
    logits: Tensor,  # (N, W) fp32, bf16 or fp16, unit column stride, any row stride
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32, read and written
    target_logit: Tensor,  # (N,) float32, written where the target lies in the tile
    statistics: Tensor | None = None,  # (5, N) float32, read and written
    **transform: float | None,  # of `fold`
) -> None:
    """Folds the tile into the running `logsumexp`; notes the targets that lie in it.

    In PyTorch, with z the scores of the tile in fp32 (see the module):

        logsumexp.copy_(torch.logaddexp(logsumexp, z.logsumexp(1)))  # of the sum of each pair
        inside = (targets >= start) & (targets < start + W)
        target_logit[inside] = z[inside, targets[inside] - start]

    After the last tile the log-probs are `target_logit - logsumexp[:, 0] - logsumexp[:, 1]`. The
    caller fills `logsumexp` with (-inf, 0) and `target_logit` with NaN before the first, so that a
    target outside the vocabulary gives NaN. A logit of -inf is a masked column; NaN or +inf make
    the row's log-prob NaN. (A softcap makes ±inf finite.) Traffic: the logits are read once.

    The rows of `statistics`, of the columns so far: the entropy of their softmax, Σ p², the largest
    score, 1 where that is the target's (the first column of several that are equal), Σ z. The
    caller fills them with zeros, the third with -inf.
    """
    N, _ = _check_tile(logits, targets, logsumexp, target_logit)
    assert logsumexp.is_contiguous(), logsumexp.stride()
    assert target_logit.is_contiguous(), target_logit.stride()
    # One program per row: the sum needs no second pass nor atomics, and the thousands of rows of a
    # training step fill a GPU (132 SMs on an H100).
    launches = FORWARD_LAUNCH if statistics is None else STATISTICS_LAUNCH
    if statistics is not None:
        check_statistics(statistics, N)
    _launch(
        _logprob_forward_kernel, N, launches[backend()],
        (logits, targets, logsumexp, target_logit), start, transform,
        statistics_ptr=logsumexp if statistics is None else statistics,  # any pointer, not read
        statistics_stride=0 if statistics is None else statistics.stride(0),
        STATISTICS=statistics is not None,
    )  # fmt: skip


def logprob_backward_(
    logits: Tensor,  # (N, W) fp32, bf16 or fp16, unit column stride, any row stride; overwritten
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32, over all V columns
    grad: Tensor,  # (N,) float32, gradient of the log-probs
    **transform: float | None,  # of `fold`
) -> None:
    """logits ← d(Σₙ grad[n] · logprob[n]) / d(logits), logprob = z[target - start] - logsumexp.

    In PyTorch, with z the scores of the tile in fp32 (see the module):

        onehot = arange(start, start + W) == targets[:, None]
        logits.copy_(grad[:, None] * (onehot - exp(z - logsumexp.sum(1)[:, None])) * dz/dx)

    with dz/dx = logit_scale · inverse_temperature, times 1 - tanh²(x · logit_scale / softcap) if
    softcap. fp32 inside, rounded once. A target outside the tile has no onehot there. Traffic: the
    logits are read and written once.
    """
    N, W = _check_tile(logits, targets, logsumexp, grad)
    launch = BACKWARD_LAUNCH[backend()]
    # A program per row and block of columns, because nothing is reduced: a few hundred rows fill a
    # GPU too. One axis of the grid, because the others end at 65,535 on NVIDIA.
    programs = N * triton.cdiv(W, launch.block)
    assert programs < 2**31, (N, W)
    _launch(
        _logprob_backward_kernel, programs, launch,
        (logits, targets, logsumexp.contiguous(), grad.contiguous()),  # a sum's is expanded
        start, transform,
    )  # fmt: skip


def _launch(
    kernel: Any,
    programs: int,
    launch: Launch,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # logits, targets, logsumexp, a vector
    start: int,
    transform: dict[str, float | None],
    **more: Any,
) -> None:
    """Either kernel: they take the same arguments, and the forward some more."""
    logits, targets, logsumexp, vector = tensors
    inner, outer, softcap = fold(**transform)  # pyright: ignore[reportArgumentType]
    if logits.numel() == 0:
        return
    with device_of(logits):
        kernel[(programs,)](
            logits,
            targets.contiguous(),
            logsumexp,
            vector,
            start,
            logits.shape[1],
            logits.stride(0),
            inner,
            outer,
            **more,
            SOFTCAP=softcap,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )


def fold(
    logit_scale: float = 1.0, softcap: float | None = None, inverse_temperature: float = 1.0
) -> tuple[float, float, bool]:
    """(inner, outer, SOFTCAP) of the module's second form; floats, for Triton types an int as an
    integer."""
    if softcap is None:
        return float(logit_scale * inverse_temperature), 1.0, False
    return float(logit_scale / softcap), float(softcap * inverse_temperature), True


def _check_tile(
    logits: Tensor, targets: Tensor, logsumexp: Tensor, vector: Tensor
) -> tuple[int, int]:
    N, W = logits.shape
    assert logits.dtype in DTYPES, logits.dtype
    assert W <= 1 or logits.stride(1) == 1, logits.stride()
    check_vector(targets, N, torch.int64)
    check_logsumexp(logsumexp, N)
    check_vector(vector, N, torch.float32)
    return N, W


def check_vector(vector: Tensor, N: int, dtype: torch.dtype) -> None:
    assert vector.shape == (N,), (vector.shape, N)
    assert vector.dtype == dtype, (vector.dtype, dtype)


def check_logsumexp(logsumexp: Tensor, N: int) -> None:
    assert logsumexp.shape == (N, 2), (logsumexp.shape, N)
    assert logsumexp.dtype == torch.float32, logsumexp.dtype


def check_statistics(statistics: Tensor, N: int) -> None:
    assert statistics.shape == (5, N), (statistics.shape, N)
    assert statistics.dtype == torch.float32, statistics.dtype
    assert statistics.stride(1) == 1 or N == 1, statistics.stride()


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """Every configuration that the launchers can launch on `backend`, as `ema.aot_configurations`.

    Aligned: W and the row stride are multiples of 16, as with nearly every vocabulary and tile; the
    other (GPT-2's 50,257) loads column by column.
    """
    kinds = (
        (_logprob_forward_kernel, FORWARD_LAUNCH, False),
        (_logprob_forward_kernel, STATISTICS_LAUNCH, True),
        (_logprob_backward_kernel, BACKWARD_LAUNCH, False),
    )
    return [
        _configuration(fn, launches[backend], statistics, dtype, softcap, aligned)
        for fn, launches, statistics in kinds
        for dtype in DTYPES.values()
        for softcap in (False, True)
        for aligned in (True, False)
    ]


def _configuration(
    fn: Any, launch: Launch, statistics: bool, dtype: str, softcap: bool, aligned: bool
) -> dict[str, Any]:
    N, W = 2048, 128_256 if aligned else 50_257  # the vocabularies of Llama 3 and GPT-2
    backward = fn is _logprob_backward_kernel
    name = f"{fn.__name__.strip('_').removesuffix('_kernel')} {dtype}"
    name += " statistics" * statistics + " softcap" * softcap + " unaligned" * (not aligned)
    constexprs: dict[str, Any] = {"SOFTCAP": softcap}
    signature = {
        "logits_ptr": f"*{dtype}",
        "targets_ptr": "*i64",
        "logsumexp_ptr": "*fp32",
        "grad_ptr" if backward else "target_logit_ptr": "*fp32",
        **dict.fromkeys(("start", "W", "row_stride"), "i32"),
        **dict.fromkeys(("inner", "outer"), "fp32"),
    }
    divisible = (0, 1, 2, 3, 5, 6) if aligned else (0, 1, 2, 3)
    if not backward:
        constexprs["STATISTICS"] = statistics
        signature |= {"statistics_ptr": "*fp32", "statistics_stride": "i32"}
        divisible = (*divisible, 9)
    constexprs["BLOCK"] = launch.block
    return {
        "name": name,
        "fn": fn,
        "signature": {**signature, **dict.fromkeys(constexprs, "constexpr")},
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in divisible},
        "options": {"num_warps": launch.num_warps},
        "shape": f"N={N} W={W}",
        **traffic(backward, N, W, 4 if dtype == "fp32" else 2, launch.block, statistics),
    }


def traffic(
    backward: bool, N: int, W: int, size: int, block: int, statistics: bool = False
) -> dict[str, int]:
    """Bytes that a kernel asks for (caches serve some), and that any kernel must."""
    if backward:  # four numbers a row, again for every block of columns
        tile, vectors = 2 * N * W * size, N * (8 + 8 + 4)
        return {"moved": tile + triton.cdiv(W, block) * vectors, "minimum": tile + vectors}
    tile, vectors = N * W * size, N * (8 + 8 + 8 + 4 + statistics * 5 * (4 + 4))
    return {"moved": tile + N * size + vectors, "minimum": tile + vectors}  # the target: twice


def logprob_naive(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64; outside [0, V): no target
    grad: Tensor,  # (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inverse_temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp (N,), target_logit (N,), d logits (N, V)) in `dtype`, in plain PyTorch.

    Over the whole vocabulary, the gradient by autograd: that the kernels' tiles add up to it is for
    the tests to show.
    """
    x = logits.detach().to(dtype).requires_grad_()
    z = x * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * inverse_temperature
    inside = (targets >= 0) & (targets < logits.shape[1])
    picked = z.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]
    logsumexp = z.logsumexp(1)
    logprob = torch.where(inside, picked, 0.0) - logsumexp
    (d_logits,) = torch.autograd.grad(logprob, x, grad.to(dtype))
    target_logit = torch.where(inside, picked, float("nan"))
    return logsumexp.detach(), target_logit.detach(), d_logits
