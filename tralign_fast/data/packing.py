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
import itertools
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import xxhash
from torch import Tensor

from tralign_fast.data.layout import (
    Group,
    Pair,
    PrefixLayout,
    int64,
    is_one,
    last_tokens,
    lay_packed,
    lay_padded,
)
from tralign_fast.ops.segments import segment_sums

LAYOUTS = ("shared", "packed", "padded")


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
    # of the loss, where processes divide a batch: their number · this one's examples / all; 0: it
    # has none, and runs another's
    weight: float = 1.0
    kl: Tensor | None = None  # (), KTO's KL term of the whole batch where this is a part of one
    # what the SFT term of this part of a batch is divided by; None: its chosen tokens
    nll_tokens: float | None = None
    token_weights: Tensor | None = None  # (N,) float32, LD-DPO's; None: 1
    # (E,) of a mixture of experts: those of the whole batch where this is a part of one
    router_slopes: Tensor | None = None
    balance: Any = None  # the `model.router.Balance` that the model is asked for
    # of the sequences in their order, however they are laid out: scores are found again by it
    fingerprint: int = 0
    # (S,) of each sequence by itself: prompt, completion and the weights of its tokens
    keys: tuple[int, ...] = ()
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
    def own_examples(self) -> int:
        """B, or 0 where the examples are another's and weigh nothing."""
        return len(self) if self.share > 0 and self.weight > 0 else 0

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
        keys=tuple(key for batch in batches for key in batch.keys),
    )


def _offsets(lengths: Sequence[int]) -> Tensor:
    """(S + 1,) int64: where the scored tokens of each sequence begin, and where the last end."""
    return int64(_ends(lengths))


