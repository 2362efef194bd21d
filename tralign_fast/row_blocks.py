"""Blocks of rows of a tile of logits, each with an fp32 buffer that stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 8 MB of fp32. Blocks of 1 MB are as fast on idle cores, but every block is a few parallel regions,
# and where another process takes a core each of them waits for a thread that is not running: five
# times slower with one busy neighbour. A GPU wants large blocks.
_ELEMENTS = {"cpu": 1 << 21}
_DEVICE_ELEMENTS = 1 << 26


def row_blocks(logits: Tensor, *, inplace: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Rows of (N, W) and a copy of them in fp32, (rows, W); all blocks share one memory.

    A buffer that is allocated anew for each block costs more than what is computed in it: its pages
    go back to the system and are mapped again. With `inplace`, fp32 logits are their own "copy".
    """
    rows, width = logits.shape
    step = max(1, _ELEMENTS.get(logits.device.type, _DEVICE_ELEMENTS) // max(1, width))
    own = inplace and logits.dtype == torch.float32
    buffer = logits if own else logits.new_empty(min(step, rows), width, dtype=torch.float32)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, logits[block] if own else buffer[: block.stop - start].copy_(logits[block])
