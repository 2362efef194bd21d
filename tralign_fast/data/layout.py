"""Where the tokens of examples stand: in one packed row, or in a padded row each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LONGEST_BIAS = 1 << 16  # numbers that are kept for the layers of a step

Pair = list[list[int]]  # token ids of the completions of one example, or of their prompts


class Group(NamedTuple):
    """A prompt and its completions in the packed row; all numbers in tokens."""

    start: int
    prompt: int
    completions: tuple[int, ...]


class KeyGather(NamedTuple):
    """Keys of all sequences from a packed row's tokens, and the way back for their gradients."""

    key_index: Tensor  # (keys,) int64: the packed row's tokens, those of prompts repeated
    first: Tensor  # (T,) int64: where a token stands first among the keys
    # where tokens stand again, (tokens, keys) int64: of all second completions, all third, …
    again: tuple[tuple[Tensor, Tensor], ...]


class Segment(NamedTuple):
    """Queries one behind the other in the row, which see the first `keys` tokens of a sequence:
    causal when aligned at the bottom right."""

    sequence: int  # of `CutGroups.sequences`
    queries: int
    keys: int


@dataclass
class CutGroups:
    """What attention has to know of groups of which this process has pieces (`data.pieces`); host
    integers, and what they imply."""

    group: str  # the process group's name
    tokens: int  # of this process's pieces, the first of the row
    width: int  # most tokens of a process: keys are gathered from P·width rows
    segments: tuple[Segment, ...]  # of this process's queries, in order
    sequences: tuple[int, ...]  # tokens of each [prompt | completion] of all cut groups
    key_index: np.ndarray  # (sum of sequences,) of the gathered rows, prompts repeated
    first: np.ndarray  # (P·width,) where a gathered row stands first among the keys
    again: tuple[tuple[np.ndarray, np.ndarray], ...]  # as in `KeyGather`
    scored: np.ndarray  # rows of the pieces that can be scored
    _cache: dict[Any, KeyGather] = field(default_factory=dict, compare=False, repr=False)

    def gather(self, device: torch.device) -> KeyGather:
        """How the sequences' keys are made of the gathered rows, made once a batch."""
        if device not in self._cache:
            self._cache[device] = KeyGather(
                _on(self.key_index, device),
                _on(self.first, device),
                tuple((_on(a, device), _on(b, device)) for a, b in self.again),
            )
        return self._cache[device]


class VarlenArguments(NamedTuple):
    """What a variable-length attention kernel takes, as flash-attn names it."""

    cu_seqlens_q: Tensor  # (sequences + 1,) int32
    cu_seqlens_k: Tensor  # (sequences + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    # as in `KeyGather`
    key_index: Tensor
    first: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]