def _ends(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


@dataclass
class PreferenceCollator:
    """Tokenised rows (`tokenize_pairs`, `tokenize_unpaired`) to a `PackedBatch`.

    Args:
        paired: rows hold `chosen_ids` and `rejected_ids`; else `completion_ids` and `label`, and
            every prompt also gets the completion of the row before it in the batch (the first row
            that of the last one), from which KTO estimates its KL term. A row that has `lent_ids`
            (`lend_in_groups`) gets those; one that is alone in its batch gets its `borrowed_ids`,
            which tokenising took from another prompt.
        layout: "shared" (a prompt once for all its completions), "packed" (a prompt for each, no
            padding), "padded" (one row each, for attentions that know no packing).
        max_length: KTO's completions, own and borrowed, are cut to what their prompt leaves of it
            (those of pairs come cut, but for "keep_end"). None: no limit.
        truncation_mode: "keep_end" cuts every prompt with its completion to its last `max_length`
            tokens, as TRL does: a pair's prompts may then differ, and are not shared.
        token_budget: tokens of a packed row; a batch that needs more becomes a `SplitBatch`, whose
            parts hold at most so many (a group that is longer stands alone). None: one row.
        pad_token_id: fills padded rows.
        pad_to_multiple_of: rows are filled up to a multiple of so many tokens: padded ones with
            masked tokens, packed ones with a group of its own that nothing reads. None: not.
        vocab_size: token ids must be smaller; None: not checked.
        ld_alpha: weight of the tokens of a pair beyond the length of its shorter completion
            (LD-DPO, arXiv 2409.06411); None: 1.
        mismatched: whether unpaired rows get the completion of another row at all.
        lenders: so many unpaired rows of a batch, one behind the other, lend to each other; None:
            all. A run that goes on with fewer processes has larger batches, and lends as before.
        division: (place, count): this is one of so many processes that get the same rows and
            divide their groups, with about as many tokens for each (`share_out`). None: all rows.

    Raises:
        ValueError: a token id outside the vocabulary, or a KTO row that is alone and borrows
            nothing; the message names the row.
    """

    paired: bool
    layout: str = "shared"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    token_budget: int | None = None
    pad_token_id: int = 0
    vocab_size: int | None = None
    ld_alpha: float | None = None
    mismatched: bool = True
    pad_to_multiple_of: int | None = None
    lenders: int | None = None
    division: tuple[int, int] | None = None

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
            lent = self._lent(examples, own, rows) if self.mismatched else own
            room = [None if self.max_length is None else self.max_length - len(p) for p in prompts]
            completions = [
                [mine[:left], *([other[:left]] if self.mismatched else [])]
                for mine, other, left in zip(own, lent, room, strict=True)
            ]
        self._check_vocabulary(prompts, completions, rows)
        # one for each completion, the same list unless they differ
        prompts = [[p] * len(pair) for p, pair in zip(prompts, completions, strict=True)]
        if self.truncation_mode == "keep_end" and self.max_length is not None:
            ends = (
                last_tokens(*each, self.max_length)
                for each in zip(prompts, completions, strict=True)
            )
            prompts, completions = map(list, zip(*ends, strict=True))
        labels = None if self.paired else [bool(e["label"]) for e in examples]
        if self.division is None:
            return self._parts(prompts, completions, rows, labels)
        place, count = self.division
        sizes = [self._tokens(*each) for each in zip(prompts, completions, strict=True)]
        own = share_out(sizes, rows, count)[place]
        weight = count * len(own) / len(rows)
        own = own or [min(range(len(rows)), key=sizes.__getitem__)]
        batch = self._parts(
            [prompts[i] for i in own], [completions[i] for i in own], tuple(rows[i] for i in own),
            None if labels is None else [labels[i] for i in own],
        )  # fmt: skip
        # an empty prompt predicts no first token
        ends = zip(prompts, completions, strict=True)
        scored = sum(max(0, len(pair[0]) - (not prompt[0])) for prompt, pair in ends)
        chosen = scored * len(own) / len(rows)
        parts = tuple(
            dataclasses.replace(
                p, weight=weight, nll_tokens=chosen * p.share if self.paired else None
            )
            for p in batch.parts
        )
        return parts[0] if len(parts) == 1 else SplitBatch(parts)

    def _parts(
        self,
        prompts: list[Pair],
        completions: list[Pair],
        rows: tuple[int, ...],
        labels: list[bool] | None,
    ) -> PackedBatch | SplitBatch:
        parts = tuple(
            self._pack(
                prompts[a:b], completions[a:b], rows[a:b], None if labels is None else labels[a:b],
                share=(b - a) / len(rows),
            )
            for a, b in pairwise(self._cuts(prompts, completions))
        )  # fmt: skip
        return parts[0] if len(parts) == 1 else SplitBatch(parts)

    def _lent(
        self, examples: Sequence[dict[str, Any]], own: list[list[int]], rows: tuple[int, ...]
    ) -> list[list[int]]:
        """The completion that each unpaired row gets from another one."""
        lent: list[list[int]] = []
        size = self.lenders or len(own)
        for start in range(0, len(own), size):
            group = own[start : start + size]
            if len(group) == 1:
                example = examples[start]
                group = [example.get("lent_ids") or _borrowed(example, rows[start])]
            lent += [group[-1], *group[:-1]]
        return [e.get("lent_ids") or other for e, other in zip(examples, lent, strict=True)]

    def _cuts(self, prompts: list[Pair], completions: list[Pair]) -> list[int]:
        """Bounds of runs of examples whose tokens fit the budget, in order."""
        cuts, used = [0], 0
        for index, (own, pair) in enumerate(zip(prompts, completions, strict=True)):
            need = self._tokens(own, pair)
            if self.token_budget is not None and used and used + need > self.token_budget:
                cuts.append(index)
                used = 0
            used += need
        return [*cuts, len(prompts)]

    def _tokens(self, prompts: Pair, completions: Pair) -> int:
        """Of a group in a packed row."""
        copies = prompts[:1] if self.layout == "shared" and is_one(prompts) else prompts
        return sum(map(len, copies)) + sum(map(len, completions))

    def _pack(
        self,
        prompts: list[Pair],
        completions: list[Pair],
        rows: tuple[int, ...],
        labels: list[bool] | None,
        share: float,
    ) -> PackedBatch:
        build = lay_padded if self.layout == "padded" else lay_packed
        tokens = build(
            prompts, completions, self.layout == "shared", self.pad_token_id,
            self.pad_to_multiple_of or 1,
        )  # fmt: skip
        # sequences in the order (all first completions, all second completions)
        order = [(b, k) for k in range(len(completions[0])) for b in range(len(prompts))]
        scored = [tokens.scored[pair] for pair in order]
        targets = [
            completions[b][k][-len(s) :] if s else []
            for (b, k), s in zip(order, scored, strict=True)
        ]
        lengths = tuple(map(len, scored))
        weights = None if self.ld_alpha is None else _ld_weights(lengths, self.ld_alpha)
        keys = _keys([(prompts[b][k], completions[b][k]) for b, k in order], lengths, weights)
        return PackedBatch(
            input_ids=torch.tensor(tokens.input_ids),
            position_ids=torch.tensor(tokens.position_ids),
            attention_mask=None if tokens.mask is None else torch.tensor(tokens.mask),
            layout=tokens.layout,
            score_index=int64([i for s in scored for i in s]),
            targets=int64([t for s in targets for t in s]),
            scored_lengths=lengths,
            offsets=_offsets(lengths),
            token_weights=None if weights is None else torch.tensor(weights),
            completion_lengths=torch.tensor([float(len(completions[b][k])) for b, k in order]),
            rows=rows,
            is_desirable=None if labels is None else torch.tensor(labels),
            grad_tokens=sum(lengths) if labels is None else sum(lengths[: len(prompts)]),
            share=share,
            fingerprint=xxhash.xxh3_64_intdigest(array("q", keys).tobytes()),
            keys=keys,
            sequence_tokens=sum(
                len(prompts[b][k]) + len(completions[b][k])
                for b, k in order
                if labels is None or k == 0
            ),
        )

    def _check_vocabulary(
        self, prompts: list[list[int]], completions: list[Pair], rows: tuple[int, ...]
    ) -> None:
        if self.vocab_size is None:
            return
        for prompt, pair, row in zip(prompts, completions, rows, strict=True):
            pieces = [ids for ids in (prompt, *pair) if ids]
            low, high = min(map(min, pieces)), max(map(max, pieces))
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"row {row}: token id {low if low < 0 else high} is outside the model's "
                    f"vocabulary [0, {self.vocab_size}); do the tokenizer and the model belong "
                    "together?"
                )


