"""Rows to token ids: `prompt, chosen, rejected` for pairs and `prompt, completion, label` for KTO.

The ids equal those of TRL's DPOTrainer and KTOTrainer. A completion starts where the tokens of the
prompt and those of prompt and completion together part, which is inside the prompt when a token
spans the boundary. Completions that are text end with EOS; those of a conversation end as the chat
template ends them. Completions are cut at the end, so that prompt and completion fit `max_length`;
those of KTO, which other prompts borrow, only to `max_length` alone: the collator does the rest.

Every row is looked at before training starts, and one that cannot be trained on is an error that
names it, or is dropped, counted and named. Rows are marked inside `Dataset.map` and reported after
it, because the map may run in other processes or come from its cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from tralign_fast.data.columns import columns_of, one_dataset, prompt_column, require
from tralign_fast.data.content import Row
from tralign_fast.data.jobs import (
    MARKS,
    CompletionJob,
    Job,
    PairJob,
    TokenizedCompletionJob,
    TokenizedPairJob,
    UnpairJob,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["ON_BAD_ROWS", "add_lengths", "tokenize_pairs", "tokenize_unpaired"]

Rows = TypeVar("Rows", bound="Dataset | IterableDataset")

# drop_overlong drops what max_length leaves nothing of, as TRL does, and refuses all else
ON_BAD_ROWS = ("drop_overlong", "drop", "error", "raise")  # raise: another word for error

_SHOWN = 5  # bad rows described in one message


def tokenize_pairs(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None,
    name: str = "train",
    on_bad_rows: str = "drop_overlong",
    num_proc: int | None = None,
    truncation_mode: str = "keep_start",
) -> Rows:
    """Tokenise a preference dataset as TRL's DPOTrainer does.

    Args:
        dataset: columns `chosen` and `rejected`, with or without `prompt` (without: what both begin
            with, unless one column such as `question` is clearly it), text or lists of messages;
            optionally `tools` and `chat_template_kwargs`. One that has `prompt_ids`, `chosen_ids`
            and `rejected_ids` is checked and cut as if these had just been made.
        tokenizer: needs an EOS token for text, a chat template for messages; or a processor with
            one, which gets contents as lists of parts, as TRL passes them.
        max_length: tokens of a prompt and one completion together; None: no limit.
        name: what messages call the dataset.
        on_bad_rows: "drop_overlong" leaves out, with one warning, rows that are bad for their
            length alone (the prompt fills `max_length`, or the pair is alike once cut) and raises
            for others; "drop" leaves out all bad rows; "error" (or "raise") raises for all.
        num_proc: processes of `Dataset.map`; a stream has none.
        truncation_mode: "keep_start"; or "keep_end", with which nothing is cut here and no prompt
            is too long: the collator keeps the last `max_length` tokens of prompt and completion.

    Returns:
        A dataset of the same kind with the columns `row` (int, index in `dataset`; in a stream, in
        what this process reads of it), `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: no rows, missing or ambiguous columns, or bad rows: all rows are checked at once
            in a `Dataset`, each as it is read in an `IterableDataset`.
    """
    policy = _Policy(name, max_length, on_bad_rows)
    dataset = cast("Rows", one_dataset(dataset, name))
    columns, first = columns_of(dataset, name)
    if set(columns) >= {"prompt_ids", "chosen_ids", "rejected_ids"}:
        job = TokenizedPairJob(name, tokenizer, max_length, None, truncation_mode)
    else:
        labelled = {"completion", "label"} <= set(columns)
        also = 'completion and label are for loss_type="kto"' if labelled else "prompt is optional"
        require(columns, ("chosen", "rejected"), name, also)
        prompt = prompt_column(columns, first, "chosen", name)
        job = PairJob(name, tokenizer, max_length, prompt, truncation_mode)
    return _run(job, dataset, columns, policy, num_proc)


def tokenize_unpaired(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None,
    name: str = "train",
    on_bad_rows: str = "drop_overlong",
    num_proc: int | None = None,
    one_label: bool = False,
) -> Rows:
    """Tokenise a KTO dataset as TRL's KTOTrainer does.

    Args:
        dataset: columns `prompt`, `completion` and `label` (True or 1: desirable; False or 0: not).
            Or pairs, as `tokenize_pairs` takes them, each of which makes a desirable and an
            undesirable row, in TRL's order (which depends on `num_proc`). One that has
            `prompt_ids`, `completion_ids` and `label` is checked and cut as if just made.
        tokenizer, max_length, name, on_bad_rows, num_proc: as in `tokenize_pairs`.
        one_label: all labels may be alike, which is enough to evaluate.

    Returns:
        A dataset of the same kind with the columns `row` (int; both rows of a pair have its index),
        `prompt_ids`, `completion_ids` (at most `max_length` tokens, whatever the prompt), `label`
        (bool) and `borrowed_ids` (the completion of another prompt, for a row that is alone in its
        batch; empty if there is no other).

    Raises:
        ValueError: as in `tokenize_pairs`; with a `Dataset`, also when all labels are alike.
    """
    policy = _Policy(name, max_length, on_bad_rows, one_label)
    dataset = cast("Rows", one_dataset(dataset, name))
    columns, first = columns_of(dataset, name)
    if set(columns) >= {"prompt_ids", "completion_ids", "label"}:
        job = TokenizedCompletionJob(name, tokenizer, max_length)
    elif set(columns) >= {"chosen", "rejected"}:
        prompt = prompt_column(columns, first, "chosen", name)
        job = UnpairJob(name, tokenizer, max_length, prompt)
    else:
        pairs = "or chosen and rejected, to be unpaired"
        known = {"completion", "label"} <= set(columns)
        prompt = prompt_column(columns, first, "completion", name) if known else None
        expected = (prompt or "prompt", "completion", "label")
        require(columns, expected, name, pairs)
        job = CompletionJob(name, tokenizer, max_length, prompt)
    return _run(job, dataset, columns, policy, num_proc)


def add_lengths(dataset: Rows, column: str) -> Rows:
    """The tokens of every row of a tokenised dataset as one more column, by which
    `train_sampling_strategy="group_by_length"` groups; a stream is returned as it is.
    """
    lengths = row_lengths(dataset)
    if lengths is None:
        return dataset
    if column in dataset.column_names:  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
        raise ValueError(
            f"length_column_name={column!r} is a column of tokenised rows; expected another name"
        )
    return dataset.add_column(column, lengths)  # pyright: ignore[reportReturnType, reportArgumentType, reportCallIssue]


def row_lengths(dataset: Any) -> list[int] | None:
    """The tokens of every row of a tokenised dataset, a prompt once; None for a stream."""
    import pyarrow.compute as pc
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return None
    counted = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
    table = dataset.with_format("arrow").select_columns(
        [name for name in dataset.column_names if name in counted]
    )[:]
    lengths = [pc.list_value_length(values).to_pylist() for values in table.columns]  # pyright: ignore[reportAttributeAccessIssue]
    return [sum(row) for row in zip(*lengths, strict=True)]


@dataclass(frozen=True)
class _Policy:
    """What becomes of bad rows."""

    name: str
    max_length: int | None
    on_bad_rows: str
    one_label: bool = True

    def __post_init__(self) -> None:
        if self.on_bad_rows not in ON_BAD_ROWS:
            raise ValueError(
                f"on_bad_rows must be one of {', '.join(ON_BAD_ROWS)}, got {self.on_bad_rows!r}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens or None, got {self.max_length}")

    def drops(self, overlong: bool) -> bool:
        return self.on_bad_rows == "drop" or (overlong and self.on_bad_rows == "drop_overlong")

    def split(self, bad: list[_Bad]) -> tuple[list[_Bad], list[_Bad]]:
        """Bad rows to raise for, and those to drop, each in order and once."""
        bad = sorted(set(bad))  # both halves of a pair may be bad for the one reason
        refused = [b for b in bad if not self.drops(b.overlong)]
        return refused, [b for b in bad if self.drops(b.overlong)]


class _Bad(NamedTuple):
    row: int
    problem: str
    overlong: bool


def _run(job: Job, dataset: Any, columns: list[str], policy: _Policy, num_proc: int | None) -> Any:
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    integer, boolean = datasets.Value("int64"), datasets.Value("bool")
    types = {"row": integer, "label": boolean, "overlong": boolean, "alone": boolean}
    types |= {"problem": datasets.Value("string"), "merged": datasets.Value("string")}
    kept = {column: types.get(column, ids) for column in job.columns}
    dataset = dataset.with_format(None)  # rows of numpy or torch would look like wrong types
    if isinstance(dataset, datasets.IterableDataset):
        # a later row may have columns that the first has not, hence the selection
        return dataset.map(
            _Stream(job, policy),
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
        features=datasets.Features({**kept, **{mark: types[mark] for mark in MARKS}}),
        num_proc=num_proc,
        desc=f"Tokenizing {job.name}",
    )
    return _settle(marked, policy)


def _settle(marked: Dataset, policy: _Policy) -> Dataset:
    """Report what the rows were marked with, and take the marks off."""
    name = policy.name
    columns = ("row", *MARKS)
    rows, problems, overlong, merged, alone = (marked[column][:] for column in columns)
    marked = marked.remove_columns(list(MARKS))
    bad = [_Bad(*mark) for mark in zip(rows, problems, overlong, strict=True) if mark[1]]
    if bad:
        refused, dropped = policy.split(bad)
        among = f"{len(set(rows))} rows"
        if refused:
            _refuse(refused, among, name)
        kept = [i for i, problem in enumerate(problems) if not problem]
        warnings.warn(f"{name}: dropped {''.join(_described(dropped, among, name))}", stacklevel=4)
        if not kept:
            raise ValueError(f"{name}: no row is left, all are bad; expected at least one good row")
        marked, alone = marked.select(kept), [alone[i] for i in kept]
    examples = [(row, m) for row, m in zip(rows, merged, strict=True) if m]
    if examples:
        row, example = examples[0]
        _warn_merged(name, f"{len(examples)} of {len(rows)} tokenised rows", row, example)
    if not policy.one_label and "label" in marked.column_names:
        labels = set(marked["label"])
        if len(labels) == 1:
            message = f"{name}: every label is {labels.pop()}"
            expected = "expected both desirable and undesirable rows"
            if not bad:
                raise ValueError(f"{message}; {expected}")
            warnings.warn(f"{message} among the rows that are left; {expected}", stacklevel=4)
    return _lend(marked, [i for i, a in enumerate(alone) if a]) if len(marked) > 1 else marked


def _lend(dataset: Dataset, alone: list[int]) -> Dataset:
    """Completions for rows that were alone in their batch of the map: those of their neighbours."""
    import datasets

    if not alone:
        return dataset
    parts, end = [], 0
    for i in [*alone, len(dataset)]:
        if end < i:
            parts.append(dataset.select(range(end, i)))
        if i < len(dataset):
            row = {**dataset[i], "borrowed_ids": dataset[i - 1 if i else 1]["completion_ids"]}
            parts.append(datasets.Dataset.from_list([row], dataset.features))
        end = i + 1
    return datasets.concatenate_datasets(parts)


def lend_in_groups(dataset: Dataset, size: int) -> Dataset:
    """Adds `lent_ids`: to each of `size` rows after another the completion of the one before it,
    and to the first that of the last; none where a group has one row. As TRL's KTO trainer does."""
    return dataset.map(_lent, batched=True, batch_size=size, input_columns=["completion_ids"])


def _lent(completions: list[list[int]]) -> dict[str, list[list[int]]]:
    rotated = [completions[-1], *completions[:-1]] if len(completions) > 1 else [[]]
    return {"lent_ids": rotated}


def _described(bad: list[_Bad], among: str, name: str) -> tuple[str, str]:
    """How many rows are bad, and what is wrong with the first; all in one line."""
    first = f", the first {_SHOWN} problems" if len(bad) > _SHOWN else ""
    listed = " | ".join(f"{name} row {b.row}: {b.problem}" for b in bad[:_SHOWN])
    return f"{len({b.row for b in bad})} of {among}", f"{first}: {listed}"


def _refuse(bad: list[_Bad], among: str, name: str) -> None:
    if len(bad) == 1:
        raise ValueError(f"{name} row {bad[0].row}: {bad[0].problem}")
    share, listed = _described(bad, among, name)
    raise ValueError(f'{name}: {share} are bad (on_bad_rows="drop" drops them){listed}')


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

    job: Job
    policy: _Policy
    dropped: int = 0
    warned: bool = False
    spare: tuple[list[int], list[int]] | None = None  # the stream's first prompt and completion

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> Row:
        made = self.job(batch, indices)
        problems, overlong, merged, _ = (made.pop(mark) for mark in MARKS)
        rows = made["row"]
        bad = [_Bad(*mark) for mark in zip(rows, problems, overlong, strict=True) if mark[1]]
        refused, dropped = self.policy.split(bad)
        if refused:
            _refuse(refused, f"the {len(set(rows))} rows just read", self.job.name)
        for row, problem, _ in dropped:
            self._count(row, problem)
        examples = [(row, m) for row, m in zip(rows, merged, strict=True) if m]
        if examples and not self.warned:
            self.warned = True
            _warn_merged(self.job.name, "at least one row", *examples[0])
        good = [i for i, problem in enumerate(problems) if not problem]
        if self.job.lends:
            self._lend(made, good, first=indices[0] == 0)
        return {column: [values[i] for i in good] for column, values in made.items()}

    def _lend(self, made: Row, good: list[int], first: bool) -> None:
        """The stream's first completion for rows that were read with no other prompt.

        It is the same in every pass over the stream, which the last one seen is not.
        """
        if first:
            self.spare = None
        prompts = [made["prompt_ids"][i] for i in good]
        if self.spare is not None and all(p == prompts[0] != self.spare[0] for p in prompts):
            for i in good:
                made["borrowed_ids"][i] = self.spare[1]
        if self.spare is None and good:
            self.spare = prompts[0], made["completion_ids"][good[0]]

    def _count(self, row: int, problem: str) -> None:
        self.dropped += 1
        # the first ones, then ever more rarely: 8, 16, 32, …
        if self.dropped <= _SHOWN or self.dropped & (self.dropped - 1) == 0:
            warnings.warn(
                f"{self.job.name} row {row}: dropped ({self.dropped} so far): {problem}",
                stacklevel=2,
            )
