"""Options from a recipe (YAML) and the command line, which wins; each fault of them in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from tralign_fast import LOSSES
from tralign_fast.training.option_types import (
    TAKEN,
    OneOf,
    bounds_of,
    checked,
    nearest,
    own_options,
    refusal,
    rule_of,
    shown,
)


def parse(command: str, classes: Sequence[type], arguments: Sequence[str]) -> list[Any]:
    """One object of each dataclass.

    Raises:
        ValueError: one line that names the option, its value and what was expected, and for a
            recipe the line.
    """
    return Given(command, classes, arguments).built()


class Given:
    """Options as they were given, before the dataclasses are made of them.

    Raises:
        ValueError: as `parse`.
    """

    def __init__(self, command: str, classes: Sequence[type], arguments: Sequence[str]) -> None:
        self._parser = parser = _Parser(classes, command)
        if arguments and not arguments[0].startswith("-"):
            hint = "; a recipe is given as --config" if Path(arguments[0]).suffix else ""
            raise ValueError(f"{arguments[0]}: expected --option value{hint}")
        parser.check_names(arguments)
        first = _OnlyConfig(prog=parser.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        if (path := first.parse_known_args(arguments)[0].config) is not None:
            parser.read(path)
        self._values, rest = parser.parse_known_args(arguments)
        if rest:
            raise ValueError(f"{rest[0]}: expected --option value")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._values, name)

    @property
    def names(self) -> set[str]:
        """Those that a recipe or the command line has."""
        return self._parser.given

    def default(self, name: str, value: Any) -> None:
        """Sets an option that was not given."""
        if name not in self.names:
            setattr(self._values, name, value)

    def built(self) -> list[Any]:
        return self._parser.built(self._values)


_NO_OPTIONS = ("help", "help_all", "config")


class _Help(argparse.Action):
    """Prints the options in groups, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help, default=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        from tralign_fast.command_help import page

        print(page(parser, everything=self.dest == "help_all"))
        parser.exit()


