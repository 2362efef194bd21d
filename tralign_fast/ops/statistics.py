"""Statistics of next-token distributions, of which no loss takes a gradient."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from tralign_fast.ops.backend import device_kind
from tralign_fast.ops.transform import LogitTransform

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# A block of logits stays in the cache of a CPU; a GPU wants its products large.
_CPU_BLOCK_BYTES, _BLOCK_BYTES = 16 << 20, 256 << 20
_PLAIN = LogitTransform()


@torch.no_grad()
def token_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    wanted: Collection[str],
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = _PLAIN,
) -> dict[str, Tensor]:
    """What is wanted of `STATISTICS`, (N,) each, in fp32: one more product of the head.

    With z the scores of the softmax (`transform` of the logits) and p = softmax(z):

        entropy            -Σ p·log p, nats
        log_sum_sq_probs   log Σ p²
        mean_logits        the mean of z over the vocabulary
        is_top1            bool, whether the target has the largest score

    Memory: a block of rows of logits, 16 MB on a CPU, 256 MB elsewhere.
    """
    size = _CPU_BLOCK_BYTES if device_kind(hidden.device) == "cpu" else _BLOCK_BYTES
    rows = max(1, size // (4 * weight.shape[0]))
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for block, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        z = transform.apply_(F.linear(block, weight, bias).float())
        if "mean_logits" in wanted:
            parts["mean_logits"].append(z.mean(1))
        if "is_top1" in wanted:
            parts["is_top1"].append(z.argmax(1) == target)
        if "entropy" in wanted or "log_sum_sq_probs" in wanted:
            logsumexp = z.logsumexp(1)
            p = (z - logsumexp[:, None]).exp_()
            if "log_sum_sq_probs" in wanted:
                parts["log_sum_sq_probs"].append(p.square().sum(1).log_())
            if "entropy" in wanted:
                parts["entropy"].append(logsumexp - p.mul_(z).sum(1))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
