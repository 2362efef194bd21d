"""The table of options, made from the config: `python -m tralign_fast.training.option_table FILE`
writes docs/configuration.md."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from tralign_fast.training.config import TRConfig
from tralign_fast.training.option_types import (
    TAKEN,
    OneOf,
    bounds_of,
    own_options,
    rule_of,
    type_cell,
)

_HEAD = """# Options of a run

Made by `make docs-config` from `TRConfig`, as the checks are: what is not in a cell is refused by
one line that names option, value and what was expected. On the command line they are `--option
value`, in a recipe `option: value`; `tralign-fast train --help` lists those of
`transformers.TrainingArguments`, too, all of which `TRConfig` has.

Options that contradict each other are refused, and those that another one leaves without effect
are warned of, by
[training/option_conflicts.py](../tralign_fast/training/option_conflicts.py). What a run that goes
on may change: [training/resume.py](../tralign_fast/training/resume.py).

## Of trust-region alignment

"""
_TAKEN = """
## Of TrainingArguments

Those that are checked here, as they decide what a run computes.

"""
_COLUMNS = ("option", "type", "range or choices", "default", "what it is")


def page() -> str:
    """The text of docs/configuration.md."""
    fields = {field.name: field for field in dataclasses.fields(TRConfig)}
    own = own_options(TRConfig)
    rows = [_row(n, hint, fields[n], fields[n].metadata["help"]) for n, hint in own.items()]
    taken = {n: t for n, t in TAKEN.items() if n in fields and n not in own}
    others = [_row(n, hint, fields[n], help) for n, (hint, help) in taken.items()]
    return f"{_HEAD}{_table(rows)}{_TAKEN}{_table(others)}"


def _row(name: str, hint: Any, field: dataclasses.Field, help: str) -> tuple[str, ...]:
    return (f"`{name}`", type_cell(hint), _range(hint), _default(field), help)


def _range(hint: Any) -> str:
    rule = rule_of(hint)
    if isinstance(rule, OneOf):
        return ", ".join(rule)
    return "" if rule is None else bounds_of(rule)


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return f"`{getattr(value, 'value', value)}`"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *rows]
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md").write_text(
        page(), encoding="utf-8"
    )
