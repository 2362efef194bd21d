"""Which examples of a batch fall to which of several processes that all get the same rows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

# A cut costs traffic in every layer: the fullest process may have so much of an even share before
# a group is cut, and groups shorter than half a share never are.
_SLACK = 1.125
_SHORT = 0.5


class Shares(NamedTuple):
    """Places of a batch's examples.

    An example that is cut has its tokens on all processes. Its loss is computed by one of them, its
    owner.
    """

    cut: list[int]
    whole: list[list[int]]  # for each process, in order
    owned: list[list[int]]  # of `cut`, for each process, in order


def share_out(
    sizes: Sequence[int], rows: Sequence[int], count: int, whole_because: str | None = None
) -> Shares:
    """Examples to processes: the largest first, to whom has the fewest tokens.

    Where one is longer than an even share, the longest are cut over all processes, until the
    fullest has an eighth more than that share at most or what is whole is shorter than half of it.

    Args:
        sizes: tokens of each example.
        rows: their rows of the dataset.
        count: of the processes.
        whole_because: why none can be cut, as a clause; None: they can.
    """
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    even = sum(sizes) / count
    if sizes[longest] > even and whole_because is not None:
        _warn_of_long_group(rows[longest], sizes[longest], sum(sizes), count, whole_because)
    cut: list[int] = []
    whole = deal_out(sizes, count)
    # fewer than two tokens for each process are not worth a cut
    if whole_because is None and sizes[longest] > even:
        by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        able = [i for i in by_size if sizes[i] >= max(2 * count, _SHORT * even)]
        while len(cut) < len(able) and _fullest(sizes, cut, whole, count) > _SLACK * even:
            cut.append(able[len(cut)])
            rest = [i for i in range(len(sizes)) if i not in cut]
            dealt = deal_out([sizes[i] for i in rest], count)
            whole = [[rest[i] for i in own] for own in dealt]
    owned: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(cut):
        least = min(range(count), key=lambda p: len(whole[p]) + len(owned[p]))
        owned[least].append(place)
    return Shares(sorted(cut), whole, owned)


def _fullest(
    sizes: Sequence[int], cut: Sequence[int], whole: Sequence[Sequence[int]], count: int
) -> float:
    """Tokens of the process that has most."""
    pieces = sum(sizes[i] for i in cut) / count
    return pieces + max(sum(sizes[i] for i in own) for own in whole)


def deal_out(sizes: Sequence[int], shares: int, room: int | None = None) -> list[list[int]]:
    """Places in `sizes`, in order, in shares of about equal sums: the largest first, each to the
    share with the least that has room for one more."""
    held: list[list[int]] = [[] for _ in range(shares)]
    sums = [0] * shares
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        free = (s for s in range(shares) if room is None or len(held[s]) < room)
        least = min(free, key=sums.__getitem__)
        held[least].append(place)
        sums[least] += sizes[place]
    return [sorted(own) for own in held]


_long_groups = itertools.count()


def _warn_of_long_group(row: int, tokens: int, total: int, count: int, why: str) -> None:
    if next(_long_groups) == 0:  # one such row is named, and no other
        warnings.warn(
            f"row {row} has {tokens} tokens, more than the {total // count} that fall to each of "
            f"{count} processes that divide its batch: one of them computes it, and the others "
            f"wait, because {why}",
            stacklevel=2,
        )
