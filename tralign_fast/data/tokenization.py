"""Rows to token ids: `prompt, chosen, rejected` for pairs and `prompt, completion, label` for KTO.

The ids equal those of TRL's DPOTrainer and KTOTrainer. A completion starts where the tokens of the
prompt and those of prompt and completion together part, which is inside the prompt when a token
spans the boundary. Completions that are text end with EOS; those of a conversation end as the chat
template ends them. Completions are cut at the end, so that prompt and completion fit `max_length`;
those of KTO, which other prompts borrow, only to `max_length` alone: the collator does the rest.

Every row is looked at before training starts, and one that cannot be trained on is an error that
names it. Rows are marked inside `Dataset.map` and reported after it, because the map may run in
other processes or come from its cache.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_pairs", "tokenize_unpaired"]

Rows = TypeVar("Rows", bound="Dataset | IterableDataset")
Row = dict[str, Any]
Content = Any  # str, or a list of messages, each a dict with a role

_SHOWN = 5  # bad rows described in one message


def tokenize_pairs(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    name: str = "train",
    on_bad_rows: str = "raise",
    num_proc: int | None = None,
) -> Rows:
    """Tokenise a preference dataset as TRL's DPOTrainer does.

    Args:
        dataset: columns `chosen` and `rejected`, with or without `prompt` (without: what both begin
            with), text or lists of messages; optionally `tools` and `chat_template_kwargs`. One
            that has `prompt_ids`, `chosen_ids` and `rejected_ids` is returned as it is, neither
            checked nor cut.
        tokenizer: needs an EOS token for text, a chat template for messages.
        max_length: tokens of a prompt and one completion together; None: no limit.
        name: what messages call the dataset.
        on_bad_rows: "raise", or "drop" to leave bad rows out with one warning.
        num_proc: processes of `Dataset.map`; a stream has none.

    Returns:
        A dataset of the same kind with the columns `row` (int, index in `dataset`; in a stream, in
        what this process reads of it), `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: no rows, missing columns, or bad rows: all rows are checked at once in a
            `Dataset`, each as it is read in an `IterableDataset`.
    """
    columns = _columns_of(dataset, name)
    if set(columns) >= {"prompt_ids", "chosen_ids", "rejected_ids"}:
        return dataset
    _require(columns, ("chosen", "rejected"), name, "prompt is optional")
    job = _PairJob(name, tokenizer, max_length, implicit="prompt" not in columns)
    return _run(job, dataset, columns, on_bad_rows, num_proc)


def tokenize_unpaired(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    name: str = "train",
    on_bad_rows: str = "raise",
    num_proc: int | None = None,
) -> Rows:
    """Tokenise a KTO dataset as TRL's KTOTrainer does.

    Args:
        dataset: columns `prompt`, `completion` and `label` (True or 1: desirable; False or 0: not).
            Or pairs, as `tokenize_pairs` takes them, each of which makes a desirable and an
            undesirable row, in TRL's order (which depends on `num_proc`). One that has
            `prompt_ids`, `completion_ids` and `label` is returned as it is.
        tokenizer, max_length, name, on_bad_rows, num_proc: as in `tokenize_pairs`.

    Returns:
        A dataset of the same kind with the columns `row` (int; both rows of a pair have its index),
        `prompt_ids`, `completion_ids` (at most `max_length` tokens, whatever the prompt) and
        `label` (bool).

    Raises:
        ValueError: as in `tokenize_pairs`; with a `Dataset`, also when all labels are alike.
    """
    columns = _columns_of(dataset, name)
    if set(columns) >= {"prompt_ids", "completion_ids", "label"}:
        return dataset
    if set(columns) >= {"chosen", "rejected"}:
        job = _UnpairJob(name, tokenizer, max_length, implicit="prompt" not in columns)
    else:
        pairs = "or chosen and rejected, to be unpaired"
        _require(columns, ("prompt", "completion", "label"), name, pairs)
        job = _CompletionJob(name, tokenizer, max_length)
    return _run(job, dataset, columns, on_bad_rows, num_proc)


class _BadRow(Exception):
    """What is wrong with a row, and what was expected."""


class _Tokens(NamedTuple):
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    merged: str | None  # an example of a token across the end of the prompt


def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """What `map` runs on a batch of rows: each makes one or two records, the bad ones marked."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    implicit: bool = False  # chosen and rejected hold the prompt
    # `map` caches by a hash of this object, in which the code counts by its name alone
    source: str = field(default_factory=_source_hash)

    columns: ClassVar[tuple[str, ...]]
    lends: ClassVar[bool] = False  # completions also follow prompts that may leave them more room
    stream_batch: ClassVar[int] = 1  # rows read ahead

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> Row:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        made = [self._mark(row, int(index)) for row, index in zip(rows, indices, strict=True)]
        # when a row makes two records: first the first ones of the batch, then the second ones
        records = [record for turn in zip(*made, strict=True) for record in turn]
        columns = (*self.columns, "problem", "merged")
        return {column: [record[column] for record in records] for column in columns}

    def _mark(self, row: Row, index: int) -> list[Row]:
        try:
            self._check_tokenizer(row, index)
            made = self.records(row)
        except _BadRow as problem:
            made = self.blanks(str(problem))
        return [{"problem": None, "merged": None, **record, "row": index} for record in made]

    def _check_tokenizer(self, row: Row, index: int) -> None:
        """Not the row's fault, so never a reason to drop it."""
        text = any(isinstance(row.get(column), str) for column in ("chosen", "completion"))
        if text and self.tokenizer.eos_token is None:
            raise ValueError(
                f"{self.name} row {index}: text is to end with EOS, and the tokenizer has none; "
                "expected an eos_token"
            )
        messages = any(isinstance(row.get(column), list) for column in ("chosen", "completion"))
        given = self.tokenizer.chat_template or _template_options(row).get("chat_template")
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
        pair = {column: _content(column, row.get(column)) for column in ("chosen", "rejected")}
        if pair["chosen"] == pair["rejected"]:
            raise _BadRow("chosen and rejected are identical; expected two different completions")
        if self.implicit:
            _one_kind(pair)
            return _split_prompt(pair["chosen"], pair["rejected"])
        prompt = _prompt(row)
        _one_kind({"prompt": prompt, **pair})
        return prompt, pair

    def tokens(self, prompt: Content, completions: dict[str, Content], row: Row) -> _Tokens:
        """Ids of one prompt and its completions, which share the place where they start."""
        if isinstance(prompt, str):
            alone, together = self._text_ids(prompt, list(completions.values()))
        else:
            alone, together = self._message_ids(prompt, list(completions.values()), row)
        starts = [_common_length(alone, ids) for ids in together]
        start = min(starts)
        stop = self.max_length
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
        encode: Any = self.tokenizer
        eos = encode.eos_token
        ended = [text if text.endswith(eos) else text + eos for text in completions]
        together = [encode(text=prompt + text)["input_ids"] for text in ended]
        return encode(text=prompt)["input_ids"], together

    def _message_ids(
        self, prompt: list[Row], completions: list[list[Row]], row: Row
    ) -> tuple[list[int], list[list[int]]]:
        options = {"tools": _tools(row), **_template_options(row)}
        options |= {"tokenize": True, "return_dict": True}
        render: Any = self.tokenizer.apply_chat_template
        try:
            alone = render(prompt, **{**options, "add_generation_prompt": True})["input_ids"]
            together = [render(prompt + c, **options)["input_ids"] for c in completions]
        except Exception as error:  # templates are programs: whatever they raise is about this row
            reason = str(error).strip().split("\n")[0]
            raise _BadRow(
                f"the chat template refuses the conversation: {type(error).__name__}: {reason}"
            ) from error
        return alone, together

    def _check_lengths(
        self, prompt: int, uncut: list[list[int]], completions: dict[str, Content]
    ) -> None:
        if self.max_length is not None and prompt >= self.max_length:
            raise _BadRow(
                f"the prompt has {prompt} tokens and leaves none for a completion; expected fewer "
                f"than max_length = {self.max_length}"
            )
        for column, ids in zip(completions, uncut, strict=True):
            is_text = isinstance(completions[column], str)
            if not ids or (is_text and all(i == self.tokenizer.eos_token_id for i in ids)):
                raise _BadRow(f"{column} is empty; expected at least one token besides EOS")


class _PairJob(_Job):
    columns = ("row", "prompt_ids", "chosen_ids", "rejected_ids")

    def records(self, row: Row) -> list[Row]:
        prompt, pair = self.pair(row)
        tokens = self.tokens(prompt, pair, row)
        chosen, rejected = tokens.completion_ids
        if chosen == rejected:
            reason = "have the same tokens"
            if self.max_length == len(tokens.prompt_ids) + len(chosen):
                reason = f"are identical once cut to max_length = {self.max_length}"
            raise _BadRow(f"chosen and rejected {reason}; expected two different completions")
        ids = {"prompt_ids": tokens.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}
        return [{**ids, "merged": tokens.merged}]

    def blanks(self, problem: str) -> list[Row]:
        return [{"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "problem": problem}]


class _CompletionJob(_Job):
    columns = ("row", "prompt_ids", "completion_ids", "label")
    lends = True

    def records(self, row: Row) -> list[Row]:
        prompt = _prompt(row)
        completion = _content("completion", row.get("completion"))
        label = row.get("label")
        if not isinstance(label, int) or label not in (0, 1):
            raise _BadRow(f"label is {_shown(label)}; expected True, False, 1 or 0")
        _one_kind({"prompt": prompt, "completion": completion})
        return [self.completion(prompt, "completion", completion, bool(label), row)]

    def blanks(self, problem: str) -> list[Row]:
        return [self.blank(problem, False)]

    def completion(
        self, prompt: Content, column: str, completion: Content, label: bool, row: Row
    ) -> Row:
        tokens = self.tokens(prompt, {column: completion}, row)
        ids = {"prompt_ids": tokens.prompt_ids, "completion_ids": tokens.completion_ids[0]}
        return {**ids, "label": label, "merged": tokens.merged}

    def blank(self, problem: str, label: bool) -> Row:
        return {"prompt_ids": [], "completion_ids": [], "label": label, "problem": problem}


class _UnpairJob(_CompletionJob):
    stream_batch = 1000  # TRL unpairs 1,000 rows at a time: all the chosen, then all the rejected

    def records(self, row: Row) -> list[Row]:
        prompt, pair = self.pair(row)
        made = []
        for column, label in (("chosen", True), ("rejected", False)):
            try:
                made.append(self.completion(prompt, column, pair[column], label, row))
            except _BadRow as problem:
                made.append(self.blank(str(problem), label))
        return made

    def blanks(self, problem: str) -> list[Row]:
        return [self.blank(problem, True), self.blank(problem, False)]


def _prompt(row: Row) -> Content:
    return _content("prompt", row.get("prompt"), may_be_empty=True)


def _content(column: str, value: Any, may_be_empty: bool = False) -> Content:
    """`value` if it is text or messages.

    A text prompt may be empty (the tokenizer's BOS can stand for it), a completion may not.
    """
    if isinstance(value, str):
        if not value and not may_be_empty:
            raise _BadRow(f"{column} is empty; expected text")
        return value
    if not isinstance(value, list):
        raise _BadRow(f"{column} is {_shown(value)}; expected text or a list of messages")
    if not value:
        raise _BadRow(f"{column} is an empty list; expected at least one message")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _BadRow(
                f"{column}[{i}] is {_shown(message)}; expected a message with role and content"
            )
        content = message.get("content")
        if not isinstance(content, (str, list)) and not _says_more(message):
            raise _BadRow(f"{column}[{i}] has the content {_shown(content)}; expected text")
    if not may_be_empty and not any(m.get("content") or _says_more(m) for m in value):
        raise _BadRow(f"{column} is empty: no message has any content; expected text")
    return value


def _says_more(message: Row) -> bool:
    """Tool calls, reasoning and the like can stand in for content."""
    return any(value for key, value in message.items() if key not in ("role", "content"))


def _one_kind(contents: dict[str, Content]) -> None:
    if len({isinstance(value, str) for value in contents.values()}) == 1:
        return
    kinds = [f"{c} is {'text' if isinstance(v, str) else 'messages'}" for c, v in contents.items()]
    raise _BadRow(
        f"{', '.join(kinds)}; expected all to be text or all messages (remove the prompt column if "
        "the others hold the whole conversation)"
    )


def _split_prompt(chosen: Content, rejected: Content) -> tuple[Content, dict[str, Content]]:
    """What both begin with is the prompt; at least one character or message is left of each."""
    last = min(len(chosen), len(rejected)) - 1
    end = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    # tokenizers put the space before a word into the word's token, if the pair differs there at all
    if end and chosen[end] != rejected[end] and chosen[end - 1] == " ":
        end -= 1
    if end == 0 and not isinstance(chosen, str):
        raise _BadRow(
            "chosen and rejected begin with different messages; expected both to hold the prompt, "
            "as there is no prompt column"
        )
    return chosen[:end], {"chosen": chosen[end:], "rejected": rejected[end:]}


def _template_options(row: Row) -> Row:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise _BadRow(f"chat_template_kwargs is {_shown(options)}; expected a dict")
    return options


def _tools(row: Row) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except json.JSONDecodeError as error:
        raise _BadRow(f"tools is {_shown(tools)}; expected JSON, but {error}") from error


def _common_length(ids: list[int], others: list[int]) -> int:
    shorter = min(len(ids), len(others))
    if ids[:shorter] == others[:shorter]:  # as good as always; a slice compares fast
        return shorter
    return next(i for i in range(shorter) if ids[i] != others[i])


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"


def _columns_of(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"{name}: expected a datasets.Dataset or datasets.IterableDataset, got "
            f"{type(dataset).__name__}"
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name}: the dataset has no rows; expected at least one")
    return dataset.column_names or list(first)


def _require(columns: list[str], expected: tuple[str, ...], name: str, also: str) -> None:
    missing = [column for column in expected if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: expected the columns {', '.join(expected)} ({also}); "
            f"{', '.join(missing)} missing, found {', '.join(columns)}"
        )


def _run(
    job: _Job, dataset: Any, columns: list[str], on_bad_rows: str, num_proc: int | None
) -> Any:
    import datasets

    if on_bad_rows not in ("raise", "drop"):
        raise ValueError(f'on_bad_rows must be "raise" or "drop", got {on_bad_rows!r}')
    if job.max_length is not None and job.max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens or None, got {job.max_length}")
    ids, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    types = {"row": datasets.Value("int64"), "label": datasets.Value("bool")}
    kept = {column: types.get(column, ids) for column in job.columns}
    dataset = dataset.with_format(None)  # rows of numpy or torch would look like wrong types
    if isinstance(dataset, datasets.IterableDataset):
        # a later row may have columns that the first has not, hence the selection
        return dataset.map(
            _Stream(job, drop=on_bad_rows == "drop"),
            with_indices=True,
            batched=True,
            batch_size=job.stream_batch,
            remove_columns=columns,
            features=datasets.Features(kept),
        ).select_columns(list(kept))
    marked = dataset.map(
        job,
        with_indices=True,
        batched=True,
        remove_columns=columns,
        features=datasets.Features({**kept, "problem": text, "merged": text}),
        num_proc=num_proc,
        desc=f"Tokenizing {job.name}",
    )
    return _settle(marked, job.name, drop=on_bad_rows == "drop")


def _settle(marked: Dataset, name: str, drop: bool) -> Dataset:
    """Report what the rows were marked with, and take the marks off."""
    rows, problems, merged = (marked[column][:] for column in ("row", "problem", "merged"))
    # both halves of a pair may be bad for the one reason
    bad = sorted({(row, problem) for row, problem in zip(rows, problems, strict=True) if problem})
    if bad:
        _report(bad, f"{len(set(rows))} rows", name, drop)
        marked = marked.select([i for i, problem in enumerate(problems) if not problem])
        if not len(marked):
            raise ValueError(f"{name}: no row is left, all are bad; expected at least one good row")
    examples = [(row, m) for row, m in zip(rows, merged, strict=True) if m]
    if examples:
        row, example = examples[0]
        _warn_merged(name, f"{len(examples)} of {len(rows)} tokenised rows", row, example)
    if "label" in marked.column_names and len(labels := set(marked["label"])) == 1:
        raise ValueError(
            f"{name}: every label is {labels.pop()}; expected both desirable and undesirable rows"
        )
    return marked.remove_columns(["problem", "merged"])


def _report(bad: list[tuple[int, str]], among: str, name: str, drop: bool) -> None:
    lines = [f"{name} row {row}: {problem}" for row, problem in bad[:_SHOWN]]
    if len(bad) == 1 and not drop:
        raise ValueError(lines[0])
    first = f", the first {_SHOWN} problems" if len(bad) > _SHOWN else ""
    share = f"{len({row for row, _ in bad})} of {among}"
    listed = f"{first}:\n  " + "\n  ".join(lines)
    if not drop:
        raise ValueError(f'{name}: {share} are bad (on_bad_rows="drop" drops them){listed}')
    warnings.warn(f"{name}: dropped {share}{listed}", stacklevel=5)


def _warn_merged(name: str, share: str, row: int, example: str) -> None:
    warnings.warn(
        f"{name}: in {share} the prompt's last tokens change when a completion follows, e.g. row "
        f"{row}: {example}. There the prompt is cut before these tokens, the completion starts "
        "with them, and generation will start from a prompt that training has not seen. End "
        "prompts on a token boundary (a space belongs to the completion), or use a chat template "
        "that renders a prompt alone as it does with an answer.",
        stacklevel=5,
    )


@dataclass
class _Stream:
    """A job whose marks are dealt with row by row, as a stream has no end to wait for."""

    job: _Job
    drop: bool
    dropped: int = 0
    warned: bool = False

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> Row:
        made = self.job(batch, indices)
        rows, problems, merged = made.pop("row"), made.pop("problem"), made.pop("merged")
        bad = sorted(
            {(row, problem) for row, problem in zip(rows, problems, strict=True) if problem}
        )
        if bad and not self.drop:
            _report(bad, f"the {len(set(rows))} rows just read", self.job.name, drop=False)
        for row, problem in bad:
            self._count(row, problem)
        examples = [(row, m) for row, m in zip(rows, merged, strict=True) if m]
        if examples and not self.warned:
            self.warned = True
            _warn_merged(self.job.name, "at least one row", *examples[0])
        good = [i for i, problem in enumerate(problems) if not problem]
        made = {"row": rows, **made}
        return {column: [values[i] for i in good] for column, values in made.items()}

    def _count(self, row: int, problem: str) -> None:
        self.dropped += 1
        # the first ones, then ever more rarely: 8, 16, 32, …
        if self.dropped <= _SHOWN or self.dropped & (self.dropped - 1) == 0:
            warnings.warn(
                f"{self.job.name} row {row}: dropped ({self.dropped} so far): {problem}",
                stacklevel=2,
            )
