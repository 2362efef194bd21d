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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tralign_fast.data.division import Shares, share_out
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
from tralign_fast.data.pieces import Cut, ScoredPieces, lay_pieces
from tralign_fast.data.sequences import ends_of, fingerprint_of, ld_weights, sequence_keys
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
    # (N,) int64, rows of the flattened hidden states that predict `targets`; with pieces of groups,
    # (n,) those that predict `pieces.targets`
    score_index: Tensor
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
    # where groups are cut over processes: the log-probs are computed by all of them
    pieces: ScoredPieces | None = None

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
        pieces = None if self.pieces is None else _mapped(self.pieces, function)
        return dataclasses.replace(_mapped(self, function), pieces=pieces)


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


def _mapped(of_tensors: Any, function: Any) -> Any:
    """A dataclass with the function's values in place of its tensors."""
    found = {f.name: getattr(of_tensors, f.name) for f in dataclasses.fields(of_tensors)}
    moved = {name: function(value) for name, value in found.items() if isinstance(value, Tensor)}
    return dataclasses.replace(of_tensors, **moved)


class _Examples(NamedTuple):
    """Token ids of a batch."""

    prompts: list[Pair]  # one for each completion, the same list unless they differ
    completions: list[Pair]
    rows: tuple[int, ...]
    labels: list[bool] | None

    def take(self, places: Sequence[int]) -> _Examples:
        return _Examples(
            [self.prompts[i] for i in places],
            [self.completions[i] for i in places],
            tuple(self.rows[i] for i in places),
            None if self.labels is None else [self.labels[i] for i in places],
        )


