"""Rows from a file, a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_rows"]

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_EXPECTED = "a .jsonl, .json, .parquet or .csv file, a folder of such files, or a hub id"


def load_rows(source: str | Path, split: str = "train") -> Dataset:
    """Load the rows of a dataset.

    Args:
        source: a .jsonl, .json, .parquet or .csv file; a folder made by `save_to_disk` or holding
            such files; or the id of a dataset on the Hugging Face hub. What is on disk wins.
        split: which split of a folder or a hub dataset; a file is one split, whatever its name.
            Slices such as "train[:100]" work, except on what `save_to_disk` made.

    Returns:
        The rows, at least one. In a .csv, cells keep their text: an empty cell, "NA" or "None" does
        not become a missing value.

    Raises:
        ValueError: nothing at `source`, not readable, no such split, or no rows. One line.
    """
    source = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, source, split)
    elif path.is_file():
        dataset = _load_file(path, source, split)
    elif _looks_like_path(source):
        raise ValueError(f"{source}: no such file or folder; expected {_EXPECTED}")
    else:
        dataset = _load(source, f"{_EXPECTED} (not on disk)", source, split)
    if not len(dataset):
        raise ValueError(f"{source}: no rows in the split {split}; expected at least one")
    return dataset


def _looks_like_path(source: str) -> bool:
    if not source or source.startswith((".", "/", "~")) or "\\" in source:
        return True
    return source.count("/") > 1 or Path(source).suffix in _READERS


def _load_file(path: Path, source: str, split: str) -> Dataset:
    if path.suffix not in _READERS:
        raise ValueError(
            f"{source}: unknown file type {path.suffix or '(no extension)'}; expected {_EXPECTED}"
        )
    if not path.stat().st_size:
        raise ValueError(f"{source}: the file is empty; expected at least one row")
    reader = _READERS[path.suffix]
    files = {split.split("[")[0]: str(path)}
    return _load(source, f"rows of {reader}", reader, split, data_files=files, **_options(reader))


def _load_folder(path: Path, source: str, split: str) -> Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, source, split)
    found = {f.suffix for f in path.rglob("*") if f.is_file() and f.suffix in _READERS}
    readers = {_READERS[suffix] for suffix in found}
    if len(readers) != 1:
        kinds = " and ".join(sorted(found)) if found else "no"
        raise ValueError(f"{source}: a folder with {kinds} files; expected files of one known type")
    options = _options(readers.pop())
    return _load(source, f"a folder with a split {split}", str(path), split, **options)


def _options(reader: str) -> dict[str, Any]:
    return {"keep_default_na": False} if reader == "csv" else {}


def _load_saved(path: Path, source: str, split: str) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{source}: expected what save_to_disk makes: {_line(error)}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(
            f"{source}: no split {split}; expected one of {', '.join(map(str, saved))}"
        )
    return saved[split]


def _load(source: str, expected: str, where: str, split: str, **options: Any) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(where, split=split, **options)
    except Exception as error:  # its readers and the hub raise errors of a dozen unrelated types
        raise ValueError(f"{source}: expected {expected}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The innermost reason: `datasets` wraps a reader's error in one that says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
