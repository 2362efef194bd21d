"""One batch of rows to token ids: what `Dataset.map` runs, in this or other processes.

A row that cannot be trained on is marked with what is wrong, and the marks are dealt with after
the map, which may come from its cache.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tralign_fast.data.content import (
    BadRow,
    Content,
    Overlong,
    Row,
    as_parts,
    check_text_alone,
    content_of,
    differences,
    ids_of,
    label_of,
    one_kind,
    part_lists,
    split_prompt,
    template_options,
    tools_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# beside the ids: what is wrong with the row, whether that is its length alone, an example of a
# token across the prompt's end, and whether no other row was there to borrow from
MARKS = ("problem", "overlong", "merged", "alone")


class _Tokens(NamedTuple):
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    merged: str | None  # an example of a token across the end of the prompt


@functools.cache
def _source_hash() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@dataclass(frozen=True)
class Job:
    """What `map` runs on a batch of rows: each makes one or two records, the bad ones marked."""

    name: str
    processing: PreTrainedTokenizerBase | ProcessorMixin
    max_length: int | None
    prompt: str | None = "prompt"  # its column; None: chosen and rejected begin with it
    truncation_mode: str = "keep_start"  # keep_end leaves the cut to the collator
    # `map` caches by a hash of this object, in which the code counts by its name alone
    source: str = field(default_factory=_source_hash)

    columns: ClassVar[tuple[str, ...]]
    lends: ClassVar[bool] = False  # completions also follow prompts that may leave them more room
    stream_batch: ClassVar[int] = 1  # rows read ahead

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_in(self.processing)

    @property
    def stop(self) -> int | None:
        """Tokens that are kept of a prompt with its completion, from the first on."""
        return self.max_length if self.truncation_mode == "keep_start" else None

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> Row:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        made = [self._mark(row, int(index)) for row, index in zip(rows, indices, strict=True)]
        # when a row makes two records: first the first ones of the batch, then the second ones
        records = [record for turn in zip(*made, strict=True) for record in turn]
        if self.lends:
            _borrow(records)
        columns = (*self.columns, *MARKS)
        return {column: [record[column] for record in records] for column in columns}

    def _mark(self, row: Row, index: int) -> list[Row]:
        marks = {"row": index, "problem": None, "overlong": False, "merged": None, "alone": False}
        try:
            check_text_alone(row)
            self.check_tokenizer(row, index)
            made = self.records(row)
        except BadRow as problem:
            marks["overlong"] = isinstance(problem, Overlong)
            made = self.blanks(str(problem))
        return [{**marks, **record} for record in made]

    def check_tokenizer(self, row: Row, index: int) -> None:
        """Not the row's fault, so never a reason to drop it."""
        text = any(isinstance(row.get(column), str) for column in ("chosen", "completion"))
        if text and self.tokenizer.eos_token is None:
            raise ValueError(
                f"{self.name} row {index}: text is to end with EOS, and the tokenizer has none; "
                "expected an eos_token"
            )
        messages = any(isinstance(row.get(column), list) for column in ("chosen", "completion"))
        given = self.processing.chat_template or template_options(row).get("chat_template")
        if messages and not given:
            raise ValueError(
                f"{self.name} row {index}: holds messages, and the tokenizer has no chat template; "
                "expected a chat_template, or rows of text"
            )

    def records(self, row: Row) -> list[Row]:
        raise NotImplementedError

    def blanks(self, problem: str) -> list[Row]:
        raise NotImplementedError

    def pair(self, row: Row) -> tuple[Content, dict[str, Content]]:
        """Prompt and completions of a row that has chosen and rejected."""
        pair = {column: content_of(column, row.get(column)) for column in ("chosen", "rejected")}
        if pair["chosen"] == pair["rejected"]:
            raise BadRow("chosen and rejected are identical; expected two different completions")
        if self.prompt is None:
            one_kind(pair)
            return split_prompt(pair["chosen"], pair["rejected"])
        prompt = self.prompt_of(row)
        one_kind({self.prompt: prompt, **pair})
        if self.prompt != "prompt" and prompt and all(v.startswith(prompt) for v in pair.values()):
            raise BadRow(
                f"chosen and rejected begin with the {self.prompt}; expected completions without "
                f'it, as it is taken for the prompt (or dataset.remove_columns("{self.prompt}"))'
            )
        return prompt, pair

    def prompt_of(self, row: Row) -> Content:
        assert self.prompt is not None
        return content_of(self.prompt, row.get(self.prompt), may_be_empty=True)

    def tokens(self, prompt: Content, completions: dict[str, Content], row: Row) -> _Tokens:
        """Ids of one prompt and its completions, which share the place where they start."""
        if isinstance(prompt, str):
            alone, together = self._text_ids(prompt, list(completions.values()))
        else:
            alone, together = self._message_ids(prompt, list(completions.values()), row)
        starts = [_common_length(alone, ids) for ids in together]
        start = min(starts)
        stop = self.stop
        if self.lends and stop is not None:
            stop += start
        cut = [ids[start:stop] for ids in together]
        self._check_lengths(start, [ids[start:] for ids in together], completions)
        merged = None
        if start < len(alone):
            instead = together[starts.index(start)][start : len(alone)]
            old, new = (self.tokenizer.decode(ids) for ids in (alone[start:], instead))
            merged = f"{old!r} became {new!r}"
        return _Tokens(alone[:start], cut, merged)

    def _text_ids(self, prompt: str, completions: list[str]) -> tuple[list[int], list[list[int]]]:
        eos: Any = self.tokenizer.eos_token
        ended = [text if text.endswith(eos) else text + eos for text in completions]
        encode: Any = self.processing
        alone, *together = (
            self._row(encode(text=text)) for text in (prompt, *(prompt + text for text in ended))
        )
        return alone, together

    def _row(self, encoded: Any) -> list[int]:
        """The ids of one text or conversation, of which a processor makes a batch of one."""
        ids = encoded["input_ids"]
        return ids if self.tokenizer is self.processing else ids[0]

    def _message_ids(
        self, prompt: list[Row], completions: list[list[Row]], row: Row
    ) -> tuple[list[int], list[list[int]]]:
        options = {"tools": tools_of(row), **template_options(row)}
        conversations = [prompt + completion for completion in completions]
        if self.tokenizer is not self.processing:
            prompt, *conversations = map(as_parts, (prompt, *conversations))
        render: Any = functools.partial(self.processing.apply_chat_template, **options)
        tokens = {"tokenize": True, "return_dict": True}
        try:
            alone = self._row(render(prompt, **{**tokens, "add_generation_prompt": True}))
            together = [self._row(render(messages, **tokens)) for messages in conversations]
            texts = [
                (parts, render(messages, tokenize=False))
                for messages in conversations
                if (parts := part_lists(messages))
            ]
        except Exception as error:  # templates are programs: whatever they raise is about this row
            reason = str(error).strip().split("\n")[0]
            raise BadRow(
                f"the chat template refuses the conversation: {type(error).__name__}: {reason}"
            ) from error
        if any(str(part) in text for parts, text in texts for part in parts):
            raise BadRow(
                "a content is a list of parts, which the chat template prints as Python does; "
                "expected text"
            )
        if len(together) == 2 and together[0] == together[1]:
            raise _dropped_by_template(*completions)
        return alone, together

    def _check_lengths(
        self, prompt: int, uncut: list[list[int]], completions: dict[str, Content]
    ) -> None:
        check_prompt_length(prompt, self.stop)
        for column, ids in zip(completions, uncut, strict=True):
            is_text = isinstance(completions[column], str)
            if not ids or (is_text and all(i == self.tokenizer.eos_token_id for i in ids)):
                raise BadRow(f"{column} is empty; expected at least one token besides EOS")