@dataclass  # not frozen: torch 2.10 compiles a layer anew for every content of a frozen one
class PrefixLayout:
    """Where prompts and completions lie in the packed row; host integers, and what they imply.

    Pieces of groups that several processes share (`data.pieces`) come before the groups, whose
    starts are counted from the end of the pieces.

    The first completion of a group runs on from its prompt: `[prompt | completion 0]` is one causal
    sequence. Every further completion is a sequence of queries whose keys are
    `[prompt | completion]`, causal when aligned at the bottom right.
    """

    groups: tuple[Group, ...]
    padding: int = 0  # tokens of the last group, where it only fills the row up
    # whether the last MLP runs on all rows, as a load-balancing loss of its router wants it
    every_row: bool = False
    cut: CutGroups | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def varlen(self, device: torch.device) -> VarlenArguments:
        """Sequence bounds and key gather for flash-attn's varlen interface, made once a batch."""
        if device not in self._cache:
            queries, keys, index = [0], [0], []
            first, again = [], defaultdict(lambda: ([], []))
            length = 0  # of the keys so far
            for start, prompt, completions in self.groups:
                shared, begin = np.arange(start, start + prompt), start + prompt
                for k, own in enumerate(completions):
                    queries.append(prompt + own if k == 0 else own)
                    keys.append(prompt + own)
                    end = length + prompt
                    first.append(np.arange(length if k == 0 else end, end + own))
                    if k > 0:
                        again[k][0].append(shared)
                        again[k][1].append(np.arange(length, end))
                    index += [shared, np.arange(begin, begin + own)]
                    begin, length = begin + own, end + own
            self._cache[device] = VarlenArguments(
                torch.tensor(list(accumulate(queries)), dtype=torch.int32).to(device),
                torch.tensor(list(accumulate(keys)), dtype=torch.int32).to(device),
                max(queries),
                max(keys),
                _joined(index).to(device),
                _joined(first).to(device),
                tuple(
                    (_joined(tokens).to(device), _joined(places).to(device))
                    for tokens, places in again.values()
                ),
            )
        return self._cache[device]

    def bounds(self, queries: int, keys: int, device: torch.device) -> VarlenArguments:
        """Of one sequence whose keys stand as they are, made once a batch and shape."""
        key = ("bounds", queries, keys, device)
        if key not in self._cache:
            ends = torch.tensor([[0, queries], [0, keys]], dtype=torch.int32).to(device)
            none = torch.empty(0, dtype=torch.int64, device=device)
            self._cache[key] = VarlenArguments(ends[0], ends[1], queries, keys, none, none, ())
        return self._cache[key]

    def scored_rows(self, device: torch.device) -> Tensor:
        """(R,) int64, every row whose output can be scored: each prompt's last token, completions.

        Made once a batch. An empty prompt has no last token: the row before is another group's.
        """
        key = ("scored", device)
        if key not in self._cache:
            pieces = 0 if self.cut is None else self.cut.tokens
            rows = [] if self.cut is None else [self.cut.scored]
            rows += [
                pieces + np.arange(start + max(prompt - 1, 0), start + prompt + sum(completions))
                for start, prompt, completions in self.groups
            ]
            self._cache[key] = _joined(rows).to(device)
        return self._cache[key]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool, causal, aligned at the bottom right, made once a batch and shape.

        `window`: a query sees itself and the `window - 1` keys before it (None: all).
        """
        key = (queries, keys, window, device)
        if key not in self._cache:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            if window is not None:
                mask &= mask.new_ones(queries, keys).triu(keys - queries - window + 1)
            self._cache[key] = mask
        return self._cache[key]

    def bias(
        self, queries: int, keys: int, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """`mask` as what is added to the scores, (queries, keys) of that dtype: attention would
        make it of a mask in every layer. A long one is left a mask, which takes less memory."""
        mask = self.mask(queries, keys, window, device)
        if mask.numel() > _LONGEST_BIAS:
            return mask
        key = (queries, keys, window, device, dtype)
        if key not in self._cache:
            with torch.inference_mode(False):  # what an evaluation makes, training may save
                none = torch.zeros((), dtype=dtype, device=device)
                self._cache[key] = torch.where(mask, none, float("-inf"))
        return self._cache[key]


class Tokens(NamedTuple):
    """The tokens of examples as the model gets them."""

    input_ids: list[list[int]]
    position_ids: list[list[int]]
    mask: list[list[int]] | None
    layout: PrefixLayout | None
    scored: dict[tuple[int, int], list[int]]  # (example, completion) -> rows of the hidden states


def is_one(prompts: Pair) -> bool:
    """Whether the completions of an example have one prompt in common."""
    return all(prompt is prompts[0] for prompt in prompts)


def last_tokens(prompts: Pair, pair: Pair, max_length: int) -> tuple[Pair, Pair]:
    """The last `max_length` tokens of each prompt with its completion."""
    if len(prompts[0]) + max(map(len, pair)) <= max_length:
        return prompts, pair
    pair = [completion[-max_length:] for completion in pair]
    over = [len(p) + len(c) - max_length for p, c in zip(prompts, pair, strict=True)]
    return [p[max(n, 0) :] for p, n in zip(prompts, over, strict=True)], pair


def lay_packed(
    prompts: list[Pair], completions: list[Pair], share: bool, pad: int, multiple: int
) -> Tokens:
    """One row without padding but for what fills it up to a multiple: a group that nothing reads.

    Args:
        share: a prompt once for all its completions.
        pad: the token that fills it.
    """
    ids: list[int] = []
    positions: list[int] = []
    groups: list[Group] = []
    scored: dict[tuple[int, int], list[int]] = {}
    for b, (own, pair) in enumerate(zip(prompts, completions, strict=True)):
        every = range(len(pair))
        for members in (every,) if share and is_one(own) else ([k] for k in every):
            prompt = own[members[0]]
            P = len(prompt)
            groups.append(Group(len(ids), P, tuple(len(pair[k]) for k in members)))
            last = len(ids) + P - 1  # the prompt's last token predicts every completion's first
            ids += prompt
            positions += range(P)
            for k in members:
                begin, C = len(ids), len(pair[k])
                scored[b, k] = ([last] if P else []) + list(range(begin, begin + C - 1))
                ids += pair[k]
                positions += range(P, P + C)
    missing = fill_up(ids, positions, groups, pad, multiple)
    return Tokens([ids], [positions], None, PrefixLayout(tuple(groups), missing), scored)


def fill_up(
    ids: list[int],
    positions: list[int],
    groups: list[Group],
    pad: int,
    multiple: int,
    offset: int = 0,
) -> int:
    """Appends a group that nothing reads, up to a multiple of tokens; returns its tokens.

    Args:
        offset: tokens of the row before the first group.
    """
    missing = -len(ids) % multiple
    if missing:
        groups.append(Group(len(ids) - offset, missing - 1, (1,)))
        ids += [pad] * missing
        positions += range(missing)
    return missing


def lay_padded(
    prompts: list[Pair], completions: list[Pair], _: bool, pad: int, multiple: int
) -> Tokens:
    """A row for each sequence, filled up with masked tokens on the right."""
    order = [(b, k) for k in range(len(completions[0])) for b in range(len(prompts))]
    sequences = [prompts[b][k] + completions[b][k] for b, k in order]
    L = max(map(len, sequences))
    L += -L % multiple
    scored = {
        (b, k): list(range(s * L + max(len(prompts[b][k]) - 1, 0), s * L + len(sequences[s]) - 1))
        for s, (b, k) in enumerate(order)
    }
    return Tokens(
        [s + [pad] * (L - len(s)) for s in sequences],
        [list(range(L)) for _ in sequences],
        [[1] * len(s) + [0] * (L - len(s)) for s in sequences],
        None,
        scored,
    )


def _joined(ranges: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(ranges).astype(np.int64, copy=False))


def int64(values: list[int]) -> Tensor:
    """A tensor of whole numbers even where there are none: `torch.tensor([])` has floats."""
    return torch.tensor(values, dtype=torch.int64)


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False)).to(device)
