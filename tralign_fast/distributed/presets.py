"""The options of `recipes/parallel`: what a way to share the work sets in a `TRConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parents[1] / "recipes" / "parallel"


def preset(parallel: str) -> dict[str, Any]:
    """The options of "fsdp2" or "zero3", as they stand in the recipe of that name."""
    return yaml.safe_load((_FOLDER / f"{parallel}.yaml").read_text(encoding="utf-8"))
