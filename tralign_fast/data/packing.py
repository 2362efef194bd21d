"""Tokenised rows to one batch: the prompt once, every completion of it, no padding.

A group is a prompt with its completions, laid out as `[prompt | completion 0 | completion 1 | …]`:

    pairs   [prompt | chosen | rejected]
    KTO     [prompt | completion | completion of another prompt (for the KL term)]

Groups stand one behind the other in a single row of T tokens. Positions restart after the prompt
for every completion, and the attention (`tralign_fast.model.attention`) lets a completion see
its prompt and itself. Which rows of the hidden states are scored is decided here, on the host.

Letters: T tokens, N scored tokens, S sequences, B examples (pairs, or KTO rows).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tralign_fast.ops.segments import segment_sums

LAYOUTS = ("shared", "packed", "padded")


class Group(NamedTuple):
    """A prompt and its completions in the packed row; all numbers in tokens."""

    start: int
    prompt: int
    completions: tuple[int, ...]


class VarlenArguments(NamedTuple):
    """What a variable-length attention kernel takes, as flash-attn names it."""

    cu_seqlens_q: Tensor  # (sequences + 1,) int32
    cu_seqlens_k: Tensor  # (sequences + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Tensor  # (keys,) int64: the packed row's tokens, those of prompts repeated
    first: Tensor  # (T,) int64: where a token stands first among the keys
    # where tokens stand again, (tokens, keys) int64: of all second completions, all third, …
    again: tuple[tuple[Tensor, Tensor], ...]


@dataclass  # not frozen: torch 2.10 compiles a layer anew for every content of a frozen one
class PrefixLayout:
    """Where prompts and completions lie in the packed row; host integers, and what they imply.

    The first completion of a group runs on from its prompt: `[prompt | completion 0]` is one causal
    sequence. Every further completion is a sequence of queries whose keys are
    `[prompt | completion]`, causal when aligned at the bottom right.
    """

    groups: tuple[Group, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def varlen(self, device: torch.device) -> VarlenArguments:
        """Sequence bounds and key gather for flash-attn's varlen interface, made once a batch."""
        if device not in self._cache:
            queries, keys, index = [0], [0], []
            first, again = [], defaultdict(lambda: ([], []))
            for start, prompt, completions in self.groups:
                begin = start + prompt
                for k, length in enumerate(completions):
                    queries.append(prompt + length if k == 0 else length)
                    keys.append(prompt + length)
                    end = len(index) + prompt
                    first += range(end - prompt if k == 0 else end, end + length)
                    if k > 0:
                        again[k][0].extend(range(start, start + prompt))
                        again[k][1].extend(range(end - prompt, end))
                    index += [*range(start, start + prompt), *range(begin, begin + length)]
                    begin += length
            self._cache[device] = VarlenArguments(
                torch.tensor(list(accumulate(queries)), dtype=torch.int32).to(device),
                torch.tensor(list(accumulate(keys)), dtype=torch.int32).to(device),
                max(queries),
                max(keys),
                _int64(index).to(device),
                _int64(first).to(device),
                tuple((_int64(a).to(device), _int64(b).to(device)) for a, b in again.values()),
            )
        return self._cache[device]

    def scored_rows(self, device: torch.device) -> Tensor:
        """(R,) int64, every row whose output can be scored: each prompt's last token, completions.

        Made once a batch. An empty prompt has no last token: the row before is another group's.
        """
        key = ("scored", device)
        if key not in self._cache:
            rows = [
                row
                for start, prompt, completions in self.groups
                for row in range(start + max(prompt - 1, 0), start + prompt + sum(completions))
            ]
            self._cache[key] = _int64(rows).to(device)
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


