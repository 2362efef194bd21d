"""The two operations on a tile of logits, in PyTorch on any device.

Letters: N scored tokens, W columns of one vocabulary tile.

    forward    running logsumexp over the tiles, and the target's logit where its column falls
    backward   in place, logits → gradient of the logits

`tralign_kernels.logprob` has the same two, with the same signatures, in Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tralign_fast.ops.backend import device_kind, kernel
from tralign_fast.ops.cpu.row_blocks import row_blocks, row_buffers
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
            functools.partial(kernel("logprob_forward_"), **options),
            functools.partial(kernel("logprob_backward_"), **options),
        )
    return (
        functools.partial(tile_forward_, transform=transform),
        functools.partial(tile_backward_, transform=transform),
    )


def tile_forward_(
    logits: Tensor,  # (N, W)
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N,) float32, running
    target_logit: Tensor,  # (N,) float32
    *,
    transform: LogitTransform,
) -> None:
    """Folds the tile at columns [start, start + W) into `logsumexp`; notes the targets in it."""
    width = logits.shape[1]
    local = targets - start
    inside = (local >= 0) & (local < width)
    picked = logits.gather(1, local.clamp(0, width - 1)[:, None])[:, 0].float()
    picked = transform.to_scores_(picked)
    target_logit.copy_(torch.where(inside, picked, target_logit))

    def scores(rows: Tensor, buffer: Tensor) -> Tensor:
        if rows.dtype == torch.float32 and transform.is_identity:
            return rows
        return transform.to_scores_(buffer.copy_(rows))

    for rows, buffer in row_buffers(logits):
        running = logsumexp[rows]
        running.copy_(torch.logaddexp(running, _logsumexp(scores, logits[rows], buffer)))


def tile_backward_(
    logits: Tensor,  # (N, W), overwritten
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N,) float32
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
    for rows, z in row_blocks(logits, inplace=True):
        slope = transform.slope_of_cap(transform.to_scores_(z))
        z.sub_(logsumexp[rows, None]).exp_().mul_(-grad[rows, None])
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
    logsumexp: Tensor,  # (N,) float32
) -> None:
    """logits ← exp(logits), less exp(logsumexp) at the target: the gradient, but for `row_factor`.

    One pass over the tile in its own dtype; `tile_backward_` makes an fp32 copy and rounds that.
    """
    local = targets - start
    row = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    column = local[row]
    at_target = logits[row, column].float().exp_() - logsumexp[row].exp()
    logits.exp_()
    logits[row, column] = at_target.to(logits.dtype)


def row_factor(
    dtype: torch.dtype,
    logsumexp: Tensor,  # (N,) float32
    grad: Tensor,  # (N,) float32
    transform: LogitTransform,
) -> Tensor | None:
    """(N, 1) float32: what the rows that `tile_powers_` leaves are to be multiplied by, in the
    products or after them. None where `tile_backward_` is to be used: for other dtypes than bf16
    (fp16 ends at exp(11); in fp32 nothing is gained), for scores that are not the logits themselves
    and for logsumexps out of the ordinary.
    """
    plain = dtype == torch.bfloat16 and transform.is_identity
    if plain and device_kind(logsumexp.device) == "cpu" and _is_moderate(logsumexp):
        return (-grad * (-logsumexp).exp())[:, None]
    return None


def _logsumexp(
    scores: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,  # (rows, W)
    buffer: Tensor,  # (rows, W) float32
) -> Tensor:
    """(rows,) float32, of `scores(logits, buffer)`, which may lie in the buffer."""
    if device_kind(logits.device) == "cpu":
        found = torch.exp(scores(logits, buffer), out=buffer).sum(1).log_()
        if _is_moderate(found):
            return found
    z = scores(logits, buffer)
    return _softmax_(z if z is buffer else buffer.copy_(z))


def _is_moderate(logsumexp: Tensor) -> bool:
    """Whether powers may be taken as they are. Not on a GPU, where looking at it would stall."""
    low, high = torch.aminmax(logsumexp)
    return float(low) > _LOW and float(high) < _HIGH  # so written, NaN is not


def _softmax_(z: Tensor) -> Tensor:  # (rows, W) float32
    """z ← softmax(z, 1); returns the (rows,) logsumexp of what was there.

    One fused pass instead of four, and the logsumexp of a row follows from its largest probability,
    which is at least 1/W.
    """
    top = z.amax(1)
    # a row of -inf has no softmax; this makes it (1, 0, 0, …), and its logsumexp -inf
    z[:, 0] = torch.where(top == float("-inf"), 0.0, z[:, 0])
    torch.softmax(z, 1, out=z)
    return top - z.amax(1).log_()
