"""What belongs to a prompt with one completion, in whatever batch or row it stands."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise

import xxhash


def ends_of(lengths: Sequence[int]) -> list[int]:
    """Where each of some lengths begins, and where the last one ends."""
    return [0, *accumulate(lengths)]


def sequence_keys(
    sequences: list[tuple[list[int], list[int]]],
    lengths: Sequence[int],
    weights: list[float] | None,
) -> tuple[int, ...]:
    """Of each (prompt, completion), whatever batch it stands in: 64 bits, signed."""
    keys = []
    for (prompt, completion), (start, end) in zip(
        sequences, pairwise(ends_of(lengths)), strict=True
    ):
        state = xxhash.xxh3_64(array("q", [len(prompt), *prompt, *completion]).tobytes())
        if weights is not None:
            state.update(repr(weights[start:end]).encode())
        keys.append(int.from_bytes(state.digest(), "big", signed=True))
    return tuple(keys)


def ld_weights(lengths: Sequence[int], alpha: float) -> list[float]:
    """Of scored tokens, all first completions in front: 1 up to the length of the pair's shorter
    completion, α beyond it."""
    pairs = len(lengths) // 2
    shared = [min(lengths[b], lengths[b + pairs]) for b in range(pairs)] * 2
    return [
        1.0 if place < common else alpha
        for length, common in zip(lengths, shared, strict=True)
        for place in range(length)
    ]


def fingerprint_of(keys: Sequence[int]) -> int:
    """Of the sequences of a batch, in their order."""
    return xxhash.xxh3_64_intdigest(array("q", keys).tobytes())
