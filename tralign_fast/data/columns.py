"""Which columns a dataset has, and which of them is the prompt."""

from __future__ import annotations

import warnings
from typing import Any

# what published preference sets call the prompt; each of them is it when it stands alone
_PROMPTS = ("question", "instruction", "query", "input", "problem", "user_prompt")
# what stands before the prompt; how they are joined, every set decides for itself
_CONTEXTS = ("system", "system_prompt", "history", "context", "conversations", "conversation")


def one_dataset(dataset: Any, name: str) -> Any:
    """The `Dataset` or `IterableDataset`, also as the only one of a `DatasetDict`."""
    import datasets

    if isinstance(dataset, dict) and len(dataset) == 1:
        (dataset,) = dataset.values()
    if isinstance(dataset, dict):
        raise ValueError(
            f"{name}: got a {type(dataset).__name__} of {', '.join(map(str, dataset)) or 'nothing'}"
            "; expected one dataset of it"
            + "".join(f", e.g. dataset[{k!r}]" for k in [*dataset][:1])
        )
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"{name}: expected a datasets.Dataset or datasets.IterableDataset, got "
            f"{type(dataset).__name__}"
        )
    return dataset


def media_refusal(column: str, holds: str | None = None) -> str:
    """What is said of a column of images, sounds or films."""
    has = f"the column {column} holds {holds}" if holds else f"has {column}"
    text = f'if the text is whole without it: dataset.remove_columns("{column}")'
    pictures = holds == "Image" or "image" in column or "pixel" in column
    if not pictures or holds in ("Audio", "Video"):
        return f"{has}; expected text alone, which is all that the model reads ({text})"
    return (
        f"{has}: the rows are vision-related, and every model, also a vision-language model, is "
        f"trained on text alone here; TRL's DPOTrainer with use_fast_logprobs reads images ({text})"
    )


def column_names(rows: Any) -> set[str]:
    """The columns of a dataset, or of the first in a dict of them; none of what is no dataset.

    A stream that does not know its columns is asked for its first row.
    """
    import datasets

    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return set()
    return {*(rows.column_names or next(iter(rows), {}))}


def columns_of(dataset: Any, name: str) -> tuple[list[str], dict[str, Any]]:
    """The names of the columns, and the first row.

    Raises:
        ValueError: no rows, or columns of images, sounds or films.
    """
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    for column, feature in (dataset.features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, media):  # a table of them cannot even be read without more packages
            raise ValueError(f"{name}: {media_refusal(column, type(inner).__name__)}")
    first = next(iter(dataset.with_format(None)), None)
    if first is None:
        raise ValueError(f"{name}: the dataset has no rows; expected at least one")
    return list(dataset.column_names or first), first


def require(columns: list[str], expected: tuple[str, ...], name: str, also: str) -> None:
    """Refuses a dataset without the columns `expected`."""
    missing = [column for column in expected if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: expected the columns {', '.join(expected)} ({also}); "
            f"{', '.join(missing)} missing, found {', '.join(columns)}"
        )


def prompt_column(
    columns: list[str], first: dict[str, Any], completion: str, name: str
) -> str | None:
    """The column that holds the prompt; None: what chosen and rejected begin with is the prompt.

    Args:
        columns, first: as `columns_of` returns them.
        completion: a column that holds a completion.
        name: what messages call the dataset.

    Raises:
        ValueError: columns that look like parts of a prompt, and none that is one.
    """
    contexts = [column for column in _CONTEXTS if column in columns and first.get(column)]
    if "prompt" in columns:
        if contexts:
            _warn_unread(name, contexts)
        return "prompt"
    asked = [column for column in _PROMPTS if column in columns]
    if isinstance(first.get(completion), list):  # messages, which hold the question themselves
        if asked or contexts:
            _warn_unread(name, [*asked, *contexts])
        return None
    if not asked and not contexts:
        return None
    text, question = first.get(completion), first.get(asked[0]) if asked else None
    whole = isinstance(text, str) and isinstance(question, str) and text.startswith(question)
    if len(asked) == 1 and not contexts and not (whole and question):
        warnings.warn(
            f"{name}: no column prompt; the column {asked[0]} is taken for it", stacklevel=4
        )
        return asked[0]
    found = ", ".join([*asked, *contexts])
    raise ValueError(
        f"{name}: no column prompt beside {completion}, but {found}, of which the prompt may be "
        "made in more than one way; expected a column prompt (make it with dataset.map, or leave "
        f"out what is not part of it: dataset.remove_columns({[*asked, *contexts]}))"
    )


def _warn_unread(name: str, columns: list[str]) -> None:
    what = "column is" if len(columns) == 1 else "columns are"
    warnings.warn(
        f"{name}: the {what} not read: {', '.join(columns)} (what the prompt is to hold belongs "
        "into the column prompt)",
        stacklevel=4,
    )
