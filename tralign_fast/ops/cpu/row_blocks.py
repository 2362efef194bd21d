"""Blocks of rows of a tile of logits, each with an fp32 buffer that stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tralign_fast.ops.backend import device_kind

# 4 MB of fp32, the caches of two cores. Smaller blocks are up to 8% faster on idle cores, but every
# block is a few parallel regions, and where another process takes a core each of them waits for a
# thread that is not running. A GPU wants large blocks.
_ELEMENTS = {"cpu": 1 << 20}
_DEVICE_ELEMENTS = 1 << 26


def row_blocks(logits: Tensor, *, inplace: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Rows of (N, W) and a copy of them in fp32, (rows, W); all blocks share one memory.

    With `inplace`, fp32 logits are their own "copy".
    """
    if inplace and logits.dtype == torch.float32:
        for block in _slices(logits):
            yield block, logits[block]
    else:
        for block, buffer in row_buffers(logits):
            yield block, buffer.copy_(logits[block])


def row_buffers(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of (N, W) and an fp32 buffer of their shape, (rows, W); all blocks share one memory.

    A buffer that is allocated anew for each block costs more than what is computed in it: its pages
    go back to the system and are mapped again.
    """
    blocks = list(_slices(logits))
    width = logits.shape[1]
    buffer = logits.new_empty(blocks[0].stop if blocks else 0, width, dtype=torch.float32)
    for block in blocks:
        yield block, buffer[: block.stop - block.start]


def _slices(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(1, _ELEMENTS.get(device_kind(logits.device), _DEVICE_ELEMENTS) // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
