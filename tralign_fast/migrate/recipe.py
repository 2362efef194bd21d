"""A YAML of axolotl or LLaMA-Factory as a recipe of `tralign-fast train`.

Lines that stay the same stay where they are, with their comments; what takes their place stands in
their place.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from tralign_fast.command_line import one_line_errors
from tralign_fast.migrate.axolotl import AXOLOTL
from tralign_fast.migrate.dialect import KEEP, Dialect, Options, Recipe
from tralign_fast.migrate.findings import as_ours
from tralign_fast.migrate.llama_factory import LLAMA_FACTORY
from tralign_fast.migrate.report import FROZEN, MOVING, Migration
from tralign_fast.training.option_types import nearest, shown


def migrate_yaml(text: str, path: Path, moving: bool) -> Migration | None:
    """The recipe; None: it is one already.

    Raises:
        ValueError: no YAML, or of no trainer that is known.
    """
    node, given = _read(text, path)
    if "base_model" in given:
        dialect = AXOLOTL
    elif "model_name_or_path" in given:
        dialect = LLAMA_FACTORY
    elif {"model", "dataset"} <= {*given} <= known_options():
        return None
    else:
        raise ValueError(
            f"{path}: expected a YAML of axolotl (base_model, rl), of LLaMA-Factory "
            f"(model_name_or_path, stage) or a recipe (model, dataset), got {shown([*given])}"
        )
    recipe = Recipe(given, path, Migration(text))
    blocks: list[Block] = []
    for key, _ in node.value:
        recipe.line = key.start_mark.line + 1
        blocks.append(_block(recipe, dialect, key.value, given.get(key.value)))
    recipe.line = None
    for ((name, options),) in blocks:
        for ours, value in options:
            recipe.options.setdefault(ours, given[name] if value is KEEP else value)
    extra = {n: v for n, v in dialect.finish(recipe).items() if n not in recipe.options}
    recipe.options |= extra
    _settle_reference(recipe, extra, moving)
    recipe.done.text = _written(text, node, blocks, extra)
    _check(recipe)
    return recipe.done


def _read(text: str, path: Path) -> tuple[yaml.MappingNode, Options]:
    with one_line_errors(path):
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        given = loader.construct_document(node) if node is not None else None
    if not isinstance(given, dict) or not isinstance(node, yaml.MappingNode) or node.flow_style:
        raise ValueError(f"{path}: expected lines of `option: value`, got {shown(given)}")
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in seen:
            raise ValueError(
                f"{path}: line {key.start_mark.line + 1}: expected an option's name that stands "
                f"there once, got {shown(key.value)}"
            )
        seen.add(key.value)
    return node, {str(name): value for name, value in given.items()}


Block = list[tuple[str, list[tuple[str, Any]]]]


def _block(recipe: Recipe, dialect: Dialect, name: str, value: Any) -> Block:
    """[(the option, [(its name in the recipe, its value)])]; nothing inside: it is left out."""
    if value is None:
        return [(name, [])]
    if name not in dialect.rules:
        if name in known_options():
            return [(name, [(name, KEEP)])]
        if value is not False and value not in ("", [], {}):
            near = nearest(name, known_options())
            hint = f"; {near} is an option" if near else ""
            recipe.line_lost(f"{name}={shown(value)}", f"it has no counterpart{hint}")
        return [(name, [])]
    rule = dialect.rules[name]
    if rule is None:
        return [(name, [])]
    if isinstance(rule, str):
        return [(name, [(rule, KEEP)])]
    return [(name, [*(rule(recipe, value) or {}).items()])]


def _settle_reference(recipe: Recipe, extra: Options, moving: bool) -> None:
    if recipe.options.get("sync_ref_model"):
        return
    if moving:
        recipe.done.changes(MOVING, first=True)
        return
    if "sync_ref_model" not in recipe.options:
        extra["sync_ref_model"] = recipe.options["sync_ref_model"] = False
    recipe.done.changes(FROZEN.format(how="sync_ref_model: false"), first=True)


# --- the text -------------------------------------------------------------------------------------


def _written(text: str, node: yaml.MappingNode, blocks: list[Block], extra: Options) -> str:
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    newline = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    starts = [key.start_mark.line for key, _ in node.value]
    made: list[str] = []
    seen: set[str] = set()
    before = 0
    for index, (start, block) in enumerate(zip(starts, blocks, strict=True)):
        made += lines[before:start]
        limit = starts[index + 1] if index + 1 < len(starts) else len(lines)
        before = _end(lines, start, limit)
        ((name, options),) = block
        for ours, value in options:
            if ours in seen:
                continue
            seen.add(ours)
            if value is KEEP:
                kept = lines[start:before]
                made += [re.sub(rf"^([\"']?){re.escape(name)}\1", ours, kept[0]), *kept[1:]]
            else:
                made.append(f"{ours}: {flow(value)}{newline}")
    made += lines[before:]
    if made and not made[-1].endswith("\n"):
        made[-1] += newline
    return "".join([*made, *(f"{name}: {flow(value)}{newline}" for name, value in extra.items())])


def _end(lines: list[str], start: int, limit: int) -> int:
    """Behind an option's own lines: comments and blank lines before the next one are that one's."""
    end = limit
    while end > start + 1 and re.match(r"\s*(#.*)?$", lines[end - 1]):
        end -= 1
    return end


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").strip()


# --- what recipes take ----------------------------------------------------------------------------


@functools.cache
def known_options() -> frozenset[str]:
    from tralign_fast.training.config import TRConfig
    from tralign_fast.training.train_options import TrainOptions

    fields = [*dataclasses.fields(TrainOptions), *dataclasses.fields(TRConfig)]
    return frozenset(f.name for f in fields if f.init)


def _check(recipe: Recipe) -> None:
    """What the options themselves say of their values."""
    options = {name: _number(value) for name, value in recipe.options.items()}
    as_ours(options, "TRConfig", "", recipe.done)


def _number(value: Any) -> Any:
    """YAML takes 1e-6 for a word, and a recipe takes it for the number."""
    try:
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return value