@dataclass(frozen=True)
class PackedBatch:
    """One batch, ready for `model.scoring.sequence_logps`.

    Sequences are ordered [chosen 0..B-1, rejected 0..B-1] for pairs and [completion 0..B-1,
    mismatched completion 0..B-1] for KTO; scored tokens follow the order of their sequences.
    """

    input_ids: Tensor  # (1, T) int64; (S, L) when padded
    position_ids: Tensor  # like input_ids
    attention_mask: Tensor | None  # (S, L) int64 when padded, else None
    layout: PrefixLayout | None  # None when padded
    score_index: Tensor  # (N,) int64, rows of the flattened hidden states that predict `targets`
    targets: Tensor  # (N,) int64
    scored_lengths: tuple[int, ...]  # S scored tokens per sequence, sums to N
    offsets: (
        Tensor  # (S + 1,) int64, sequence s owns the scored tokens [offsets[s], offsets[s + 1])
    )
    completion_lengths: Tensor  # (S,) float32, completion tokens per sequence
    rows: tuple[int, ...]  # B rows of the dataset
    is_desirable: Tensor | None  # (B,) bool for KTO, else None
    grad_tokens: int  # the first so many scored tokens want a gradient (KTO's KL terms do not)
    share: float = 1.0  # of the examples of the batch that this is a part of
    kl: Tensor | None = None  # (), KTO's KL term of the whole batch where this is a part of one
    # what the SFT term of this part of a batch is divided by; None: its chosen tokens
    nll_tokens: float | None = None
    token_weights: Tensor | None = None  # (N,) float32, LD-DPO's; None: 1
    fingerprint: int = 0  # of the contents, by which scores are found again
    # of the examples' own sequences, each with its prompt: no padding, no mismatched completion
    sequence_tokens: int = 0

    @property
    def parts(self) -> tuple[PackedBatch, ...]:
        return (self,)

    def __len__(self) -> int:
        """B, the examples in the batch."""
        return len(self.rows)

    def __contains__(self, key: str) -> bool:
        # transformers.Trainer asks `"labels" in batch` to count the tokens of a language-model loss
        return False

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda t: t.pin_memory())

    def sum_per_sequence(self, token_logps: Tensor) -> Tensor:
        """(N,) log-probs of tokens to (S,) log-probs of sequences, weighted by `token_weights`."""
        if self.token_weights is not None:
            token_logps = token_logps * self.token_weights
        return segment_sums(token_logps, self.offsets)

    def _map(self, function) -> PackedBatch:
        moved = {
            f.name: function(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class SplitBatch:
    """A batch of more tokens than one packed row may have: parts that run one after the other."""

    parts: tuple[PackedBatch, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __contains__(self, key: str) -> bool:
        return False

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SplitBatch:
        return SplitBatch(tuple(part.to(device, non_blocking) for part in self.parts))

    def pin_memory(self) -> SplitBatch:
        return SplitBatch(tuple(part.pin_memory() for part in self.parts))


def merge_packed(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Packed rows one behind the other as one, to be scored: sequences stay in the batches' order
    (so a loss, which wants all first completions in front, cannot be taken of it).
    """
    groups: list[Group] = []
    offsets = [0, *accumulate(batch.num_tokens for batch in batches)]
    for batch, offset in zip(batches, offsets, strict=False):
        assert batch.layout is not None
        groups += [group._replace(start=group.start + offset) for group in batch.layout.groups]
    lengths = tuple(n for batch in batches for n in batch.scored_lengths)
    targets = torch.cat([batch.targets for batch in batches])
    return dataclasses.replace(
        batches[0],
        input_ids=torch.cat([batch.input_ids for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids for batch in batches], 1),
        layout=PrefixLayout(tuple(groups)),
        score_index=torch.cat(
            [b.score_index + offset for b, offset in zip(batches, offsets, strict=False)]
        ),
        targets=targets,
        scored_lengths=lengths,
        offsets=_offsets(lengths).to(targets.device),
        completion_lengths=torch.cat([batch.completion_lengths for batch in batches]),
        rows=tuple(row for batch in batches for row in batch.rows),
        is_desirable=None,
        token_weights=_joined([batch.token_weights for batch in batches]),
        grad_tokens=len(targets),
        fingerprint=0,
    )


def _offsets(lengths: Sequence[int]) -> Tensor:
    """(S + 1,) int64: where the scored tokens of each sequence begin, and where the last end."""
    return _int64([0, *accumulate(lengths)])


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def _int64(values: list[int]) -> Tensor:
    """A tensor of whole numbers even where there are none: `torch.tensor([])` has floats."""
    return torch.tensor(values, dtype=torch.int64)


@dataclass
class PreferenceCollator:
    """Tokenised rows (`tokenize_pairs`, `tokenize_unpaired`) to a `PackedBatch`.

    Args:
        paired: rows hold `chosen_ids` and `rejected_ids`; else `completion_ids` and `label`, and
            every prompt also gets the completion of the row before it in the batch (the first row
            that of the last one), from which KTO estimates its KL term. A row that is alone in its
            batch gets its `borrowed_ids`, which tokenising took from another prompt.
        layout: "shared" (a prompt once for all its completions), "packed" (a prompt for each, no
            padding), "padded" (one row each, for attentions that know no packing).
        max_length: KTO's completions, own and borrowed, are cut to what their prompt leaves of it
            (those of pairs come cut). None: no limit.
        token_budget: tokens of a packed row; a batch that needs more becomes a `SplitBatch`, whose
            parts hold at most so many (a group that is longer stands alone). None: one row.
        pad_token_id: fills padded rows.
        vocab_size: token ids must be smaller; None: not checked.
        ld_alpha: weight of the tokens of a pair beyond the length of its shorter completion
            (LD-DPO, arXiv 2409.06411); None: 1.
        mismatched: whether unpaired rows get the completion of another row at all.

    Raises:
        ValueError: a token id outside the vocabulary, or a KTO row that is alone and borrows
            nothing; the message names the row.
    """

    paired: bool
    layout: str = "shared"
    max_length: int | None = None
    token_budget: int | None = None
    pad_token_id: int = 0
    vocab_size: int | None = None
    ld_alpha: float | None = None
    mismatched: bool = True

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> PackedBatch | SplitBatch:
        prompts = [list(e["prompt_ids"]) for e in examples]
        rows = tuple(int(e.get("row", i)) for i, e in enumerate(examples))
        if self.paired:
            completions = [[list(e["chosen_ids"]), list(e["rejected_ids"])] for e in examples]
        else:
            own = [list(e["completion_ids"]) for e in examples]
            lent = [own[-1], *own[:-1]]
            if self.mismatched and len(own) == 1:
                lent = [_borrowed(examples[0], rows[0])]
            room = [None if self.max_length is None else self.max_length - len(p) for p in prompts]
            completions = [
                [mine[:left], *([other[:left]] if self.mismatched else [])]
                for mine, other, left in zip(own, lent, room, strict=True)
            ]
        self._check_vocabulary(prompts, completions, rows)
        labels = None if self.paired else [bool(e["label"]) for e in examples]
        cuts = self._cuts(prompts, completions)
        parts = tuple(
            self._pack(
                prompts[a:b], completions[a:b], rows[a:b], None if labels is None else labels[a:b],
                share=(b - a) / len(examples),
            )
            for a, b in pairwise(cuts)
        )  # fmt: skip
        return parts[0] if len(parts) == 1 else SplitBatch(parts)

    def _cuts(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[int]:
        """Bounds of runs of examples whose tokens fit the budget, in order."""
        cuts, used = [0], 0
        for index, (prompt, pair) in enumerate(zip(prompts, completions, strict=True)):
            copies = 1 if self.layout == "shared" else len(pair)
            need = copies * len(prompt) + sum(map(len, pair))
            if self.token_budget is not None and used and used + need > self.token_budget:
                cuts.append(index)
                used = 0
            used += need
        return [*cuts, len(prompts)]

    def _pack(
        self,
        prompts: list[list[int]],
        completions: list[list[list[int]]],
        rows: tuple[int, ...],
        labels: list[bool] | None,
        share: float,
    ) -> PackedBatch:
        build = _padded if self.layout == "padded" else _packed
        tokens = build(prompts, completions, self.layout == "shared", self.pad_token_id)
        # sequences in the order (all first completions, all second completions)
        order = [(b, k) for k in range(len(completions[0])) for b in range(len(prompts))]
        scored = [tokens.scored[pair] for pair in order]
        targets = [
            completions[b][k][-len(s) :] if s else []
            for (b, k), s in zip(order, scored, strict=True)
        ]
        lengths = tuple(map(len, scored))
        weights = None if self.ld_alpha is None else _ld_weights(lengths, self.ld_alpha)
        own = completions if labels is None else [c[:1] for c in completions]
        contents = (tokens.input_ids, scored, rows, labels)
        # what decides the sums of a reference: kept scores are known by it
        contents = repr(contents if weights is None else (*contents, weights)).encode()
        return PackedBatch(
            input_ids=torch.tensor(tokens.input_ids),
            position_ids=torch.tensor(tokens.position_ids),
            attention_mask=None if tokens.mask is None else torch.tensor(tokens.mask),
            layout=tokens.layout,
            score_index=_int64([i for s in scored for i in s]),
            targets=_int64([t for s in targets for t in s]),
            scored_lengths=lengths,
            offsets=_offsets(lengths),
            token_weights=None if weights is None else torch.tensor(weights),
            completion_lengths=torch.tensor([float(len(completions[b][k])) for b, k in order]),
            rows=rows,
            is_desirable=None if labels is None else torch.tensor(labels),
            grad_tokens=sum(lengths) if labels is None else sum(lengths[: len(prompts)]),
            share=share,
            fingerprint=int.from_bytes(hashlib.blake2b(contents, digest_size=7).digest(), "big"),
            sequence_tokens=sum(
                len(p) + len(c) for p, row in zip(prompts, own, strict=True) for c in row
            ),
        )

    def _check_vocabulary(
        self, prompts: list[list[int]], completions: list[list[list[int]]], rows: tuple[int, ...]
    ) -> None:
        if self.vocab_size is None:
            return
        for prompt, pair, row in zip(prompts, completions, rows, strict=True):
            ids = [*prompt, *(token for completion in pair for token in completion)]
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"row {row}: token id {low if low < 0 else high} is outside the model's "
                    f"vocabulary [0, {self.vocab_size}); do the tokenizer and the model belong "
                    "together?"
                )


def _ld_weights(lengths: Sequence[int], alpha: float) -> list[float]:
    """Of scored tokens, all first completions in front: 1 up to the length of the pair's shorter
    completion, α beyond it."""
    pairs = len(lengths) // 2
    shared = [min(lengths[b], lengths[b + pairs]) for b in range(pairs)] * 2
    return [
        1.0 if place < common else alpha
        for length, common in zip(lengths, shared, strict=True)
        for place in range(length)
    ]


def _borrowed(example: dict[str, Any], row: int) -> list[int]:
    """Another prompt's completion for a row that has no other in its batch.

    Its own would make the KL term equal to its reward, and the loss 0.5 for ever.
    """
    if not example.get("borrowed_ids"):
        raise ValueError(
            f"row {row}: alone in its batch, and KTO's KL term wants the completion of another "
            "prompt; expected a batch of two or more, or a dataset of several rows that "
            "tokenize_unpaired made (it adds borrowed_ids)"
        )
    return list(example["borrowed_ids"])


class _Tokens(NamedTuple):
    input_ids: list[list[int]]
    position_ids: list[list[int]]
    mask: list[list[int]] | None
    layout: PrefixLayout | None
    scored: dict[tuple[int, int], list[int]]  # (example, completion) -> rows of the hidden states


def _packed(
    prompts: list[list[int]], completions: list[list[list[int]]], share: bool, _: int
) -> _Tokens:
    ids: list[int] = []
    positions: list[int] = []
    groups: list[Group] = []
    scored: dict[tuple[int, int], list[int]] = {}
    for b, (prompt, pair) in enumerate(zip(prompts, completions, strict=True)):
        P = len(prompt)
        every = range(len(pair))
        for members in (every,) if share else ([k] for k in every):
            groups.append(Group(len(ids), P, tuple(len(pair[k]) for k in members)))
            last = len(ids) + P - 1  # the prompt's last token predicts every completion's first
            ids += prompt
            positions += range(P)
            for k in members:
                begin, C = len(ids), len(pair[k])
                scored[b, k] = ([last] if P else []) + list(range(begin, begin + C - 1))
                ids += pair[k]
                positions += range(P, P + C)
    return _Tokens([ids], [positions], None, PrefixLayout(tuple(groups)), scored)


def _padded(
    prompts: list[list[int]], completions: list[list[list[int]]], _: bool, pad: int
) -> _Tokens:
    order = [(b, k) for k in range(len(completions[0])) for b in range(len(prompts))]
    sequences = [prompts[b] + completions[b][k] for b, k in order]
    L = max(map(len, sequences))
    scored = {
        (b, k): list(range(s * L + max(len(prompts[b]) - 1, 0), s * L + len(sequences[s]) - 1))
        for s, (b, k) in enumerate(order)
    }
    return _Tokens(
        [s + [pad] * (L - len(s)) for s in sequences],
        [list(range(L)) for _ in sequences],
        [[1] * len(s) + [0] * (L - len(s)) for s in sequences],
        None,
        scored,
    )
