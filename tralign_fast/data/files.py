"""Files of rows: JSON, JSON lines, CSV and Parquet, also packed, each fault named by its line.

JSON goes through the reader of `datasets`, which is fast and keeps what it made on disk, where the
file is plainly one object a line. It crashes on some others, and takes dates for times: these are
parsed here, line by line. So is CSV, whose cells are text and whose rows are as long as its header.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import inspect
import io
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PACKED = (".gz", ".zst")
_DEEP = 64  # levels that a table of Arrow can hold
_BEGIN = re.compile(rb"\s*\{\s*[^\s}]")  # of an object that is not empty
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BOM = b"\xef\xbb\xbf"
_BOMS_OF_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell's > writes it


class Fault(ValueError):
    """What is wrong where in a file, in one line."""

    def __init__(self, file: Path, place: str, what: str) -> None:
        super().__init__(f"{file}: {place}: {what}" if place else f"{file}: {what}")
        self.file, self.place, self.what = file, place, what


def reader_of(path: Path) -> str | None:
    """json, parquet or csv, by the suffixes in either case; None for other files."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return READERS.get(suffix)
    inner = READERS.get(Path(path.stem).suffix.lower())
    return None if inner == "parquet" else inner


def read_files(files: list[Path], reader: str) -> Dataset:
    """The rows of files that `reader` reads, one file after the other.

    Raises:
        Fault: what is wrong with which line of which file.
    """
    for file in files:
        if not file.stat().st_size:
            raise Fault(file, "", "the file is empty; expected at least one row")
    if reader == "csv":
        return _read_csv(files)
    if reader == "parquet":
        return _load(reader, files)
    if all(_is_plain(file) for file in files):
        try:
            dataset = _load(reader, [_unpacked(file) for file in files])
        except Fault:
            pass  # the parser below names the line, or reads what this reader does not
        else:
            kinds = {kind for f in dataset.features.values() for kind in _kinds(f)}
            if "Json" in kinds:  # of rows of several shapes, whose parser lets some faults pass
                for file in files:
                    _check_lines(file)
            if not any(kind.startswith("time") for kind in kinds):
                return dataset
    return _table([row for file in files for row in _json_rows(file)], files[0])


def _load(reader: str, files: list[Path], **options: Any) -> Dataset:
    import datasets

    names = [glob.escape(str(file.resolve())) for file in files]
    log = logging.getLogger(f"datasets.packaged_modules.{reader}.{reader}")
    before, log.disabled = log.disabled, True  # it logs the error that it raises
    try:
        return datasets.load_dataset(reader, data_files={"train": names}, split="train", **options)
    except Exception as error:  # readers raise errors of a dozen unrelated types
        raise Fault(files[0], "", f"expected rows of {reader}: {reason(error)}") from error
    finally:
        log.disabled = before


def _kinds(feature: Any) -> Iterator[str]:
    """The types of a column, also within lists and objects.

    A time is text that Arrow's JSON reader took for one, as it does with 2024-01-01.
    """
    if isinstance(feature, dict):
        for inner in feature.values():
            yield from _kinds(inner)
    elif (inner := getattr(feature, "feature", None)) is not None:
        yield from _kinds(inner)
    else:
        yield str(getattr(feature, "dtype", ""))
        yield type(feature).__name__