def can_be_merged(batch: PackedBatch) -> bool:
    return batch.layout is not None and batch.pieces is None


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
    return int64(ends_of(lengths))


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
        cut_over: name of these processes' group; where a group is longer than a share, each of them
            gets a piece of it (`data.pieces`). None: groups stay whole.
        whole_because: why they do, as a clause of a warning.

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
    cut_over: str | None = None
    whole_because: str = "nothing says which processes could cut it"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> PackedBatch | SplitBatch:
        if "prompt_ids" not in examples[0]:
            raise ValueError(
                f"rows with the columns {', '.join(examples[0])} are not tokenised: give them to "
                "the trainer when it is made, or to evaluate() and predict()"
            )
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
        prompts = [[p] * len(pair) for p, pair in zip(prompts, completions, strict=True)]
        if self.truncation_mode == "keep_end" and self.max_length is not None:
            ends = (
                last_tokens(*each, self.max_length)
                for each in zip(prompts, completions, strict=True)
            )
            prompts, completions = map(list, zip(*ends, strict=True))
        labels = None if self.paired else [bool(e["label"]) for e in examples]
        batch = _Examples(prompts, completions, rows, labels)
        parts = self._parts(batch) if self.division is None else self._divided(batch)
        return parts[0] if len(parts) == 1 else SplitBatch(parts)

    def _divided(self, batch: _Examples) -> tuple[PackedBatch, ...]:
        """This process's part of what several get alike."""
        assert self.division is not None
        place, count = self.division
        sizes = [self._tokens(*each) for each in zip(batch.prompts, batch.completions, strict=True)]
        why = self.whole_because if self.cut_over is None else None
        shares = share_out(sizes, batch.rows, count, why)
        if shares.cut:
            parts = self._cut_parts(batch, sizes, shares)
        else:
            own = shares.whole[place] or [min(range(len(sizes)), key=sizes.__getitem__)]
            parts = self._parts(batch.take(own))
        number = len(shares.whole[place]) + len(shares.owned[place])
        # an empty prompt predicts no first token
        ends = zip(batch.prompts, batch.completions, strict=True)
        scored = sum(max(0, len(pair[0]) - (not prompt[0])) for prompt, pair in ends)
        chosen = scored * max(number, 1) / len(batch.rows)
        return tuple(
            dataclasses.replace(
                p,
                weight=count * number / len(batch.rows),
                nll_tokens=chosen * p.share if self.paired and p.share > 0 else None,
            )
            for p in parts
        )

    def _cut_parts(
        self, batch: _Examples, sizes: Sequence[int], shares: Shares
    ) -> tuple[PackedBatch, ...]:
        """With pieces of the groups that are cut: one row, or with a budget of tokens rows of whole
        groups and then rows of pieces, as many on every process."""
        assert self.division is not None
        place, count = self.division
        own, owned = shares.whole[place], shares.owned[place]
        number = len(own) + len(owned)
        if self.token_budget is None:
            return (self._pack_pieces(batch, shares.cut, own, [*own, *owned], share=1.0),)
        parts: list[PackedBatch] = []
        if own:
            whole = self._parts(batch.take(own))
            parts += [dataclasses.replace(p, share=p.share * len(own) / number) for p in whole]
        most = max(self._count_parts([sizes[i] for i in each]) for each in shares.whole)
        if len(parts) < most:
            filler = batch.take([min(range(len(sizes)), key=sizes.__getitem__)])
            parts += [self._pack(filler, share=0.0)] * (most - len(parts))
        cuts = self._cuts([-(-sizes[i] // count) for i in shares.cut])
        for a, b in pairwise(cuts):
            cut = shares.cut[a:b]
            mine = [i for i in cut if i in owned]
            # whose log-probs are none of this process's weigh nothing, but are told to the others
            share = len(mine) / number if number else float(a == 0)
            parts.append(self._pack_pieces(batch, cut, [], mine, share))
        return tuple(parts)

    def _pack_pieces(
        self, batch: _Examples, cut: list[int], whole: list[int], owned: list[int], share: float
    ) -> PackedBatch:
        """A row of pieces of the `cut` examples and of `whole` ones, whose batch are those that
        this process owns (or a cut one, to have any)."""
        assert self.division is not None
        assert self.cut_over is not None
        examples = sorted(owned) or cut[:1]
        held, mine = batch.take(cut), batch.take(whole)
        over = Cut(
            *self.division, self.cut_over, held.prompts, held.completions,
            mine.prompts, mine.completions,
        )  # fmt: skip
        order = [(True, cut.index(i)) if i in cut else (False, whole.index(i)) for i in examples]
        return self._pack(batch.take(examples), share, over, order)

    def _parts(self, batch: _Examples) -> tuple[PackedBatch, ...]:
        sizes = [self._tokens(*each) for each in zip(batch.prompts, batch.completions, strict=True)]
        return tuple(
            self._pack(batch.take(range(a, b)), share=(b - a) / len(sizes))
            for a, b in pairwise(self._cuts(sizes))
        )

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

    def _cuts(self, sizes: Sequence[int]) -> list[int]:
        """Bounds of runs of examples of so many tokens that fit the budget, in order."""
        cuts, used = [0], 0
        for index, need in enumerate(sizes):
            if self.token_budget is not None and used and used + need > self.token_budget:
                cuts.append(index)
                used = 0
            used += need
        return [*cuts, len(sizes)]

    def _count_parts(self, sizes: Sequence[int]) -> int:
        return len(self._cuts(sizes)) - 1 if sizes else 0

    def _tokens(self, prompts: Pair, completions: Pair) -> int:
        """Of a group in a packed row."""
        copies = prompts[:1] if self.layout == "shared" and is_one(prompts) else prompts
        return sum(map(len, copies)) + sum(map(len, completions))

    def _pack(
        self,
        examples: _Examples,
        share: float,
        cut: Cut | None = None,
        order: Sequence[tuple[bool, int]] = (),
    ) -> PackedBatch:
        """
        Args:
            cut, order: of `lay_pieces`, where groups are cut; None: the row holds the examples.
        """
        prompts, completions, rows, labels = examples
        filling = self.layout == "shared", self.pad_token_id, self.pad_to_multiple_of or 1
        # sequences in the order (all first completions, all second completions)
        sequences = [
            (prompts[b][k], completions[b][k])
            for k in range(len(completions[0]))
            for b in range(len(prompts))
        ]
        # an empty prompt predicts no first token
        targets = [c if p else c[1:] for p, c in sequences]
        lengths = tuple(map(len, targets))
        pieces = None
        if cut is None:
            build = lay_padded if self.layout == "padded" else lay_packed
            tokens = build(prompts, completions, *filling)
            pairs = [(b, k) for k in range(len(completions[0])) for b in range(len(prompts))]
            scored = [i for pair in pairs for i in tokens.scored[pair]]
        else:
            tokens, scored, pieces = lay_pieces(cut, order, labels is None, *filling)
        weights = None if self.ld_alpha is None else ld_weights(lengths, self.ld_alpha)
        keys = sequence_keys(sequences, lengths, weights)
        return PackedBatch(
            input_ids=torch.tensor(tokens.input_ids),
            position_ids=torch.tensor(tokens.position_ids),
            attention_mask=None if tokens.mask is None else torch.tensor(tokens.mask),
            layout=tokens.layout,
            score_index=int64(scored),
            targets=int64([t for own in targets for t in own]),
            scored_lengths=lengths,
            offsets=_offsets(lengths),
            token_weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
            completion_lengths=torch.tensor([len(c) for _, c in sequences], dtype=torch.float32),
            rows=rows,
            is_desirable=None if labels is None else torch.tensor(labels),
            grad_tokens=sum(lengths) if labels is None else sum(lengths[: len(prompts)]),
            share=share,
            fingerprint=fingerprint_of(keys),
            keys=keys,
            sequence_tokens=sum(
                len(p) + len(c)
                for p, c in (sequences if labels is None else sequences[: len(prompts)])
            ),
            pieces=pieces,
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
