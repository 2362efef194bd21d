"""Whether options have the types that their fields declare, be they from Python or from YAML."""

from __future__ import annotations

import math
import sys
import types
import typing
from typing import Any

_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}


def check_types(config: Any, fields: type) -> None:
    """Checks the options that the class `fields` declares itself; makes whole numbers of floats
    such as 4.0 where one is declared.

    Raises:
        ValueError: another type, NaN or infinity; names option, value and what was expected.
    """
    hints = typing.get_type_hints(fields)
    for name in fields.__annotations__:
        if typing.get_origin(hints[name]) is typing.ClassVar:
            continue
        value = getattr(config, name)
        kinds = _kinds(hints[name])
        fits, value = _fit(value, kinds)
        if not fits:
            last = sorted(kinds, key=lambda kind: kind is type(None))
            expected = " or ".join(_word(kind) for kind in last)
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        setattr(config, name, value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fit(value: Any, kinds: tuple[Any, ...]) -> tuple[bool, Any]:
    for kind in kinds:
        base = typing.get_origin(kind) or kind
        if value is None or base is type(None):
            if value is None and type(None) in kinds:
                return True, None
        elif base is list and isinstance(value, (list, tuple)):
            inner = _kinds(typing.get_args(kind)[0])
            items = [_fit(item, inner) for item in value]
            return all(fits for fits, _ in items), [item for _, item in items] or list(value)
        elif base is bool or isinstance(value, bool):
            if base is bool and isinstance(value, bool):
                return True, value
        elif base is float and isinstance(value, (int, float)):
            return abs(value) < math.inf and abs(value) <= sys.float_info.max, value
        elif base is int and isinstance(value, int):
            return True, value
        elif base is int and isinstance(value, float) and value.is_integer():
            return True, int(value)
        elif base in (str, dict) and isinstance(value, base):
            return True, value
    return False, value


def _word(kind: Any) -> str:
    base = typing.get_origin(kind) or kind
    if base is list:
        return f"a list of {_word(typing.get_args(kind)[0]).removeprefix('a ')}s"
    return {**_WORDS, dict: "a table", type(None): "nothing"}[base]
