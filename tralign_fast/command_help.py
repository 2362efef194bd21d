"""What `--help` prints: options in groups, the library's own first, each with type and default."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from tralign_fast.training.option_types import TAKEN, own_options, type_cell

# option with which a group begins, in the order of the dataclass, and what the group is called
_STARTS = {
    "train": {
        "model": "what is trained on what", "model_revision": "the model's loading",
        "use_peft": "adapters and few bits", "num_processes": "the run",
        "learning_rate": "steps", "loss_type": "the loss", "sync_ref_model": "the reference",
        "train_sampling_strategy": "the rows", "model_init_kwargs": "the model and its memory",
    },
}  # fmt: skip
_USUAL = "of the training loop, as in transformers' TrainingArguments"
_USUAL_TOO = (
    "optim", "lr_scheduler_type", "eval_strategy", "save_strategy", "report_to", "use_cpu",
)  # fmt: skip
_REST = "the rest of TrainingArguments, as transformers has them"
_WIDTH = 34
_METAVARS = {
    "true": "", "whole number": "N", "number": "X", "word": "WORD", "table": "JSON",
    "list of words": "WORD ...", "list of numbers": "X ...", "None": "WORD",
}  # fmt: skip


def page(parser: Any, everything: bool = False) -> str:
    """The help of a command.

    Args:
        parser: of `command_line`.
        everything: also the options of `TrainingArguments` that nothing here reads.
    """
    command = parser.prog.split()[-1]
    actions = {a.dest: a for a in reversed(parser._actions) if a.dest not in _ABOUT}
    needed = [f"--{name} {name.upper()}" for name, a in actions.items() if a.required]
    lines = [
        f"usage: {parser.prog} {' '.join(reversed(needed))} [--config RECIPE] [--option value ...]"
    ]
    if parser.description:
        lines += ["", parser.description]
    for title, names in _groups(parser, command, actions):
        if title != _REST or everything:
            lines += ["", f"{title}:"]
            lines += [text for name in names for text in _entry(parser, actions[name])]
    lines += ["", "about:"]
    lines += [text for name in _ABOUT for text in _about(parser, name)]
    return "\n".join(lines)


_ABOUT = ("config", "help", "help_all")


def _groups(
    parser: Any, command: str, actions: dict[str, argparse.Action]
) -> Iterator[tuple[str, list[str]]]:
    starts = _STARTS.get(command, {})
    left = dict.fromkeys(actions)
    for dataclass in parser.dataclass_types:
        of_trainer = issubclass(dataclass, TrainingArguments)
        own = own_options(dataclass) if of_trainer else dataclass.__dataclass_fields__
        title, names = "options", []
        for name in (n for n in own if n in actions):
            if name in starts:
                if names:
                    yield title, names
                title, names = starts[name], []
            names.append(name)
            left.pop(name)
        if names:
            yield title, names
    losses = [name for name in left if name in parser.losses]
    if losses:
        yield "of losses of your own", losses
    usual = [name for name in (*TAKEN, *_USUAL_TOO) if name in left]
    if usual:
        yield _USUAL, usual
    if rest := sorted(n for n in left if n not in usual and n not in losses):
        yield _REST, rest


def _entry(parser: Any, action: argparse.Action) -> list[str]:
    name = action.dest
    hint = parser.hints.get(name)
    unknown = "X" if name in parser.losses else "N"
    kind = unknown if hint is None else _METAVARS.get(type_cell(hint).split(" or ")[0], "WORD ...")
    also = [o for o in action.option_strings if o.lstrip("-").replace("-", "_") != name]
    text = action.help or ""
    taken = TAKEN.get(name)
    if taken is not None and not any(name in own_options(c) for c in _trainers(parser)):
        text = taken[1]
    text = " ".join(text.replace("%%", "%").split())
    if also:
        text += f" Also {', '.join(also)}."
    text = text.replace(" Expected: that is not empty.", "")
    return _wrapped(f"--{name} {kind}".rstrip(), f"{text}{_default(action)}")


def _trainers(parser: Any) -> list[Any]:
    return [c for c in parser.dataclass_types if issubclass(c, TrainingArguments)]


def _default(action: argparse.Action) -> str:
    value = getattr(action.default, "value", action.default)
    if action.required or value in (None, "", dataclasses.MISSING) or value is argparse.SUPPRESS:
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def _about(parser: Any, name: str) -> list[str]:
    action = next((a for a in parser._actions if a.dest == name), None)
    if action is None or (name == "help_all" and not _trainers(parser)):
        return []
    return _wrapped(", ".join(o for o in action.option_strings if "_" not in o), action.help or "")


def _wrapped(name: str, text: str) -> list[str]:
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    lines = textwrap.wrap(text, width - _WIDTH) or [""]
    head = f"  {name}"
    first = [f"{head:<{_WIDTH}}{lines.pop(0)}"] if len(head) < _WIDTH - 1 else [head]
    return [*first, *(" " * _WIDTH + line for line in lines)]