class PairJob(Job):
    columns = ("row", "prompt_ids", "chosen_ids", "rejected_ids")

    def records(self, row: Row) -> list[Row]:
        prompt, pair = self.pair(row)
        tokens = self.tokens(prompt, pair, row)
        return [{**self.checked(tokens), "merged": tokens.merged}]

    def blanks(self, problem: str) -> list[Row]:
        return [{"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "problem": problem}]

    def checked(self, tokens: _Tokens) -> Row:
        """The columns of a pair whose completions differ, also once they are cut."""
        prompt, (chosen, rejected) = tokens.prompt_ids, tokens.completion_ids
        cut = self.stop == len(prompt) + len(chosen)  # of no other length if they are alike
        alike = chosen == rejected
        if not alike and self.stop is None and self.max_length is not None:
            ends = [(prompt + ids)[-self.max_length :] for ids in (chosen, rejected)]
            cut = alike = ends[0] == ends[1]
        if alike and cut:
            raise Overlong(
                f"chosen and rejected are identical once cut to max_length = {self.max_length}; "
                "expected two different completions"
            )
        if alike:
            raise BadRow(
                "chosen and rejected have the same tokens; expected two different completions"
            )
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


class TokenizedPairJob(PairJob):
    """Checks and cuts what comes as token ids."""

    def check_tokenizer(self, row: Row, index: int) -> None:
        pass

    def records(self, row: Row) -> list[Row]:
        prompt = ids_of("prompt_ids", row, may_be_empty=True)
        pair = [ids_of(column, row) for column in ("chosen_ids", "rejected_ids")]
        if pair[0] == pair[1]:
            raise BadRow(
                "chosen_ids and rejected_ids are identical; expected two different completions"
            )
        check_prompt_length(len(prompt), self.stop)
        room = None if self.stop is None else self.stop - len(prompt)
        return [
            {**_known_row(row), **self.checked(_Tokens(prompt, [i[:room] for i in pair], None))}
        ]


class CompletionJob(Job):
    columns = ("row", "prompt_ids", "completion_ids", "label", "borrowed_ids")
    lends = True
    stream_batch = 8  # rows that a row can borrow a completion from

    def records(self, row: Row) -> list[Row]:
        prompt = self.prompt_of(row)
        completion = content_of("completion", row.get("completion"))
        label = label_of(row)
        one_kind({self.prompt or "prompt": prompt, "completion": completion})
        return [self.completion(prompt, "completion", completion, label, row)]

    def blanks(self, problem: str) -> list[Row]:
        return [self.blank(problem, False)]

    def completion(
        self, prompt: Content, column: str, completion: Content, label: bool, row: Row
    ) -> Row:
        tokens = self.tokens(prompt, {column: completion}, row)
        ids = {"prompt_ids": tokens.prompt_ids, "completion_ids": tokens.completion_ids[0]}
        return {**ids, "label": label, "borrowed_ids": [], "merged": tokens.merged}

    def blank(self, problem: str, label: bool) -> Row:
        ids = {"prompt_ids": [], "completion_ids": [], "borrowed_ids": []}
        return {**ids, "label": label, "problem": problem}


class TokenizedCompletionJob(CompletionJob):
    """Checks and cuts what comes as token ids."""

    def check_tokenizer(self, row: Row, index: int) -> None:
        pass

    def records(self, row: Row) -> list[Row]:
        prompt = ids_of("prompt_ids", row, may_be_empty=True)
        completion = ids_of("completion_ids", row)
        label = label_of(row)
        check_prompt_length(len(prompt), self.max_length)
        ids = {"prompt_ids": prompt, "completion_ids": completion[: self.max_length]}
        borrowed = ids_of("borrowed_ids", row, may_be_empty=True) if "borrowed_ids" in row else []
        return [{**_known_row(row), **ids, "label": label, "borrowed_ids": borrowed}]


class UnpairJob(CompletionJob):
    stream_batch = 1000  # TRL unpairs 1,000 rows at a time: all the chosen, then all the rejected

    def records(self, row: Row) -> list[Row]:
        prompt, pair = self.pair(row)
        made = []
        for column, label in (("chosen", True), ("rejected", False)):
            try:
                made.append(self.completion(prompt, column, pair[column], label, row))
            except BadRow as problem:
                blank = self.blank(str(problem), label)
                made.append({**blank, "overlong": isinstance(problem, Overlong)})
        ids, other = (record["completion_ids"] for record in made)
        whole = self.max_length is None or len(ids) < self.max_length
        if ids and ids == other and whole and not isinstance(prompt, str):
            raise _dropped_by_template(pair["chosen"], pair["rejected"])
        return made

    def blanks(self, problem: str) -> list[Row]:
        return [self.blank(problem, True), self.blank(problem, False)]


def tokenizer_in(processing: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    from transformers import ProcessorMixin

    if isinstance(processing, ProcessorMixin):
        return processing.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    return processing


def _dropped_by_template(chosen: list[Row], rejected: list[Row]) -> BadRow:
    fields = ", ".join(differences(chosen, rejected))
    return BadRow(
        f"chosen and rejected differ in {fields} alone, and the chat template does not print the "
        "difference; expected a chat template that does, or completions that differ in more"
    )


def check_prompt_length(prompt: int, max_length: int | None) -> None:
    if max_length is not None and prompt >= max_length:
        raise Overlong(
            f"the prompt has {prompt} tokens and leaves none for a completion; expected fewer "
            f"than max_length = {max_length}"
        )


def _known_row(row: Row) -> Row:
    """The number that a tokenised row already has, from the dataset that it was made of."""
    return {"row": row["row"]} if type(row.get("row")) is int else {}


def _borrow(records: list[Row]) -> None:
    """Gives every good record the completion of the one before it that has another prompt."""
    good = [record for record in records if record["problem"] is None]
    if not good:
        return
    first = good[0]["prompt_ids"]
    other = next((r for r in reversed(good) if r["prompt_ids"] != first), None)
    for before, record in zip([good[-1], *good], good, strict=False):
        if before["prompt_ids"] != record["prompt_ids"]:
            other = before
        # one prompt alone has no other: then another completion of it
        lender = other or (before if before is not record else None)
        if record["borrowed_ids"]:  # it came tokenised
            continue
        record["alone"] = lender is None
        record["borrowed_ids"] = [] if lender is None else lender["completion_ids"]


def _common_length(ids: list[int], others: list[int]) -> int:
    shorter = min(len(ids), len(others))
    if ids[:shorter] == others[:shorter]:  # as good as always; a slice compares fast
        return shorter
    return next(i for i in range(shorter) if ids[i] != others[i])
