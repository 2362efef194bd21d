"""Which folders hold a run, which checkpoints are whole, and of what data they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from tralign_fast._backend import warn_once

REFERENCE_FOLDER = "reference"


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
    """Of a tokenised dataset's size and some of its rows; None for a stream."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    size = len(dataset)
    rows = [dataset[i] for i in sorted({0, size // 3, size // 2, size - 1})] if size else []
    return hashlib.blake2b(repr((size, rows)).encode(), digest_size=8).hexdigest()
