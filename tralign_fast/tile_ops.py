"""The two operations on a tile of logits, in PyTorch on any device.

Letters: N scored tokens, W columns of one vocabulary tile.

    forward    running logsumexp over the tiles, and the target's logit where its column falls
    backward   in place, logits → gradient of the logits

`tralign_kernels.logprob` has the same two, with the same signatures, in Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tralign_fast.row_blocks import row_blocks


def tile_ops(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """(forward, backward) of a backend."""
    if backend == "triton":
        from tralign_kernels import logprob_backward_, logprob_forward_

        return logprob_forward_, logprob_backward_
    return tile_forward_, tile_backward_


def tile_forward_(
    logits: Tensor,  # (N, W)
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N,) float32, running
    target_logit: Tensor,  # (N,) float32
    *,
    logit_scale: float,
    softcap: float | None,
    inverse_temperature: float,
    consume: bool = False,  # nobody reads the logits again: compute in their place
) -> None:
    """Folds the tile at columns [start, start + W) into `logsumexp`; notes the targets in it."""
    width = logits.shape[1]
    local = targets - start
    inside = (local >= 0) & (local < width)
    picked = logits.gather(1, local.clamp(0, width - 1)[:, None])[:, 0].float()
    picked = to_scores_(picked, logit_scale, softcap, inverse_temperature)
    target_logit.copy_(torch.where(inside, picked, target_logit))
    for rows, z in row_blocks(logits, inplace=consume):
        to_scores_(z, logit_scale, softcap, inverse_temperature)
        running = logsumexp[rows]
        running.copy_(torch.logaddexp(running, _softmax_(z)))


def tile_backward_(
    logits: Tensor,  # (N, W), overwritten
    targets: Tensor,  # (N,) int64
    start: int,
    logsumexp: Tensor,  # (N,) float32
    grad: Tensor,  # (N,) float32
    *,
    logit_scale: float,
    softcap: float | None,
    inverse_temperature: float,
) -> None:
    """logits ← grad · d(z[target] - logsumexp)/d(logits), in place, fp32 inside."""
    width = logits.shape[1]
    local = targets - start
    inside = (local >= 0) & (local < width)
    local = local.clamp(0, width - 1)[:, None]
    at_target = torch.where(inside, grad, 0.0)[:, None]
    chain = logit_scale * inverse_temperature
    for rows, z in row_blocks(logits, inplace=True):
        to_scores_(z, logit_scale, softcap, inverse_temperature)
        slope = None
        if softcap is not None:
            slope = 1 - (z / (softcap * inverse_temperature)).square_()
        # softmax over the tile, times the tile's part of the whole: p = exp(z - logsumexp)
        share = (_softmax_(z) - logsumexp[rows]).exp_()
        z.mul_((-grad[rows] * share)[:, None])
        z.scatter_add_(1, local[rows], at_target[rows])
        if slope is not None:
            z.mul_(slope)
        if chain != 1.0:
            z.mul_(chain)
        if logits.dtype != z.dtype:
            logits[rows] = z


def _softmax_(z: Tensor) -> Tensor:  # (rows, W) float32
    """z ← softmax(z, 1); returns the (rows,) logsumexp of what was there.

    One fused pass instead of four, and the logsumexp of a row follows from its largest probability,
    which is at least 1/W. On two cores twice as fast as max, subtract, exp and sum.
    """
    top = z.amax(1)
    # a row of -inf has no softmax; this makes it (1, 0, 0, …), and its logsumexp -inf
    z[:, 0] = torch.where(top == float("-inf"), 0.0, z[:, 0])
    torch.softmax(z, 1, out=z)
    return top - z.amax(1).log_()


def to_scores_(
    z: Tensor, logit_scale: float, softcap: float | None, inverse_temperature: float
) -> Tensor:
    """Raw logits (fp32) to the softmax's scores: scale (Cohere, Granite), softcap (Gemma),
    temperature; in place."""
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap * inverse_temperature)
    chain = logit_scale * inverse_temperature
    return z if chain == 1.0 else z.mul_(chain)