class _OnlyConfig(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (\S+): ", r"\1: ", message))


class PositionalParser(argparse.ArgumentParser):
    """Of commands that take files; a mistake is a ValueError of one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        what = re.sub(r"^argument (\S+): ", r"\1: ", message)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            meant = nearest(unknown[1], self._option_string_actions)
            what = f"{unknown[1]}: no such option" + (f"; did you mean {meant}?" if meant else "")
        raise ValueError(f"{what} ({self.prog} --help)")


class _Parser(HfArgumentParser):
    """An option for every field of the dataclasses and for every option of the losses."""

    def __init__(self, classes: Sequence[Any], command: str) -> None:
        super().__init__(
            list(classes), prog=f"tralign-fast {command}", allow_abbrev=False, add_help=False
        )
        self.given: set[str] = set()
        self.hints = {name: hint for c in classes for name, hint in _hints(c).items()}
        for action in self._actions:  # what stands in a range is in the help, too
            rule = rule_of(self.hints.get(action.dest))
            if rule is not None and action.help:
                words = str(rule) if isinstance(rule, OneOf) else bounds_of(rule)
                action.help = f"{action.help} Expected: {words}.".replace("%", "%%")
        self.add_argument(
            "--config", help="A recipe: a file of lines `option: value` (YAML), or one that ships."
        )
        self.losses = self._add_loss_options() if "loss_options" in self.hints else []
        self.add_argument("-h", "--help", action=_Help, help="These options.")
        self.add_argument("--help-all", "--help_all", action=_Help, help="Those of Trainer, too.")

    def _add_loss_options(self) -> list[str]:
        """Those of registered losses without a field of their own; `loss_options` holds them."""
        takers: dict[str, list[str]] = {}
        for loss, spec in LOSSES.items():
            for option in spec.options:
                if option.name not in self.hints:
                    takers.setdefault(option.name, []).append(loss)
        for name, losses in takers.items():
            help = f"An option of {', '.join(losses)}; goes into loss_options."
            self.add_argument(f"--{name}", type=float, default=None, help=help)
        return [*takers]

    def error(self, message: str) -> NoReturn:
        """What argparse has found, without its page of usage."""
        found = re.match(r"argument (?:.*?/)*?(--\w+)\S*: (.*)", message, re.DOTALL)
        if found is None:
            message = re.sub(r"/--\w+", "", message)  # other names of an option
            raise ValueError(f"{message} ({self._example()}{self.prog} --help)")
        name, what = found[1], found[2]
        value = re.match(r"invalid .*?(?:value|choice): ('.*?'|\".*?\")|.*got (.*?) but", what)
        hint = self.hints.get(name.removeprefix("--"))
        if value is not None and hint is not None:
            raise ValueError(refusal(name, value[2] or value[1][1:-1], hint))
        raise ValueError(f"{name}: {what}")

    def _example(self) -> str:
        """A short command that would do, where something is required."""
        needed = [action for action in self._actions if action.required]
        words = " ".join(f"--{action.dest} {action.dest.upper()}" for action in needed)
        return f"{self.prog} {words}; " if needed else ""

    def check_names(self, arguments: Sequence[str]) -> None:
        """Raises ValueError for options that are not there, or there twice."""
        seen: dict[str, str] = {}
        for word in arguments:
            name = word.split("=")[0]
            if not re.match(r"--?[A-Za-z]", name) or name.lower() in ("-inf", "-nan", "-infinity"):
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                raise ValueError(f"{name}: no such option{self._meant(name.lstrip('-'), '--')}")
            if action.dest in seen:
                before = seen[action.dest]
                both = name if before == name else f"{before} and {name}"
                raise ValueError(f"{both}: expected once, got it twice")
            seen[action.dest] = name
        self.given.update(seen)

    def _meant(self, name: str, dashes: str = "") -> str:
        known = {action.dest for action in self._actions}
        if (meant := nearest(name, known)) and meant != name:
            return f"; did you mean {dashes}{meant}?"
        losses = ", also those of the losses in LOSSES" if "loss_options" in self.hints else ""
        return f"; {self.prog} --help lists them{losses}"

    def read(self, path: str) -> None:
        """Takes the values of a recipe for defaults."""
        where = f"--config {path}"
        recipe, lines = _read_recipe(path)
        known = {action.dest: action for action in self._actions if action.dest not in _NO_OPTIONS}
        written, recipe = recipe, {}
        for word, value in written.items():
            place = f"{where}: line {lines[word]}: "
            alias = self._option_string_actions.get(f"--{word}")
            name = word if word in known or alias is None else alias.dest  # TRL's name of one
            if name not in known or (alias is not None and alias.const is False):
                raise ValueError(f"{place}{word}: no such option{self._meant(str(word))}")
            if name in recipe:
                raise ValueError(f"{place}{word}: expected once, {name} is the same option")
            try:
                recipe[name] = self._taken(known[name], value)
            except ValueError as error:
                words = _yaml_words(value) if "word" in str(error) or "one of" in str(error) else ""
                raise ValueError(f"{place}{error}{words}") from None
        for action in self._actions:
            action.required = action.required and action.dest not in recipe
        self.set_defaults(**recipe)
        self.given.update(recipe)

    def _taken(self, action: argparse.Action, value: Any) -> Any:
        """A recipe's value in the option's type."""
        hint = self.hints.get(action.dest, float | None)
        if value is not None and value is action.const:
            return value
        try:
            return checked(action.dest, value, hint)
        except ValueError as error:
            if not isinstance(value, str) or not callable(action.type):
                raise
            try:  # as on the command line; YAML takes 1e-6 for a word
                value = action.type(value)
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                raise error from None
            return checked(action.dest, value, hint)

    def built(self, given: argparse.Namespace) -> list[Any]:
        """The dataclasses, of values of the right types."""
        own = {n: v for n in self.losses if (v := getattr(given, n)) is not None}
        if own:
            given.loss_options = _with(own, given.loss_options)
        actions = {action.dest: action for action in reversed(self._actions)}
        made = []
        for dataclass in self.dataclass_types:
            values = {}
            for field in dataclasses.fields(dataclass):
                if field.init:
                    name, value = field.name, getattr(given, field.name)
                    free = value is actions[name].const or _is_default(field, value)
                    values[name] = value if free else checked(name, value, self.hints[name])
            made.append(dataclass(**values))
            if "given" in dataclass.__dataclass_fields__:
                made[-1].given = frozenset(self.given)
        return made


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return value is field.default or value == field.default


def _hints(dataclass: type) -> dict[str, Any]:
    """Name -> annotation of all fields, those of the parents too."""
    hints = typing.get_type_hints(dataclass, include_extras=True)
    if issubclass(dataclass, TrainingArguments):
        own = own_options(dataclass)
        hints |= {name: hint for name, (hint, _) in TAKEN.items() if name not in own}
    return {f.name: hints[f.name] for f in dataclasses.fields(dataclass) if f.init}


def _yaml_words(value: Any) -> str:
    if not isinstance(value, bool):
        return ""
    words = "yes, on and true" if value else "no, off and false"
    return f" (YAML reads {words} as this: put a word in quotes)"


def _with(own: dict[str, float], table: Any) -> Any:
    """`loss_options` and the options that have a name of their own on the command line."""
    try:
        table = json.loads(table) if isinstance(table, str) else table
    except json.JSONDecodeError:
        return table  # the config says what is wrong with it
    if not isinstance(table, (dict, type(None))):
        return table
    if twice := {*own} & {*(table or {})}:
        raise ValueError(f"{min(twice)}: expected once, got it in loss_options, too")
    return {**(table or {}), **own}


# --- recipes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_errors(where: Any) -> Iterator[None]:
    """What is wrong with a text of YAML, as a ValueError of one line that begins with `where`."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}: {place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{where}: {reason[0]}; expected lines of `option: value`") from None


def options_in(path: str) -> set[str]:
    """The names that stand in a recipe; none of what is no recipe, which `parse` refuses."""
    try:
        return {str(name) for name in _read_recipe(path)[0]}
    except ValueError:
        return set()


SHIPPED = Path(__file__).parent / "recipes"


def recipe_file(path: str) -> Path:
    """The file itself, or the recipe of that name that ships with the package."""
    shipped = SHIPPED / f"{path.removesuffix('.yaml')}.yaml"
    return shipped if not Path(path).exists() and shipped.is_file() else Path(path)


def _read_recipe(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The options of a recipe, and the lines where they stand."""
    where = f"--config {path}"
    try:
        text = recipe_file(path).read_text(encoding="utf-8-sig")
        with one_line_errors(where):
            loader = _Loader(text)
            node = loader.get_single_node()
            recipe = {} if node is None else loader.construct_document(node)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; expected a file of YAML") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}: line {line}: not UTF-8; expected text in UTF-8") from None
    if not isinstance(recipe, dict) or not isinstance(node, (yaml.MappingNode, type(None))):
        raise ValueError(f"{where}: expected lines of `option: value`, got {shown(recipe)}")
    keys = [] if node is None else [key for key, _ in node.value]
    lines = {loader.construct_object(key, deep=True): key.start_mark.line + 1 for key in keys}
    return recipe, {**dict.fromkeys(recipe, 1), **lines}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="expected an option's name before the colon",
                    problem_mark=key.start_mark,
                )
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the option {name} stands there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)
