"""config.yaml of a run: all that it was told and all that it took by itself, as a recipe that
`train --config` takes again."""

from __future__ import annotations

import dataclasses
import enum
from importlib.metadata import version
from typing import Any

import yaml
from transformers import TrainingArguments

from tralign_fast.training.option_types import TAKEN, own_options

# of one start of a run, or secret
_LEFT_OUT = {
    "given", "resume", "resume_from_checkpoint", "overwrite_output_dir", "hub_token",
    "push_to_hub_token", "local_rank",
}  # fmt: skip


def recipe_of(*made: Any) -> str:
    """The text of a recipe with the options of dataclasses.

    Options of `TrainingArguments` that decide nothing here are written where they differ from
    transformers' defaults, whose version the first line names.
    """
    from tralign_fast import TRConfig

    rest: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for one in made:
        trainer = isinstance(one, TrainingArguments)
        own = {*own_options(TRConfig), *TAKEN} if trainer else None
        for field in dataclasses.fields(one):
            if not field.init or field.name in _LEFT_OUT:
                continue
            value = _plain(getattr(one, field.name))
            if own is None or field.name in own:
                whole[field.name] = value
            elif value != _plain(_default(field)):
                rest[field.name] = value
    rest.pop("logging_dir", None)  # named after the host and the hour
    head = (
        f"# tralign-fast train --config config.yaml --output_dir ANOTHER\n# Written by a run with "
        f"tralign-fast {_version('tralign-fast')}, transformers {_version('transformers')}.\n"
    )
    text = head + _yaml(whole)
    return text + (
        f"# of the training loop, other than transformers has it\n{_yaml(rest)}" if rest else ""
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # a checkout that is not installed
        return "?"


def _yaml(options: dict[str, Any]) -> str:
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=100)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
