"""The two operations on a tile of logits, in PyTorch on any device.

Letters: N scored tokens, W columns of one vocabulary tile.

    forward    running logsumexp over the tiles, and the target's logit where its column falls
    backward   in place, logits → gradient of the logits

`tralign_kernels.logprob` has the same two, with the same signatures, in Triton.

A logsumexp is a pair of fp32 numbers, whose sum it is: the nearest one, and what that is off by.
Logits of 1,000 have a spacing of 6e-5, and so would their log-probs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops.backend import device_kind, kernel
from tralign_fast.ops.cpu.row_blocks import row_blocks, row_buffers
from tralign_fast.ops.statistics import RunningStatistics, merged_shares
from tralign_fast.ops.transform import LogitTransform

# Between these logsumexps (those of language models lie between 5 and 40) exp(z) stands for itself,
# without a maximum to subtract: sums neither overflow nor lose more than 1e-25 of themselves.
_LOW, _HIGH = -30.0, 60.0


def tile_ops(
    backend: str, transform: LogitTransform
) -> tuple[Callable[..., None], Callable[..., None]]:
    """(forward, backward) of a backend, for such scores."""
    if backend == "triton":
        options = transform.kernel_options()
        return (
            functools.partial(_triton_forward_, kernel("logprob_forward_"), options),
            functools.partial(kernel("logprob_backward_"), **options),
        )
    return (
        functools.partial(tile_forward_, transform=transform),
        functools.partial(tile_backward_, transform=transform),
    )


def _triton_forward_(
    launch: Callable[..., None],
    options: dict[str, Any],
    *arguments: Any,
    statistics: RunningStatistics | None = None,
) -> None:
    launch(*arguments, statistics=None if statistics is None else statistics.table, **options)


def new_logsumexp(rows: int, device: torch.device) -> Tensor:
    """(N, 2) float32, of no column so far."""
    logsumexp = torch.zeros(rows, 2, dtype=torch.float32, device=device)
    logsumexp[:, 0] = float("-inf")
    return logsumexp


def log_probs(target_logit: Tensor, logsumexp: Tensor) -> Tensor:  # (N,), (N, 2)
    """(N,), after the last tile."""
    return (target_logit - logsumexp[:, 0]).sub_(logsumexp[:, 1])


def tile_forward_(
    logits: Tensor,  # (N, W)
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32, running
    target_logit: Tensor,  # (N,) float32
    *,
    transform: LogitTransform,
    statistics: RunningStatistics | None = None,
) -> None:
    """Folds the tile at columns [start, start + W) into `logsumexp` (and into the statistics);
    notes the targets in it."""
    width = logits.shape[1]
    local = targets - start
    inside = (local >= 0) & (local < width)
    local = local.clamp(0, width - 1)
    picked = logits.gather(1, local[:, None])[:, 0].float()
    picked = transform.apply_(picked)
    target_logit.copy_(torch.where(inside, picked, target_logit))

    def scores(rows: Tensor, buffer: Tensor) -> Tensor:
        if rows.dtype == torch.float32 and transform.is_identity:
            return rows
        return transform.apply_(buffer.copy_(rows))

    high, low = torch.zeros(2, len(logits), dtype=torch.float32, device=logits.device)
    for rows, buffer in row_buffers(logits):
        note = None if statistics is None else (statistics, rows)
        _logsumexp_(scores, logits[rows], buffer, high[rows], low[rows], note)
    before = logsumexp.clone() if statistics is not None else logsumexp
    fold_(logsumexp, high, low)
    if statistics is not None:
        shares = merged_shares(before, high, low, logsumexp)
        statistics.fold(logits, local, inside, picked, shares)


def tile_backward_(
    logits: Tensor,  # (N, W), overwritten
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32
    grad: Tensor,  # (N,) float32
    *,
    transform: LogitTransform,
) -> None:
    """logits ← grad · d(z[target] - logsumexp)/d(logits), in place, fp32 inside."""
    width = logits.shape[1]
    local = targets - start
    inside = (local >= 0) & (local < width)
    local = local.clamp(0, width - 1)[:, None]
    at_target = torch.where(inside, grad, 0.0)[:, None]
    high, low = logsumexp.split(1, 1)
    share = low.neg().exp_().mul_(-grad[:, None])
    for rows, z in row_blocks(logits, inplace=True):
        slope = transform.slope_of_cap(transform.apply_(z))
        z.sub_(high[rows]).exp_().mul_(share[rows])
        z.scatter_add_(1, local[rows], at_target[rows])
        if slope is not None:
            z.mul_(slope)
        if transform.factor != 1.0:
            z.mul_(transform.factor)
        if logits.dtype != z.dtype:
            logits[rows] = z


def tile_powers_(
    logits: Tensor,  # (N, W), overwritten
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N, 2) float32
) -> None:
    """logits ← exp(logits), less exp(logsumexp) at the target: the gradient, but for `row_factor`.

    One pass over the tile in its own dtype; `tile_backward_` makes an fp32 copy and rounds that.
    """
    local = targets - start
    row = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    column = local[row]
    at_target = logits[row, column].float().exp_() - logsumexp[row, 0].exp()
    logits.exp_()
    logits[row, column] = at_target.to(logits.dtype)


def row_factor(
    dtype: torch.dtype,
    logsumexp: Tensor,  # (N, 2) float32
    grad: Tensor,  # (N,) float32
    transform: LogitTransform,
) -> Tensor | None:
    """(N, 1) float32: what the rows that `tile_powers_` leaves are to be multiplied by, in the
    products or after them. None where `tile_backward_` is to be used: for other dtypes than bf16
    (fp16 ends at exp(11); in fp32 nothing is gained), for scores that are not the logits themselves
    and for logsumexps out of the ordinary.
    """
    plain = dtype == torch.bfloat16 and transform.is_identity
    if plain and device_kind(logsumexp.device) == "cpu" and _is_moderate(logsumexp[:, 0]):
        return (-grad * (-logsumexp[:, 0]).exp())[:, None]
    return None


def _logsumexp_(
    scores: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,  # (rows, W)
    buffer: Tensor,  # (rows, W) float32
    high: Tensor,  # (rows,) float32, written
    low: Tensor,  # (rows,) float32 zeros, written
    note: tuple[RunningStatistics, slice] | None,  # where to note statistics, of which rows
) -> None:
    """high + low ← the logsumexp of `scores(logits, buffer)`, which may lie in the buffer."""
    if device_kind(logits.device) == "cpu" and _moderate_logsumexp_(
        scores(logits, buffer), buffer, high, note
    ):
        return
    z = scores(logits, buffer)
    z = z if z is buffer else buffer.copy_(z)
    if note is None:
        _softmax_(z, high, low)
        return
    statistics, rows = note
    statistics.add_scores(rows, z)
    _softmax_(z, high, low)
    statistics.add_probs(rows, z)


def _moderate_logsumexp_(
    z: Tensor,  # (rows, W) float32
    buffer: Tensor,  # (rows, W) float32, written
    high: Tensor,  # (rows,) float32, written
    note: tuple[RunningStatistics, slice] | None,
) -> bool:
    """high ← the logsumexp of scores, statistics noted; False if `_softmax_` has to make them."""
    if note is None:
        torch.sum(torch.exp(z, out=buffer), 1, out=high).log_()
        return _is_moderate(high)
    statistics, rows = note
    powers = torch.exp(z, out=statistics.spare(buffer) if z is buffer else buffer)
    mass = powers.sum(1)
    torch.log(mass, out=high)
    return _is_moderate(high) and statistics.add_powers(rows, z, powers, mass)


def fold_(logsumexp: Tensor, high: Tensor, low: Tensor) -> None:  # (N, 2), (N,), (N,)
    """logsumexp ← that of both."""
    old_high, old_low = logsumexp.unbind(1)
    top = torch.maximum(old_high, high).clamp_(min=torch.finfo(torch.float32).min)
    rest = torch.logaddexp((old_high - top).add_(old_low), (high - top).add_(low))
    torch.add(top, rest, out=old_high)
    # what rounding cut off (Dekker 1971); a row of -inf has nothing
    old_low.copy_((top - old_high).add_(rest).nan_to_num_(nan=0.0))


def _is_moderate(logsumexp: Tensor) -> bool:
    """Whether powers may be taken as they are. Not on a GPU, where looking at it would stall."""
    low, high = torch.aminmax(logsumexp)
    return float(low) > _LOW and float(high) < _HIGH  # so written, NaN is not


def _softmax_(
    z: Tensor,  # (rows, W) float32
    high: Tensor,  # (rows,) float32, written
    low: Tensor,  # (rows,) float32, written
) -> None:
    """z ← softmax(z, 1); high + low ← the logsumexp of what was there.

    One fused pass instead of four, and the logsumexp of a row follows from its largest probability,
    which is at least 1/W.
    """
    torch.amax(z, 1, out=high)
    # a row of -inf has no softmax; this makes it (1, 0, 0, …), and its logsumexp -inf
    z[:, 0] = torch.where(high == float("-inf"), 0.0, z[:, 0])
    torch.softmax(z, 1, out=z)
    torch.amax(z, 1, out=low)
    low.log_().neg_()
