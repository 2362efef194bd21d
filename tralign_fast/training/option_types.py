"""What values options take: types, ranges and choices, of which checks and documents are made.

A field says it in its annotation, and nothing else has to be written for a new option:

    beta: float = _option(...)                                    # any finite number
    alpha: Annotated[float, Range(0, 1)] = _option(...)           # in a range, both ends in it
    place: Annotated[str, OneOf("host", "disk")] = _option(...)   # one of these words
    weights: Annotated[list[float], Checked("≥ 0")] = _option(...)  # checked where it is used

Others that read the annotations (transformers' parser) see the plain type.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from tralign_fast.ops.objective import Range

AT_LEAST_ONE = Range(1, math.inf)
NOT_NEGATIVE = Range(0, math.inf)
SHARE = Range(0, 1)
UNDER_ONE = Range(0, 1, open_high=True)


class OneOf:
    """Words of which an option is one, and the keys that a registry has by then."""

    def __init__(self, *words: str, registry: Iterable[str] = ()) -> None:
        self._words = words
        self._registry = registry

    def __iter__(self) -> Iterator[str]:
        yield from self._words
        yield from self._registry

    def __contains__(self, value: object) -> bool:
        return value in tuple(self)

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


@dataclasses.dataclass(frozen=True)
class CountOrShare:
    """Whole steps, or under 1 a share of the run's; 0 where that means something."""

    zero: bool = False
    what: str = "steps"
    of: str = "the run"

    def __contains__(self, value: float) -> bool:
        if value == 0:
            return self.zero
        return 0 < value < 1 or (value >= 1 and value == int(value))

    def __str__(self) -> str:
        return f"of whole {self.what} ≥ {1 - self.zero}, or a share of {self.of} in (0, 1)"


LAYERS = CountOrShare(zero=True, what="layers", of="them")


class CountOrMinusOne:
    """Whole numbers, and -1 where something else decides."""

    def __contains__(self, value: float) -> bool:
        return value == -1 or value >= 1

    def __str__(self) -> str:
        return "≥ 1, or -1"


class NotEmpty:
    """Names that are there: a shell's unset variable is an empty word."""

    def __contains__(self, value: object) -> bool:
        return not isinstance(value, str) or value.strip() != ""

    def __str__(self) -> str:
        return "that is not empty"


class Checked(str):
    """Words of documents for what is checked where the option is used."""

    def __contains__(self, value: object) -> bool:
        return True