def share_out(sizes: Sequence[int], rows: Sequence[int], count: int) -> list[list[int]]:
    """The places of groups, in order, that fall to each of so many processes: the largest first, to
    whom has the fewest tokens.

    Args:
        sizes: tokens of each group.
        rows: their rows of the dataset.
    """
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[longest] * count > sum(sizes):
        _warn_of_long_group(rows[longest], sizes[longest], sum(sizes), count)
    return deal_out(sizes, count)


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


def _warn_of_long_group(row: int, tokens: int, total: int, count: int) -> None:
    if next(_long_groups) == 0:  # one such row is named, and no other
        warnings.warn(
            f"row {row} has {tokens} tokens, more than the {total // count} that fall to each of "
            f"{count} processes that divide its batch: one of them computes it, and the others "
            "wait; larger batches are divided more evenly (attention does not cross processes)",
            stacklevel=2,
        )


def _keys(
    sequences: list[tuple[list[int], list[int]]],
    lengths: Sequence[int],
    weights: list[float] | None,
) -> tuple[int, ...]:
    """Of each (prompt, completion), whatever batch it stands in: 64 bits, signed."""
    keys = []
    for (prompt, completion), (start, end) in zip(sequences, pairwise(_ends(lengths)), strict=True):
        state = xxhash.xxh3_64(array("q", [len(prompt), *prompt, *completion]).tobytes())
        if weights is not None:
            state.update(repr(weights[start:end]).encode())
        keys.append(int.from_bytes(state.digest(), "big", signed=True))
    return tuple(keys)


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
