"""Statistics of next-token distributions, of which no loss takes a gradient.

They come with the log-probs, from the tiles of logits that the head's forward has anyway.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of one vocabulary tile.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from tralign_fast.ops.backend import device_kind
from tralign_fast.ops.transform import LogitTransform

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Rows of a table of running statistics, as `tralign_kernels.logprob` writes them too.
ENTROPY, SQUARES, PEAK, TOP1, TOTAL = range(5)


class RunningStatistics:
    """Statistics of the columns seen so far, to which every tile of logits is added.

    `table` (5, N) float32 has, of the softmax over these columns: its entropy, Σ p², the largest
    score, whether that is the target's (the first column of several that are equal), Σ of scores.

    Args:
        wanted: names of `STATISTICS`; what none of them needs is not computed (Triton: all is).
        hidden: (N, H), of the scored tokens.
        transform: of logits to scores.
        backend: "torch" or "triton".
    """

    def __init__(
        self, wanted: Collection[str], hidden: Tensor, transform: LogitTransform, backend: str
    ) -> None:
        rows = len(hidden)
        self.wanted, self.transform = tuple(wanted), transform
        self.table = torch.zeros(5, rows, dtype=torch.float32, device=hidden.device)
        self.table[PEAK] = float("-inf")
        self._on_cpu = device_kind(hidden.device) == "cpu"
        # Σ over the vocabulary of hidden · weight is hidden · Σ weight: fewer sums for many tokens,
        # of weights that the product has just brought into the cache
        self._sums_weight = (
            backend == "torch" and transform.softcap is None and rows > hidden.shape[1]
        )
        self._weight_sum, self._bias_sum = None, 0.0
        self._tile = torch.zeros_like(self.table) if backend == "torch" else self.table[:, :0]
        self._spare = self.table.new_empty(0)

    def see_weight(self, weight: Tensor, bias: Tensor | None) -> None:  # (W, H), (W,)
        """The head's rows of a tile."""
        if self._sums_weight and "mean_logits" in self.wanted:
            total = weight.sum(0, dtype=torch.float32)
            self._weight_sum = total if self._weight_sum is None else self._weight_sum.add_(total)
            if bias is not None:
                self._bias_sum = bias.sum(dtype=torch.float32) + self._bias_sum

    def columns(self, hidden: Tensor) -> Tensor:  # (N, H)
        """`table` after the last tile, complete."""
        if self._weight_sum is not None:
            total = hidden.float() @ self._weight_sum + self._bias_sum
            self.table[TOTAL] = total * self.transform.factor
        return self.table

    # --- the PyTorch backend's tiles --------------------------------------------------------------

    def spare(self, like: Tensor) -> Tensor:
        """A second fp32 buffer of a block's shape, the same memory for all."""
        if self._spare.numel() < like.numel():
            self._spare = torch.empty_like(like).view(-1)
        return self._spare[: like.numel()].view_as(like)

    def add_powers(
        self,
        rows: slice,
        z: Tensor,  # (rows, W) float32 scores
        powers: Tensor,  # (rows, W) exp(z), overwritten
        mass: Tensor,  # (rows,) their sums
    ) -> bool:
        """Notes a block of a tile; False if a score of -inf spoils it."""
        tile = self._tile[:, rows]
        self._add_scores(tile, z)
        if "log_sum_sq_probs" in self.wanted:
            torch.linalg.vector_norm(powers, 2, 1, out=tile[SQUARES])
            tile[SQUARES].div_(mass).square_()
        if "entropy" in self.wanted:
            torch.sum(powers.mul_(z), 1, out=tile[ENTROPY])
            torch.sub(mass.log(), tile[ENTROPY].div_(mass), out=tile[ENTROPY])
            return math.isfinite(float(tile[ENTROPY].sum()))
        return True

    def add_scores(self, rows: slice, z: Tensor) -> None:  # (rows, W) float32
        """Notes a block of a tile, but for what `add_probs` does."""
        self._add_scores(self._tile[:, rows], z)

    def add_probs(self, rows: slice, p: Tensor) -> None:  # (rows, W) softmax, overwritten
        tile = self._tile[:, rows]
        if "log_sum_sq_probs" in self.wanted:
            torch.linalg.vector_norm(p, 2, 1, out=tile[SQUARES])
            tile[SQUARES].square_()
        if "entropy" in self.wanted:
            torch.sum(torch.special.entr(p, out=p), 1, out=tile[ENTROPY])

    def _add_scores(self, tile: Tensor, z: Tensor) -> None:
        if "is_top1" in self.wanted:
            torch.amax(z, 1, out=tile[PEAK])
        if "mean_logits" in self.wanted and not self._sums_weight:
            torch.sum(z, 1, out=tile[TOTAL])

    def fold(
        self,
        logits: Tensor,  # (N, W)
        local: Tensor,  # (N,) the targets' columns in the tile, any where it is not `inside`
        inside: Tensor,  # (N,) bool
        picked: Tensor,  # (N,) float32, the scores there
        shares: tuple[Tensor, Tensor],  # (N,) of the mass: of the columns so far, of the tile
    ) -> None:
        """Adds the tile whose blocks were noted."""
        table, tile, (before, new) = self.table, self._tile, shares
        if "entropy" in self.wanted:
            # of a mixture of two distributions that share no column
            table[ENTROPY].mul_(before).sub_(torch.xlogy(before, before))
            table[ENTROPY].addcmul_(new, tile[ENTROPY]).sub_(torch.xlogy(new, new))
        if "log_sum_sq_probs" in self.wanted:
            table[SQUARES].mul_(before.square()).addcmul_(new.square(), tile[SQUARES])
        if "is_top1" in self.wanted:
            is_first = self._is_first_peak(logits, local, inside & (picked >= tile[PEAK]))
            higher = tile[PEAK] > table[PEAK]
            table[TOP1] = torch.where(higher, is_first.float(), table[TOP1])
            table[PEAK] = torch.maximum(table[PEAK], tile[PEAK])
        if "mean_logits" in self.wanted and not self._sums_weight:
            table[TOTAL] += tile[TOTAL]

    def _is_first_peak(self, logits: Tensor, local: Tensor, is_peak: Tensor) -> Tensor:
        """(N,) bool: whether no column before the target's has the same score."""
        if self._on_cpu:  # in the few rows whose target is the tile's largest
            # at most 256 kB at once: in a model that has learned its targets they are all rows
            few = max(1, (1 << 16) // max(1, logits.shape[1]))
            for rows in is_peak.nonzero()[:, 0].split(few):
                places = self.transform.apply_(logits[rows].float()).argmax(1)
                is_peak[rows] = places == local[rows]
            return is_peak
        step = max(1, (1 << 26) // max(1, logits.shape[1]))
        places = [
            self.transform.apply_(part.to(torch.float32, copy=True)).argmax(1)
            for part in logits.split(step)
        ]
        return is_peak & (torch.cat(places) == local)


def named_statistics(
    wanted: Collection[str],
    table: Tensor,  # (5, N) float32
    columns: int,  # of which it is
) -> Tensor:
    """(number wanted, N) float32."""
    found = {
        "entropy": lambda: table[ENTROPY],
        "log_sum_sq_probs": lambda: table[SQUARES].log(),
        "mean_logits": lambda: table[TOTAL] / columns,
        "is_top1": lambda: table[TOP1],
    }
    return torch.stack([found[name]() for name in wanted])


def merged_tables(
    tables: Tensor,  # (R, 5, N) float32, of R parts of the vocabulary, in its order
    shares: Tensor,  # (R, N) float32, the parts' shares of the mass
) -> Tensor:
    """(5, N) float32, of all columns."""
    entropy = (shares * tables[:, ENTROPY] - torch.xlogy(shares, shares)).sum(0)
    squares = (shares.square() * tables[:, SQUARES]).sum(0)
    highest = tables[:, PEAK].argmax(0, keepdim=True)  # the first of several
    peak, top1 = (tables[:, row].gather(0, highest)[0] for row in (PEAK, TOP1))
    return torch.stack([entropy, squares, peak, top1, tables[:, TOTAL].sum(0)])


def merged_shares(
    before: Tensor,  # (N, 2) logsumexp of the columns so far
    high: Tensor,  # (N,) that of a tile
    low: Tensor,
    after: Tensor,  # (N, 2) of both
) -> tuple[Tensor, Tensor]:
    """(N,) each: the shares of the mass that both have."""
    total = after[:, 0].clamp(min=torch.finfo(torch.float32).min)  # a row of -inf: shares of zero
    rest = after[:, 1]
    return (
        (before[:, 0] - total).add_(before[:, 1]).sub_(rest).exp_(),
        (high - total).add_(low).sub_(rest).exp_(),
    )