def _table(rows: list[dict[str, Any]], file: Path) -> Dataset:
    import datasets

    if not rows:
        raise Fault(file, "", "no rows; expected at least one")
    names = {name: None for row in rows for name in row}
    from_list: Any = datasets.Dataset.from_list
    mixed = "on_mixed_types"  # columns of text in some rows and lists in others
    options = {mixed: "use_json"} if mixed in inspect.signature(from_list).parameters else {}
    try:
        return from_list([{**names, **row} for row in rows], **options)
    except Exception as error:
        raise Fault(file, "", f"expected rows of one shape: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The innermost reason: `datasets` wraps a reader's error in one that says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- packed files ---------------------------------------------------------------------------------


def _open(file: Path) -> BinaryIO:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")  # pyright: ignore[reportReturnType]
    if suffix != ".zst":
        return file.open("rb")
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise Fault(file, "", "this pyarrow reads no zstd; expected one that does, or a .gz")
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return io.BufferedReader(stream)  # pyright: ignore[reportArgumentType, reportReturnType]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1."""
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except (EOFError, OSError, zlib.error) as error:
        what = f"cannot be read: {reason(error)}; expected a whole file"
        raise Fault(file, f"line {number + 1}", what) from error


def _unpacked(file: Path) -> Path:
    """What a .zst holds, in the cache of `datasets`, whose readers unpack only .gz for certain."""
    if file.suffix.lower() != ".zst":
        return file
    from datasets import config

    state = file.stat()
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode()
    folder = Path(config.HF_DATASETS_CACHE) / "tralign_fast"
    whole = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.jsonl"
    if not whole.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = whole.with_suffix(f".{os.getpid()}")
        with part.open("wb") as out:
            out.writelines(line for _, line in _lines(file))
        part.rename(whole)
    return whole


# --- JSON -----------------------------------------------------------------------------------------


def _is_plain(file: Path) -> bool:
    """Whether every line begins an object, or is blank: what the reader of `datasets` is safe with.

    Raises:
        Fault: a line that is not UTF-8.
    """
    plain, rows = True, 0
    for number, line in _lines(file):
        _text(line, file, number)
        begin = _BEGIN.match(line)
        rows += begin is not None
        plain = plain and (begin is not None or not line.strip()) and not _may_be_deep(line)
    return plain and rows > 0


def _text(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        guess = "UTF-16" if line.startswith(_BOMS_OF_UTF16) else "Latin-1"
        byte = f"0x{line[error.start]:02x}"
        what = f"the byte {byte} is not UTF-8; expected UTF-8 (is it {guess}?)"
        raise Fault(file, f"line {number}", what) from None


def _may_be_deep(line: bytes) -> bool:
    """Whether a line nests so deep that it would overflow the stack of Arrow's parser."""
    if line.count(b"[") + line.count(b"{") <= _DEEP:
        return False
    depth = most = 0
    for bracket in re.findall(rb"[\[{\]}]", _STRINGS.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        most = max(most, depth)
    return most > _DEEP


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file: one a line, a list of them, or a single one."""
    lines = list(_lines(file))
    text = "".join(_text(line, file, number) for number, line in lines).removeprefix("\ufeff")
    if text.lstrip()[:1] not in ("[", "{"):
        lines = [(n, line.removeprefix(_BOM)) for n, line in lines if line.strip()]
        if not lines:
            raise Fault(file, "", "no rows; expected at least one")
    elif text.lstrip()[:1] == "[" or _is_one_object(text):
        whole = _parsed(text, file, "")
        items = whole if isinstance(whole, list) else [whole]
        return [_row(item, file, f"item {i + 1}") for i, item in enumerate(items)]
    return [row for number, line in lines for row in _line_rows(line, file, number)]


def _line_rows(line: bytes, file: Path, number: int) -> list[dict[str, Any]]:
    """The row of a line, none of a blank one."""
    text = _text(line, file, number).removeprefix("\ufeff")
    place = f"line {number}"
    return [_row(_parsed(text, file, place), file, place)] if text.strip() else []


def _check_lines(file: Path) -> None:
    for number, line in _lines(file):
        _line_rows(line, file, number)


def _is_one_object(text: str) -> bool:
    """Whether an object is written over several lines."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        pass
    else:
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, file: Path, place: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        expected = "expected one object a line, or a list of objects"
        what = f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}; {expected}"
        raise Fault(file, place or f"line {error.lineno}", what) from None
    except RecursionError:
        raise Fault(file, place, "nests too deep; expected text or messages") from None
    except UnicodeEncodeError:
        what = "holds half of a surrogate pair (\\ud800 to \\udfff); expected text"
        raise Fault(file, place, what) from None
    except ValueError as error:  # a key that stands twice, or a number of thousands of digits
        raise Fault(file, place, str(error).splitlines()[0]) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the key {twice!r} twice; expected it once")
    return made


def _row(value: Any, file: Path, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 40 else shown[:40] + "…"
        raise Fault(file, place, f"is {shown}; expected an object with the columns of a row")
    return value


# --- CSV ------------------------------------------------------------------------------------------


def _read_csv(files: list[Path]) -> Dataset:
    import datasets

    header = _header(files[0])
    for file in files[1:]:
        if (other := _header(file)) != header:
            columns = f"{', '.join(other)}; expected those of {files[0].name}: {', '.join(header)}"
            raise Fault(file, "line 1", f"has the columns {columns}")
    # what is made is kept on disk under a hash of these
    stamps = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    try:
        dataset = datasets.Dataset.from_generator(
            _csv_rows,
            features=datasets.Features({name: datasets.Value("string") for name in header}),
            gen_kwargs={"files": tuple(map(str, files)), "stamps": stamps},
        )
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, Fault):
            inner = inner.__cause__ or inner.__context__
        if inner is not None:
            raise inner from None
        raise Fault(files[0], "", f"expected rows of csv: {reason(error)}") from error
    return _with_labels(dataset)  # pyright: ignore[reportArgumentType]


def _csv_rows(files: tuple[str, ...], stamps: str) -> Iterator[dict[str, str]]:
    for file in map(Path, files):
        records = _records(file)
        header = _header(file)
        next(records)
        for line, cells in records:
            if len(cells) != len(header):
                what = f"has {len(cells)} cells; expected {len(header)}, as the header has"
                raise Fault(file, f"line {line}", what)
            yield dict(zip(header, cells, strict=True))


def _header(file: Path) -> list[str]:
    line, names = next(_records(file), (1, []))
    # pandas writes an index under no name
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    if not names:
        raise Fault(file, "", "no rows; expected a header and at least one row")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Fault(file, f"line {line}", f"has the column {twice!r} twice; expected it once")
    return names


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the line where it begins."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = (_text(line, file, number) for number, line in _lines(file))
    lines = (line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(lines))
    reader = csv.reader(lines, strict=True)
    begin = 1
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise Fault(file, f"line {begin}", f"is not CSV: {error}; expected quoted cells") from None
    finally:
        csv.field_size_limit(limit)


def _with_labels(dataset: Dataset) -> Dataset:
    """A column `label` of true and false, or 1 and 0, as such: cells are text."""
    import datasets

    values = {"true": True, "1": True, "false": False, "0": False, "": None}
    if "label" not in dataset.column_names:
        return dataset
    words = {str(word).strip().lower() for word in dataset.unique("label")}
    if not words <= values.keys() or words == {""}:
        return dataset
    return dataset.map(
        lambda batch: {"label": [values[word.strip().lower()] for word in batch["label"]]},
        batched=True,
        features=datasets.Features({**dataset.features, "label": datasets.Value("bool")}),
    )
