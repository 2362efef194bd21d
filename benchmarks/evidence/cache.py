"""Folders of models that are made once: named by a hash of their configuration, whole or not there.

Results that are JSON have `arms.cached`; this is for what is written as files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1  # of the experiment with people's preferences: raised when its code changes its numbers
_CONFIG = "configuration.json"


def key_of(config: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **config}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(
    root: Path, name: str, config: dict[str, Any], make: Callable[[Path], None]
) -> Path:
    """The folder that `make(folder)` filled when it was first called with this configuration.

    It is filled under another name and moved into its place when it is whole.

    Raises:
        ValueError: what lies there is of another version or configuration (someone put it there).
    """
    config = {"format": FORMAT, **config}
    folder = root / f"{name}-{key_of(config)}"
    if not folder.is_dir():
        partial = root / f"{folder.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        write_json(partial / _CONFIG, config)
        partial.replace(folder)
    found = read_json(folder / _CONFIG)
    if found != json.loads(json.dumps(config)):
        raise ValueError(
            f"{folder}: expected what this version writes (format {FORMAT}), found "
            f"{'another configuration' if found else 'no configuration'}; remove the folder"
        )
    return folder


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """None where there is no file, or none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
