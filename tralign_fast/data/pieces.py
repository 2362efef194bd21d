"""Groups that are longer than a process's share, cut over all processes that divide a batch.

Every process computes its piece of a cut group's tokens, and its attention asks the others for
their keys and values. A prompt and each completion are cut by themselves, into 2·P runs for P
processes, of which process p has the runs p and 2·P-1-p: a late query sees more keys than an early
one, and so all processes have the same causal work, and as many tokens to score.

A process's row is `[its pieces of all cut groups | its whole groups]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from torch import Tensor

from tralign_fast.data.layout import (
    CutGroups,
    Group,
    Pair,
    PrefixLayout,
    Segment,
    Tokens,
    fill_up,
    int64,
    lay_packed,
)


@dataclass(frozen=True)
class ScoredPieces:
    """How the log-probs of a batch's sequences come together from all processes."""

    group: str  # the process group's name
    targets: Tensor  # (n,) int64, what this process's scored rows predict
    grad_tokens: int  # the first so many of them want a gradient
    sent: Tensor  # (m,) int64, those of them that belong to cut groups
    width: int  # most that a process sends
    index: Tensor  # (N,) int64, of [this process's n | P·width gathered]: the batch's tokens


@dataclass(frozen=True)
class Cut:
    """The examples of one packed row of several processes."""

    place: int  # this process, of
    count: int
    group: str
    prompts: list[Pair]  # of the cut examples
    completions: list[Pair]
    whole_prompts: list[Pair]  # of this process's own
    whole_completions: list[Pair]


def lay_pieces(
    cut: Cut,
    order: Sequence[tuple[bool, int]],
    paired: bool,
    share: bool,
    pad: int,
    multiple: int,
) -> tuple[Tokens, list[int], ScoredPieces]:
    """This process's row, the rows of it that are scored, and how their log-probs become those of
    the batch's sequences.

    Args:
        order: the examples of the batch: whether one is cut, and its place among such.
        paired: all completions want a gradient, and not the first of each example alone.
        share, pad, multiple: as in `lay_packed`.
    """
    full = lay_packed(cut.prompts, cut.completions, share, pad, 1)
    rest = lay_packed(cut.whole_prompts, cut.whole_completions, share, pad, 1)
    assert full.layout is not None
    assert rest.layout is not None
    held = _deal(full.layout.groups, cut.count)
    own = held[cut.place][0]
    n = len(own)
    ids = [*np.asarray(full.input_ids[0])[own].tolist(), *rest.input_ids[0]]
    positions = [*np.asarray(full.position_ids[0])[own].tolist(), *rest.position_ids[0]]
    groups = list(rest.layout.groups)
    missing = fill_up(ids, positions, groups, pad, multiple, offset=n)
    pieces = _cut_groups(cut, full.layout.groups, held)
    layout = PrefixLayout(tuple(groups), missing, cut=pieces)
    scored, joined = _scored(cut, full, rest, held, order, paired)
    return Tokens([ids], [positions], None, layout, {}), scored, joined


def _deal(groups: Sequence[Group], count: int) -> list[tuple[np.ndarray, list[Segment]]]:
    """For each process, its rows of the full row in its order, and the segments that they are."""
    rows: list[list[np.ndarray]] = [[] for _ in range(count)]
    segments: list[list[Segment]] = [[] for _ in range(count)]
    turn = sequence = 0
    for start, prompt, completions in groups:
        spans = [(start, prompt, sequence, 0)]
        for k, length in enumerate(completions):
            spans.append((start + prompt + sum(completions[:k]), length, sequence + k, prompt))
        for begin, length, of, before in spans:
            bounds = [0, *accumulate(_runs(length, count, turn))]
            turn = (turn + length) % count
            for p in range(count):
                for run in (p, 2 * count - 1 - p):
                    low, high = bounds[run], bounds[run + 1]
                    rows[p].append(np.arange(begin + low, begin + high))
                    _append(segments[p], of, before + low, before + high)
        sequence += len(completions)
    return [(np.concatenate(r), s) for r, s in zip(rows, segments, strict=True)]