# Options of `TrainingArguments` that the library reads or that decide what a run computes: it takes
# nearly anything for them, and what it cannot use fails hours later.
_COUNT = Annotated[int, AT_LEAST_ONE]
_AMOUNT = Annotated[float, NOT_NEGATIVE]
TAKEN: dict[str, tuple[Any, str]] = {
    "output_dir": (
        Annotated[str | None, NotEmpty()],
        "Folder of the run: checkpoints, the model, its card.",
    ),
    "per_device_train_batch_size": (_COUNT, "Pairs, or completions, of a batch on a device."),
    "per_device_eval_batch_size": (_COUNT, "The same, in evaluation."),
    "gradient_accumulation_steps": (_COUNT, "Batches of an optimizer step."),
    "num_train_epochs": (
        Annotated[float, Range(0, math.inf, open_low=True)],
        "Times that the rows are trained on, where max_steps is -1.",
    ),
    "max_steps": (Annotated[int, CountOrMinusOne()], "Optimizer steps; -1: by the epochs."),
    "weight_decay": (_AMOUNT, "Weight decay of AdamW."),
    "adam_beta1": (Annotated[float, UNDER_ONE], "β₁ of AdamW."),
    "adam_beta2": (Annotated[float, UNDER_ONE], "β₂ of AdamW."),
    "adam_epsilon": (_AMOUNT, "ε of AdamW."),
    "max_grad_norm": (
        Annotated[float | None, NOT_NEGATIVE],
        "Norm to which gradients are clipped; 0: none is.",
    ),
    "warmup_steps": (_AMOUNT, "Steps of the warm-up; under 1, a share of the run's."),
    "seed": (Annotated[int, Range(0, 2**32 - 1)], "Seed of all that is drawn."),
    "data_seed": (
        Annotated[int | None, Range(0, 2**32 - 1)],
        "Seed of the order of rows; None: seed.",
    ),
    "fp16": (bool, "fp16 mixed precision."),
    "eval_steps": (
        Annotated[float | None, CountOrShare(zero=True)],
        "Steps between two evaluations; None and 0: logging_steps.",
    ),
    "save_steps": (
        Annotated[float, CountOrShare(zero=True)],
        "Steps between two checkpoints; 0: none.",
    ),
    "save_total_limit": (
        Annotated[int | None, NOT_NEGATIVE],
        "Checkpoints that are kept; None and 0: all.",
    ),
    "save_only_model": (bool, "Checkpoints of weights alone, from which nothing can go on."),
    "load_best_model_at_end": (bool, "End with the best weights that were evaluated."),
    "resume_from_checkpoint": (
        Annotated[str | bool | None, NotEmpty()],
        "On the command line: a checkpoint's folder, or true for the newest whole one.",
    ),
    "use_liger_kernel": (bool, 'transformers\' name of layer_kernels="liger".'),
    "torch_compile": (bool, "Compile the layers."),
    "dataloader_num_workers": (Annotated[int, NOT_NEGATIVE], "Processes that make batches."),
    "metric_for_best_model": (
        Annotated[str | None, NotEmpty()],
        "Metric by which the best checkpoint is known. None: the loss.",
    ),
    "eval_accumulation_steps": (
        Annotated[int | None, AT_LEAST_ONE],
        "Evaluation batches whose predictions stay on the device. None: all.",
    ),
    "neftune_noise_alpha": (
        Annotated[float | None, NOT_NEGATIVE],
        "Noise of NEFTune on embeddings in training. None: none.",
    ),
    "optim_args": (Annotated[str | None, NotEmpty()], "Options of some optimizers, as a=1,b=2."),
}

_WORDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "a word",
    dict: "a table", type(None): "nothing",
}  # fmt: skip
_CELLS = {float: "number", str: "word", int: "whole number", dict: "table", type(None): "None"}


@functools.cache
def own_options(fields: type) -> dict[str, Any]:
    """Name -> annotation of the options that a dataclass declares itself."""
    hints = typing.get_type_hints(fields, include_extras=True)
    return {
        name: hints[name]
        for name in fields.__annotations__
        if typing.get_origin(hints[name]) is not typing.ClassVar
    }


def check_types(config: Any, fields: type) -> None:
    """Checks the options that the class `fields` declares itself, and those of `TAKEN`; makes whole
    numbers of floats such as 4.0 where one is declared.

    Raises:
        ValueError: another type, out of range, NaN or infinity; names option, value and what was
            expected.
    """
    own = own_options(fields)
    taken = {n: hint for n, (hint, _) in TAKEN.items() if n not in own and hasattr(config, n)}
    for name, hint in {**own, **taken}.items():
        setattr(config, name, checked(name, getattr(config, name), hint))


def checked(name: str, value: Any, hint: Any) -> Any:
    """The value, in the type that the annotation declares.

    Raises:
        ValueError: it is no such value.
    """
    plain, rule = _split(hint)
    kinds = _kinds(plain)
    fits, made = _fit(value, kinds)
    if fits and (rule is None or made is None or made in rule):
        return made
    raise ValueError(refusal(name, value, hint))


def refusal(name: str, value: Any, hint: Any) -> str:
    """The line that refuses a value."""
    near = _near(value, hint)
    return f"{name}: expected {expectation(hint)}, got {shown(value)}{near}"


