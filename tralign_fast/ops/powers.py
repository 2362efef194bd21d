"""Powers of the scores kept for the backward, in place of logits (Triton, bf16).

The head's product stores exp(score - shift) as it goes, and the backward's two products take it
without a pass over it: equations and kernels are in `tralign_kernels.linear_powers`. Columns that
are not kept are made again as powers, too.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops import tiles
from tralign_fast.ops.backend import kernel, warn_once
from tralign_fast.ops.tile_ops import log_probs
from tralign_fast.ops.transform import LogitTransform

KEPT = ("logits", "powers")
# Rows of 16 elements' multiples: what TMA and 16-byte loads can address.
_ALIGNED = 16


def keeps_powers(
    kept: str,
    wants_grad: bool,
    backend: str,
    dtype: torch.dtype,
    weight: Tensor,  # (V, H)
    transform: LogitTransform,
    others: dict[str, Any],  # options with which logits are needed
) -> bool:
    """Whether powers are kept as asked; where they cannot be, one notice.

    Without a gradient nothing is kept, and it tells whether the same kernels run.

    Raises:
        ValueError: a word that is none of `KEPT`.
    """
    check_kept(kept)
    if kept == "logits":
        return False
    needed = what_needs_logits(transform, others)
    if backend != "triton":
        reason = f"the {backend} backend keeps logits"
    elif dtype != torch.bfloat16:
        reason = f"{dtype} has not the range, bfloat16 has"
    elif any(size % _ALIGNED for size in weight.shape):
        reason = (
            f"vocabulary and hidden size are {tuple(weight.shape)}, not multiples of {_ALIGNED}"
        )
    elif needed:
        reason = f"{needed} needs logits"
    else:
        return True
    if wants_grad:
        warn_once(f'linear_logprobs: kept="powers" keeps logits here: {reason}')
    return False


def check_kept(kept: str) -> None:
    """Raises ValueError for a word that is none of `KEPT`."""
    if kept not in KEPT:
        raise ValueError(f"linear_logprobs: kept must be one of {', '.join(KEPT)}, got {kept!r}")


def what_needs_logits(transform: LogitTransform, others: dict[str, Any]) -> str:
    """Names of the options given that do, "" for none."""
    softcap = {"softcap": transform.softcap is not None}
    return ", ".join(name for name, given in (others | softcap).items() if given)


def forward_(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N, 2), of no column so far
    target_logit: Tensor,  # (N,)
    kept: Tensor,  # (N·K,), written: the powers of the first K columns
    tile: int,
    transform: LogitTransform,
    statistics: Tensor | None = None,  # (5, N) float32, of no column so far
) -> Tensor:
    """(N,) the log-probs; and logsumexp and statistics of all columns, powers of the first."""
    forward = kernel("linear_logprob_forward_")
    options = transform.kernel_options()
    x = aligned(x)
    rows, vocab = len(targets), len(weight)
    keep = kept.numel() // rows
    for start, stop in tiles.cut(0, keep, tile):
        powers = tiles.view(kept, kept, rows, start, stop, keep)
        part, part_bias = _part(weight, bias, start, stop, x.dtype)
        forward(
            x, part, targets, start, logsumexp, target_logit, bias=part_bias, powers=powers,
            statistics=statistics, **options,
        )  # fmt: skip
    # a weight of another dtype (autocast) is converted tile by tile, never as a whole
    for start, stop in tiles.cut(keep, vocab, vocab if weight.dtype == x.dtype else tile):
        part, part_bias = _part(weight, bias, start, stop, x.dtype)
        forward(
            x, part, targets, start, logsumexp, target_logit, bias=part_bias,
            statistics=statistics, **options,
        )  # fmt: skip
    if keep == 0:  # nothing to repair
        return log_probs(target_logit, logsumexp)
    again = Powers(x, weight, bias, kept, tile, targets, logsumexp, transform)
    again.logps = log_probs(target_logit, logsumexp)
    for start, stop in tiles.cut(0, keep, tile):
        again.make_(start, stop, again.view(start, stop), repair=True)
    return again.logps


class Powers(tiles.Logits):
    """`tiles.Logits`, of powers: those that were kept, and those made again."""

    logps: Tensor  # (N,)

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        tile: int,
        targets: Tensor,
        logsumexp: Tensor,  # (N, 2) over all columns
        transform: LogitTransform,
    ) -> None:
        super().__init__(x, weight, bias, kept, tile)
        self._targets, self._logsumexp = targets, logsumexp
        self._options = transform.kernel_options()

    def make_(self, start: int, stop: int, powers: Tensor, repair: bool = False) -> None:
        part, bias = _part(self.weight, self.bias, start, stop, self.x.dtype)
        kernel("linear_powers_")(
            self.x, part, self._targets, start, self._logsumexp, self.logps, powers,
            repair=repair, bias=bias, **self._options,
        )  # fmt: skip

    def of(self, start: int, stop: int) -> Tensor:
        powers = self.view(start, stop)
        if start >= self.keep:
            self.make_(start, stop, powers)
        return powers


class RowFactor:
    """The factor of each row that powers leave to the products of a backward."""

    def __init__(self, logsumexp: Tensor, grad: Tensor, transform: LogitTransform) -> None:
        self._arguments = logsumexp, grad, transform.factor

    def times(self, rows: Tensor) -> Tensor:  # (N, H) of any dtype
        return self._scale(torch.empty_like(rows), rows)

    def scale_(self, rows: Tensor) -> None:
        self._scale(rows, rows)

    def column(self) -> Tensor:
        """(N, 1) float32"""
        grad = self._arguments[1]
        ones = torch.ones_like(grad)[:, None]
        return self._scale(ones, ones)

    def _scale(self, scaled: Tensor, rows: Tensor) -> Tensor:
        kernel("scale_rows_")(scaled, rows, *self._arguments)
        return scaled


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that the kernels' wide loads can address; allocators align memory."""
    if matrix.stride(1) == 1 and (matrix.storage_offset() | matrix.stride(0)) % _ALIGNED == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _part(
    weight: Tensor, bias: Tensor | None, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    part = aligned(weight[start:stop].to(dtype))
    return part, None if bias is None else bias[start:stop].to(dtype).contiguous()
