"""How the vocabulary is cut into tiles of logits, and the matrix products of a tile.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of a tile. The first tiles may be
kept from the forward for the backward, each in a place of its own; the others share a scratch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tralign_fast.ops.backend import device_kind
from tralign_fast.ops.cpu import onednn

# A CPU tile stays in the last-level cache between the product that makes it and the reduction that
# reads it, and memory peaks at a tile above the gradient. Products of half precision are so fast
# that they want larger tiles. A GPU wants its products as large as memory allows.
CPU_TILE_BYTES = {2: 16 << 20, 4: 4 << 20, 8: 4 << 20}  # by the size of an element
# Smaller products leave a GPU's processors without work: at N = 1,024 they are 64 programs' tiles.
SMALLEST_DEVICE_TILE_BYTES = 16 << 20
# Thinner products waste any hardware, however small the budget. By its rates (4.2 TB/s,
# 700 TFLOP/s) an H200 adds a tile's d hidden to the fp32 sum in the time that 280 columns take.
FEWEST_COLUMNS, FEWEST_DEVICE_COLUMNS = 256, 2048


def plan(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,  # bytes of logits that may exist at once
    *,
    wants_grad: bool,
    wants_all_or_none: bool,  # kept logits: a backward that reads all of them twice
    is_fused: bool,  # a forward that makes no logits but those that are kept
) -> tuple[int, int]:
    """(columns of a tile, columns whose logits are kept for the backward: whole tiles, or all)."""
    row_bytes = max(1, rows) * dtype.itemsize
    if device_kind(device) == "cpu":
        fewest, tile_bytes = FEWEST_COLUMNS, min(budget, CPU_TILE_BYTES[dtype.itemsize])
    else:
        fewest, tile_bytes = FEWEST_DEVICE_COLUMNS, max(budget, SMALLEST_DEVICE_TILE_BYTES)
    # multiples of 256: rows of any width are aligned to a few bytes, which costs loads and products
    tile = min(vocab, max(fewest, tile_bytes // row_bytes // 256 * 256))
    fitting = budget // row_bytes
    if not wants_grad or rows == 0:
        return tile, 0
    if fitting >= vocab:
        return tile, vocab
    if wants_all_or_none:
        return tile, 0
    # a forward that makes the other logits needs a tile for them
    return tile, max(0, fitting // tile - (not is_fused)) * tile


def cut(start: int, stop: int, tile: int) -> Iterator[tuple[int, int]]:
    """The tiles of the columns [start, stop)."""
    return ((first, min(first + tile, stop)) for first in range(start, stop, tile))


def view(kept: Tensor, scratch: Tensor, rows: int, start: int, stop: int, keep: int) -> Tensor:
    """The (N, W) tile: its own place among the kept logits, or the scratch that the rest shares."""
    if start < keep:
        return kept[rows * start : rows * stop].view(rows, stop - start)
    return scratch[: rows * (stop - start)].view(rows, stop - start)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, keep: bool) -> Tensor:
    """The (N, W) logits: in `out`, or in memory of their own, and in `out` too if it is to `keep`
    them."""
    weight = weight.to(x.dtype)
    if onednn.fits(x, weight, bias):  # has no way to write into a given tensor
        logits = onednn.product(x, weight, bias)
        if keep:
            out.copy_(logits)
        return logits
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


class Logits:
    """The logits of a backward, tile by tile: those that were kept, and those made again.

    Args:
        x: (N, H) hidden states in the dtype of the logits.
        weight, bias: of the head, (V, H) and (V,).
        kept: (N·K,), the logits of the first K columns: consumed, and their memory reused.
        tile: columns of a tile.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, tile: int
    ) -> None:
        self.x, self.weight, self.bias, self.kept = x, weight, bias, kept
        rows, vocab = len(x), len(weight)
        self.keep = kept.numel() // max(1, rows)  # columns
        self.parts = list(cut(0, vocab, tile))
        # kept logits that are consumed make room for those that are computed again
        self._scratch = kept if self.keep else self.new_tile()

    def new_tile(self) -> Tensor:
        """Memory of a tile's size."""
        return self.x.new_empty(len(self.x) * (self.parts[0][1] if self.parts else 0))

    def view(self, start: int, stop: int) -> Tensor:
        """The memory of a tile."""
        return view(self.kept, self._scratch, len(self.x), start, stop, self.keep)

    def of(self, start: int, stop: int) -> Tensor:
        """(N, W), overwritten by the next."""
        logits = self.view(start, stop)
        if start < self.keep:
            return logits
        part = None if self.bias is None else self.bias[start:stop]
        return project(self.x, self.weight[start:stop], part, logits, keep=False)


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with an fp32 total of half-precision products."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def product_into_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out ← a @ b, in out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
