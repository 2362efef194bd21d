"""Rows that are evaluated on and trained on, known by their tokens, however they came there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import xxhash

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_BLOCK = 1000  # rows that are in memory at a time


def count_shared(rows: Any, held_out: Any) -> int:
    """How many rows of `held_out` are in `rows`, too: prompt and completions of the same tokens.

    Labels do not count. Of 64-bit hashes: a pair of a million rows each is taken for equal where it
    is not once in ten million times.

    Args:
        rows, held_out: tokenised datasets of one kind, pairs or completions.
    """
    keys = list(_keys(held_out))
    wanted, found = {*keys}, set()
    for key in _keys(rows):
        if key in wanted:
            found.add(key)
            if len(found) == len(wanted):
                break
    return sum(key in found for key in keys)


def _keys(dataset: Any) -> Iterator[int]:
    """A hash of each row."""
    columns = [name for name in _IDS if name in dataset.column_names]
    table = dataset.with_format("arrow").select_columns(columns)
    for start in range(0, len(dataset), _BLOCK):
        block = table[start : start + _BLOCK]
        keys = [0] * len(block)
        for name in columns:
            ids = block[name].combine_chunks()
            values = ids.flatten()
            data = memoryview(values.to_numpy(zero_copy_only=False)).cast("B")
            ends = accumulate(ids.value_lengths().to_pylist(), initial=0)
            size = values.type.bit_width // 8
            keys = [
                xxhash.xxh3_64_intdigest(data[size * a : size * b], key)
                for key, (a, b) in zip(keys, pairwise(ends), strict=True)
            ]
        yield from keys
