"""Of what data a run is, told from its tokenised rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
from datasets.fingerprint import Hasher

_READ = 200_000  # rows of a dataset that are read to tell it from another
_BLOCK = 500  # of them lie together: a disk is not asked for single rows


def digest(dataset: Any) -> str | None:
    """Of a tokenised dataset, the same in every process; None for a stream.

    Up to `_READ` rows all count, wherever the dataset's memory or cache lies (100,000 pairs of 480
    tokens: 0.3 s). Of a larger one: its size, and blocks of rows spread evenly over it.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    size = len(dataset)
    starts = range(0, size, _BLOCK)
    every = -(-size // _READ)
    table = dataset.with_format("arrow")
    contents = [repr((size, sorted(dataset.features.items())))]
    for start in sorted({*starts[:: every or 1], *starts[-1:]}):
        rows = table[start : start + _BLOCK]
        columns = [rows[name].combine_chunks() for name in sorted(rows.column_names)]
        contents.append(Hasher.hash_bytes([part for c in columns for part in _contents(c)]))
    return Hasher.hash_bytes("".join(contents).encode())


def _contents(values: Any) -> Iterator[Any]:
    """Bytes of what an Arrow array holds, however it stores it (offsets, slices, spare room)."""
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        yield from _contents(values.value_lengths())
        yield from _contents(values.flatten())
    elif _is_plain(values):
        yield values.to_numpy(zero_copy_only=False).data
    else:
        yield repr(values.to_pylist()).encode()


def _is_plain(values: Any) -> bool:
    kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    return values.null_count == 0 and any(kind(values.type) for kind in kinds)
