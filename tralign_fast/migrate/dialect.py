"""What the YAML of another trainer is to a recipe: its rules, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tralign_fast.migrate.report import Migration
from tralign_fast.training.option_types import shown

KEEP = object()  # the value as it is written
Options = dict[str, Any]


@dataclass
class Recipe:
    """The YAML that is read, and what becomes of it."""

    given: Options
    path: Path
    done: Migration
    options: Options = field(default_factory=dict)  # of the recipe, as far as they are known
    line: int | None = None  # of the option that is looked at

    def line_lost(self, name: str, why: str) -> None:
        place = f"line {self.line}: " if self.line else ""
        self.done.loses(f"{place}{name}: {why}")


Rule = str | None | Callable[[Recipe, Any], Options | None]


@dataclass(frozen=True)
class Dialect:
    """How another trainer's YAML is read."""

    name: str
    rules: dict[str, Rule]  # a name, a function, or None: not needed
    finish: Callable[[Recipe], Options]  # options that the others imply, and defaults that differ


def held_out(recipe: Recipe, split: str, size: Any) -> Options:
    """Rows at the end for evaluations; those trainers draw them."""
    if not isinstance(size, (int, float)) or size <= 0:
        return {}
    count = f"{round(100 * (1 - size))}%" if size < 1 else f"-{int(size)}"
    recipe.done.changes(
        f"evaluation: the last {size:g} of the rows, where they were drawn (rows of their own: "
        "eval_dataset)"
    )
    return {"dataset_split": f"{split}[:{count}]", "eval_split": f"{split}[{count}:]"}


def words(value: Any) -> list[str]:
    """A list, or words with commas between them."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def refused(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {shown(value)}")
