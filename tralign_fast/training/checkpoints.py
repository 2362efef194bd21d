"""Which folders hold a run, which checkpoints are whole, and of what data they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets.fingerprint import Hasher
from transformers.trainer import TRAINER_STATE_NAME

from tralign_fast.ops.backend import warn_once

REFERENCE_FOLDER = "reference"
_READ = 200_000  # rows of a dataset that are read to tell it from another
_BLOCK = 500  # of them lie together: a disk is not asked for single rows


def check_output_dir(output_dir: str | None) -> None:
    """Raises ValueError if the folder holds a run."""
    folder = Path(output_dir or ".")
    traces = ["checkpoint-*", "model*.safetensors", "adapter_model.safetensors", "summary.json"]
    found = [file.name for pattern in traces for file in folder.glob(pattern)]
    if found:
        raise ValueError(
            f"output_dir {folder} holds another run ({found[0]}): choose another folder, resume it "
            "with resume_from_checkpoint, or pass overwrite_output_dir"
        )


def check_whole(checkpoint: Path) -> None:
    """Raises ValueError if the writing of a checkpoint was interrupted."""
    if not is_whole(checkpoint):
        raise ValueError(
            f"{checkpoint} was cut short (no readable {TRAINER_STATE_NAME}): resume from an "
            "earlier checkpoint, or pass resume_from_checkpoint=True to find the newest whole one"
        )


def is_whole(checkpoint: Path) -> bool:
    """The trainer's state is written last, once every process has written what it has."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def newest_checkpoint(output_dir: str | None) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    folder = Path(output_dir or ".")
    found = [f for f in folder.glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda f: -int(f.name.rpartition("-")[2])):
        if is_whole(checkpoint):
            return checkpoint
        warn_once(f"{checkpoint} was cut short: the one before it is used")
    raise ValueError(f"output_dir {folder} holds no whole checkpoint to resume from")


def digest(dataset: Any) -> str | None:
    """Of a tokenised dataset, the same in every process; None for a stream.

    Up to `_READ` rows all count, wherever the dataset's memory or cache lies (100,000 pairs of 480
    tokens: 0.3 s). Of a larger one: its size, and blocks of rows spread evenly over it.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    size = len(dataset)
    starts = range(0, size, _BLOCK)
    every = -(-size // _READ)
    table = dataset.with_format("arrow")
    contents = [repr((size, sorted(dataset.features.items())))]
    for start in sorted({*starts[:: every or 1], *starts[-1:]}):
        rows = table[start : start + _BLOCK]
        columns = [rows[name].combine_chunks() for name in sorted(rows.column_names)]
        contents.append(Hasher.hash_bytes([part for c in columns for part in _contents(c)]))
    return Hasher.hash_bytes("".join(contents).encode())


def _contents(values: Any) -> Iterator[Any]:
    """Bytes of what an Arrow array holds, however it stores it (offsets, slices, spare room)."""
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        yield from _contents(values.value_lengths())
        yield from _contents(values.flatten())
    elif _is_plain(values):
        yield values.to_numpy(zero_copy_only=False).data
    else:
        yield repr(values.to_pylist()).encode()


def _is_plain(values: Any) -> bool:
    kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    return values.null_count == 0 and any(kind(values.type) for kind in kinds)
