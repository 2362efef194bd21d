"""The gradients of the LM head's inputs, to which every tile of logits adds its part.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of one vocabulary tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tralign_fast.ops import powers, tiles
from tralign_fast.ops.tile_ops import row_factor, tile_ops, tile_powers_
from tralign_fast.ops.transform import LogitTransform


@dataclass(frozen=True)
class Saved:
    """What a forward leaves to its backward, beside the kept logits."""

    x: Tensor  # (N, H) hidden states in the dtype of the logits
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64
    logsumexp: Tensor  # (N, 2) float32
    transform: LogitTransform
    backend: str
    logps: Tensor | None = None  # (N,), where powers are kept

    def logits(self, kept: Tensor, tile: int) -> tiles.Logits:
        if self.logps is None:
            return tiles.Logits(self.x, self.weight, self.bias, kept, tile)
        made = powers.Powers(
            self.x, self.weight, self.bias, kept, tile, self.targets, self.logsumexp,
            self.transform,
        )  # fmt: skip
        made.logps = self.logps
        return made


class HeadGradients:
    """d hidden, d weight and d bias, None where not needed.

    d weight is written tile by tile, each in one product over all N tokens, in the weight's dtype;
    d hidden is summed over the tiles in fp32.

    Args:
        saved: of the forward.
        grad: (N,) float32, of the log-probs.
        needs: gradient of hidden, of weight, of bias.
        one_part: all columns are added at once: no sum that wants fp32.
        all_columns: every column of the vocabulary is written; else those that are not stay zero.
    """

    def __init__(
        self, saved: Saved, grad: Tensor, needs: list[bool], *, one_part: bool, all_columns: bool
    ) -> None:
        self.saved, self.grad = saved, grad
        x, weight = saved.x, saved.weight
        new = weight.new_empty if all_columns else weight.new_zeros
        self.weight = new(weight.shape) if needs[1] else None
        self.bias = new(weight.shape[0]) if needs[2] else None
        self._one_part = one_part
        if not needs[0]:
            self.hidden = None
        elif one_part:
            self.hidden = torch.empty_like(x, memory_format=torch.contiguous_format)
        else:
            self.hidden = x.new_zeros(x.shape, dtype=torch.float32)
        _, self._tile_backward_ = tile_ops(saved.backend, saved.transform)
        # powers leave a factor of each row to the products
        self._factor = _factor_of(saved, grad)
        self._scaled = x if self._factor is None or not needs[1] else self._factor.times(x)
        self._column = None if self._factor is None or not needs[2] else self._factor.column()

    def add_(
        self,
        logits: Tensor,  # (N, W), overwritten
        targets: Tensor,  # (N,)
        start: int,  # what a target of the first of the logits is
        columns: slice | Tensor,  # of the vocabulary
    ) -> None:
        """The part of these columns."""
        if self._factor is None:
            self._tile_backward_(logits, targets, start, self.saved.logsumexp, self.grad)
        elif self.saved.logps is None:
            tile_powers_(logits, targets, start, self.saved.logsumexp)
        if self.hidden is not None:
            add_product_ = tiles.product_into_ if self._one_part else tiles.accumulate_
            add_product_(self.hidden, logits, self.saved.weight[columns].to(logits.dtype))
        if self.weight is not None and isinstance(columns, slice):
            tiles.product_into_(self.weight[columns], logits.t(), self._scaled)
        elif self.weight is not None:
            self.weight[columns] = (logits.t() @ self._scaled).to(self.weight.dtype)
        if self.bias is not None:
            if self._column is None:
                sums = logits.sum(0, dtype=torch.float32)
            else:
                sums = self._column[:, 0].to(logits.dtype) @ logits
            self.bias[columns] = sums.to(self.bias.dtype)

    def add_rank_one_(self, share: Tensor, q: Tensor) -> None:  # (N,), (V,) float32
        """The part of logits whose gradient is `outer(share, q)`; after `scale_`."""
        x, weight = self.saved.x, self.saved.weight
        if self.hidden is not None:
            self.hidden.addr_(share, (q.to(weight.dtype) @ weight).float())
        if self.weight is not None:
            self.weight.addr_(q.to(weight.dtype), (share.to(x.dtype) @ x).to(weight.dtype))
        if self.bias is not None:
            self.bias.add_(q * share.sum())

    def scale_(self) -> None:
        """What the products left to do; once, after the last tile."""
        if self._factor is not None and self.hidden is not None:
            self._factor.scale_(self.hidden)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(d hidden in `dtype`, d weight, d bias), empty where not needed."""
        hidden, weight, bias = (
            self.saved.weight.new_empty(0) if t is None else t
            for t in (self.hidden, self.weight, self.bias)
        )
        return hidden.to(dtype), weight, bias


class _TorchFactor:
    """As `powers.RowFactor`, in PyTorch."""

    def __init__(self, factor: Tensor) -> None:  # (N, 1) float32
        self._factor = factor

    def times(self, rows: Tensor) -> Tensor:
        return (rows * self._factor).to(rows.dtype)

    def scale_(self, rows: Tensor) -> None:
        rows.mul_(self._factor)

    def column(self) -> Tensor:
        return self._factor


def _factor_of(saved: Saved, grad: Tensor) -> powers.RowFactor | _TorchFactor | None:
    if saved.logps is not None:
        return powers.RowFactor(saved.logsumexp, grad, saved.transform)
    if saved.backend != "torch":
        return None
    factor = row_factor(saved.x.dtype, saved.logsumexp, grad, saved.transform)
    return None if factor is None else _TorchFactor(factor)
