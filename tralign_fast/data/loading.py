"""Rows from a file, a folder or the hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tralign_fast.data.files import PACKED, READERS, Fault, read_files, reader_of, reason

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_rows"]

_EXPECTED = (
    "a .jsonl, .json, .parquet or .csv file (also .jsonl.gz, .json.zst, …), a folder of such "
    "files, or a hub id"
)
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# what datasets and models write beside their rows
_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def load_rows(source: str | Path, split: str = "train", config: str | None = None) -> Dataset:
    """Load the rows of a dataset.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, all but .parquet also packed as .gz or .zst;
            a folder made by `save_to_disk` or holding such files; or the id of a dataset on the
            Hugging Face hub. What is on disk wins.
        split: which split of a folder or a hub dataset; a file is one split, whatever its name.
            In a folder, files and folders named train, validation or test are these splits; without
            such names all files are train. Slices such as "train[:100]" work, except on what
            `save_to_disk` made.
        config: the configuration of a hub dataset that has several.

    Returns:
        The rows, at least one. In a .csv, cells keep their text: an empty cell, "NA", "yes" or
        "007" stays what it is; only a column `label` of true and false, or 1 and 0, becomes that.

    Raises:
        ValueError: nothing at `source`, not readable, no such split, or no rows. One line, which
            names the file's line where there is one.
    """
    source = str(source)
    path = Path(source).expanduser()
    if config is not None and (path.exists() or _looks_like_path(source)):
        raise ValueError(f"{source}: datasets of the hub have configurations, got {config!r}")
    if path.is_dir():
        dataset = _load_folder(path, source, split)
    elif path.is_file():
        dataset = _load_file(path, source, split)
    elif _looks_like_path(source):
        raise ValueError(f"{source}: no such file or folder; expected {_EXPECTED}")
    else:
        dataset = _load(source, f"{_EXPECTED} (not on disk)", source, split, name=config)
    if not len(dataset):
        raise ValueError(f"{source}: no rows in the split {split}; expected at least one")
    return dataset


def _looks_like_path(source: str) -> bool:
    if not source or source.startswith((".", "/", "~")) or "\\" in source or "\0" in source:
        return True
    return source.count("/") > 1 or Path(source).suffix.lower() in (*READERS, *PACKED)


def _load_file(path: Path, source: str, split: str) -> Dataset:
    reader = reader_of(path)
    if reader is None:
        kind = "".join(path.suffixes[-2:]) if path.suffix.lower() in PACKED else path.suffix
        raise ValueError(
            f"{source}: unknown file type {kind or '(no extension)'}; expected {_EXPECTED}"
        )
    return _sliced(_read([path], reader, source, path), split, source)


def _load_folder(path: Path, source: str, split: str) -> Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, source, split)
    card = path / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE):
        return _load(source, f"a folder with a split {split}", str(path), split)
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and _is_rows(f.relative_to(path))]
    readers = {reader_of(file) for file in files}
    if len(readers) != 1:
        kinds = " and ".join(sorted({f.suffix for f in files})) if files else "no"
        raise ValueError(f"{source}: a folder with {kinds} files; expected files of one known type")
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)), []).append(file)
    rest = splits.pop(None, [])
    if not splits:
        splits = {"train": rest}
    elif rest:
        names = ", ".join(str(file.relative_to(path)) for file in rest[:5])
        warnings.warn(f"{source}: not read, as no split is named: {names}", stacklevel=3)
    wanted = re.split(r"[\[+]", split)[0]
    if wanted not in splits:
        raise ValueError(
            f"{source}: no split {wanted}; expected one of {', '.join(map(str, splits))}"
        )
    return _sliced(_read(splits[wanted], readers.pop() or "", source, path), split, source)


def _is_rows(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return not hidden and path.name not in _ABOUT and reader_of(path) is not None


def _split_of(path: Path) -> str | None:
    """The split that a file is named after, or else the folder that it lies in."""
    for part in reversed(path.parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _read(files: list[Path], reader: str, source: str, root: Path) -> Dataset:
    """The rows of files; a fault names `source`, and in a folder the file."""
    try:
        return read_files(files, reader)
    except Fault as fault:
        within = "" if fault.file == root else str(fault.file.relative_to(root))
        place = " ".join(part for part in (within, fault.place) if part)
        prefix = f"{source}: {place}: " if place else f"{source}: "
        raise ValueError(prefix + fault.what) from fault.__cause__


def _sliced(dataset: Dataset, split: str, source: str) -> Dataset:
    """The part that a split such as train[10%:20%] means."""
    import datasets

    if not re.search(r"[\[+]", split):
        return dataset
    name = split.split("[")[0]
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
        rows = [i for span in spans for i in range(span.from_ or 0, span.to or 0)]
    except Exception as error:  # a ValueError or an AssertionError of several lines
        raise ValueError(f"{source}: expected a slice of {name}, got {split}") from error
    return dataset.select(rows)


def _load_saved(path: Path, source: str, split: str) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{source}: expected what save_to_disk makes: {reason(error)}") from error
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
        raise ValueError(f"{source}: expected {expected}: {reason(error)}") from error