def _runs(length: int, count: int, turn: int) -> list[int]:
    """2·count lengths that add up; what is left over goes to the processes in turn, so that over
    all spans they have the same number of tokens, or one more."""
    base, left = divmod(length, 2 * count)
    runs = [base] * (2 * count)
    for j in range(left):
        p = (turn + j) % count
        runs[p if j < count else 2 * count - 1 - p] += 1
    return runs


def _append(segments: list[Segment], sequence: int, low: int, high: int) -> None:
    """Tokens [low, high) of a sequence, as one segment with those before where they run on."""
    if low == high:
        return
    if segments and segments[-1].sequence == sequence and segments[-1].keys == low:
        segments[-1] = Segment(sequence, segments[-1].queries + high - low, high)
    else:
        segments.append(Segment(sequence, high - low, high))


def _cut_groups(
    cut: Cut, groups: Sequence[Group], held: Sequence[tuple[np.ndarray, list[Segment]]]
) -> CutGroups:
    own, segments = held[cut.place]
    width = max(len(rows) for rows, _ in held)
    gathered = np.zeros(sum(len(rows) for rows, _ in held), dtype=np.int64)
    for p, (rows, _) in enumerate(held):
        gathered[rows] = p * width + np.arange(len(rows))
    index, first, again = [], np.zeros(cut.count * width, dtype=np.int64), {}
    lengths: list[int] = []
    can_be_scored = np.zeros(len(gathered), dtype=bool)
    at = 0  # of the keys so far
    for start, prompt, completions in groups:
        can_be_scored[start + max(prompt - 1, 0) : start + prompt + sum(completions)] = True
        shared, begin = gathered[start : start + prompt], start + prompt
        for k, length in enumerate(completions):
            mine = gathered[begin : begin + length]
            places = np.arange(at, at + prompt)
            if k == 0:
                first[shared] = places
            else:
                again.setdefault(k, []).append((shared, places))
            first[mine] = np.arange(at + prompt, at + prompt + length)
            index += [shared, mine]
            lengths.append(prompt + length)
            begin, at = begin + length, at + prompt + length
    return CutGroups(
        cut.group, len(own), width, tuple(segments), tuple(lengths), np.concatenate(index), first,
        tuple(
            (np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
            for pairs in again.values()
        ),
        np.flatnonzero(can_be_scored[own]),
    )  # fmt: skip


def _scored(
    cut: Cut,
    full: Tokens,
    rest: Tokens,
    held: Sequence[tuple[np.ndarray, list[Segment]]],
    order: Sequence[tuple[bool, int]],
    paired: bool,
) -> tuple[list[int], ScoredPieces]:
    """The rows that this process scores, all first completions in front, and where the tokens of
    the batch's sequences are then."""
    tokens = sum(len(piece) for piece, _ in held)
    holder, local = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=np.int64)
    for p, (piece, _) in enumerate(held):
        holder[piece], local[piece] = p, np.arange(len(piece))
    n = len(held[cut.place][0])
    rows: list[int] = []
    targets: list[int] = []
    sent: list[int] = []
    sends = [0] * cut.count
    where: dict[tuple[bool, int, int], list[tuple[int, int]]] = {}  # (holder, place) of each token
    grad = 0
    copies = len((cut.completions or cut.whole_completions)[0])
    for k in range(copies):
        for b, pair in enumerate(cut.completions):
            found = where[True, b, k] = []
            predicted = full.scored[b, k]
            for row, target in zip(
                predicted, pair[k][len(pair[k]) - len(predicted) :], strict=True
            ):
                p = int(holder[row])
                found.append((p, sends[p]))
                sends[p] += 1
                if p == cut.place:
                    sent.append(len(rows))
                    rows.append(int(local[row]))
                    targets.append(target)
        for b, pair in enumerate(cut.whole_completions):
            predicted = rest.scored[b, k]
            where[False, b, k] = [(-1, len(rows) + i) for i in range(len(predicted))]
            rows += [n + row for row in predicted]
            targets += pair[k][len(pair[k]) - len(predicted) :]
        if k == 0 or paired:
            grad = len(rows)
    width = max(sends)
    index = [
        place if p < 0 else len(rows) + p * width + place
        for k in range(copies)
        for is_cut, b in order
        for p, place in where[is_cut, b, k]
    ]
    joined = ScoredPieces(cut.group, int64(targets), grad, int64(sent), width, int64(index))
    return rows, joined