def expectation(hint: Any) -> str:
    """What messages say that an option takes."""
    plain, rule = _split(hint)
    kinds = _kinds(plain)
    if isinstance(rule, OneOf):
        return " or ".join([str(rule), *(["nothing"] if type(None) in kinds else [])])
    ranged = rule is not None and not isinstance(rule, Checked)
    bounds = {int: "a whole number", float: "a number", str: "a word"} if ranged else {}
    if any(_is_enum(kind) for kind in kinds):
        kinds = tuple(kind for kind in kinds if kind is not str)
    words = list(dict.fromkeys(bounds.get(kind) or _word(kind) for kind in kinds))
    limit = f" {bounds_of(rule)}" if ranged else ""
    return " or ".join(word + limit * (word in bounds.values()) for word in words)


def bounds_of(rule: Any) -> str:
    return str(rule).removesuffix(" and finite")


def type_cell(hint: Any) -> str:
    """The type, as the table of options has it."""
    return " or ".join(dict.fromkeys(_cell(kind) for kind in _kinds(_split(hint)[0])))


def rule_of(hint: Any) -> Any:
    """The range or the choices that an annotation holds; None: there are none."""
    return _split(hint)[1]


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The one that was meant, if it is clear."""
    folded = {w.lower().replace("-", "_"): w for w in words}
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), folded, 1, 0.6)
    return folded[found[0]] if found else None


def _near(value: Any, hint: Any) -> str:
    plain, rule = _split(hint)
    words = [*rule] if isinstance(rule, OneOf) else []
    words += [str(member.value) for kind in _kinds(plain) if _is_enum(kind) for member in kind]
    meant = nearest(value, words) if isinstance(value, str) else None
    return f"; did you mean {meant!r}?" if meant else ""


def shown(value: Any) -> str:
    """A value in a message: one line, and short, however deep a recipe nests it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return " ".join(short.repr(value).splitlines())
    except ValueError:  # an int of thousands of digits
        return "a number of more digits than Python prints"


def _split(hint: Any) -> tuple[Any, Any]:
    if typing.get_origin(hint) is Annotated:
        plain, rule = typing.get_args(hint)[:2]
        return plain, rule
    return hint, None


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fit_number(value: Any, base: type) -> tuple[bool, Any]:
    """numpy's numbers become Python's."""
    if not abs(value) <= sys.float_info.max:  # NaN, too, and whole numbers beyond
        return False, value
    if base is int:
        return value == int(value), int(value)
    return True, value if isinstance(value, (int, float)) else float(value)


def _fit(value: Any, kinds: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether a value is of one of the types, and the value in it."""
    for kind in kinds:
        base: Any = typing.get_origin(kind) or kind
        if base is Any:
            return True, value
        if value is None or base is type(None):
            if value is None and type(None) in kinds:
                return True, None
        elif base is typing.Literal:
            if any(value is word or value == word for word in typing.get_args(kind)):
                return True, value
        elif base is list and isinstance(value, (list, tuple)):
            inner = _kinds((*typing.get_args(kind), Any)[0])
            items = [_fit(item, inner) for item in value]
            return all(fits for fits, _ in items), [item for _, item in items] or list(value)
        elif base is bool or isinstance(value, bool):
            if base is bool and isinstance(value, bool):
                return True, value
        elif base in (int, float):
            if isinstance(value, numbers.Real):
                return _fit_number(value, base)
        elif _is_enum(base):
            members: Any = base
            if isinstance(value, base) or value in [member.value for member in members]:
                return True, value
            if isinstance(value, str):  # also declared as a word, of which few are right
                return False, value
        elif base is str and isinstance(value, os.PathLike):  # as transformers takes output_dir
            return True, os.fspath(value)
        elif isinstance(base, type) and isinstance(value, base):
            return True, value
    return False, value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _word(kind: Any) -> str:
    base = typing.get_origin(kind) or kind
    if base is list:
        return f"a list of {_word((*typing.get_args(kind), str)[0]).removeprefix('a ')}s"
    if base is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if _is_enum(base):
        return f"one of {', '.join(str(member.value) for member in base)}"
    return _WORDS.get(base) or f"a {base.__name__}"


def _cell(kind: Any) -> str:
    base = typing.get_origin(kind) or kind
    if base is list:
        return f"list of {_cell(typing.get_args(kind)[0])}s"
    return _CELLS.get(base) or _word(kind)
