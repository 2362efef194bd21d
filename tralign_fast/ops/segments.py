"""Sums over the tokens of each sequence of a packed row."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(
    values: Tensor,  # (N,) float32
    offsets: Tensor,  # (S + 1,) int64
) -> Tensor:
    """(S,) float32 sums of the values at [offsets[s], offsets[s + 1]), added up in fp64.

    Policy and reference are summed by this: equal log-probs of tokens have equal sums, whatever
    stands beside them in a batch.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0.0).float()


@torch.no_grad()
def pair_weights(
    logps: Tensor,  # (N,) float32
    log_sum_sq: Tensor,  # (N,) float32, log Σ_v p(v)² of each token's distribution
    offsets: Tensor,  # (2B + 1,) int64, B chosen, then B rejected
) -> Tensor:
    """(B,) float32 weights of pairs by their probability under the policy, without gradient.

    `exp(mean_t(log p(y_t) - log Σ_v p(v)²))` of the chosen times that of the rejected.

    Source: WPO, Zhou et al. 2024, arXiv 2406.11827, eq. 2.
    """
    lengths = offsets.diff().clamp(min=1)
    chosen, rejected = (segment_sums(logps - log_sum_sq, offsets) / lengths).exp().chunk(2)
    return chosen * rejected
