"""`tralign-fast recipes ls | cp NAME [FILE] | check FILE`: recipes that ship with the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from tralign_fast.command_line import SHIPPED, Given, PositionalParser, recipe_file
from tralign_fast.training.option_types import nearest

_ABOUT = re.compile(
    r"# (?P<title>.*)\n# card: (?P<card>\d+) GiB(?: x (?P<gpus>\d+))?, planned: (?P<gib>[\d.]+) GiB"
)


class Recipe(NamedTuple):
    """What the first two lines of a recipe say."""

    name: str
    title: str
    card: int  # GiB of the GPU that it is for
    gpus: int
    gib: float  # planned, on each


def shipped() -> list[Recipe]:
    found = []
    for file in sorted(SHIPPED.glob("*.yaml")):
        about = _ABOUT.match(file.read_text(encoding="utf-8"))
        assert about is not None, file
        title, card, gpus, gib = about.group("title", "card", "gpus", "gib")
        found.append(Recipe(file.stem, title, int(card), int(gpus or 1), float(gib)))
    return found


def run_recipes(arguments: list[str]) -> int:
    """Lists the recipes that ship, copies one, or checks a file as `train` would.

    Raises:
        ValueError: no such recipe, or one that cannot be.
    """
    parser = PositionalParser(prog="tralign-fast recipes", description=run_recipes.__doc__)
    parser.add_argument("action", choices=("ls", "cp", "check"))
    parser.add_argument("name", nargs="?", help="Name of a recipe (cp, check) or file (check).")
    parser.add_argument("file", nargs="?", help="Where cp writes it. Default: NAME.yaml here.")
    given = parser.parse_args(arguments)
    if given.action == "ls":
        print(_list())
        return 0
    if given.name is None:
        raise ValueError(f"recipes {given.action}: expected a name (tralign-fast recipes ls)")
    if given.action == "check":
        print(f"{given.name}: {check(given.name)}")
        return 0
    source = SHIPPED / f"{given.name.removesuffix('.yaml')}.yaml"
    if not source.is_file():
        meant = nearest(given.name, [recipe.name for recipe in shipped()])
        hint = f"did you mean {meant}?" if meant else "tralign-fast recipes ls lists them"
        raise ValueError(f"recipes cp: no recipe {given.name}; {hint}")
    target = Path(given.file or source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ValueError(f"recipes cp: {target} is there; expected the name of a new file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ValueError(f"recipes cp: {target} cannot be written ({error.strerror})") from error
    print(f"{target}: tralign-fast train --config {target}")
    return 0


def _list() -> str:
    rows = shipped()
    width = max(len(recipe.name) for recipe in rows)
    lines = [f"{'recipe':<{width}}  {'card':>12}  {'planned':>9}  what it is"]
    for recipe in rows:
        card = f"{recipe.gpus} x {recipe.card} GiB" if recipe.gpus > 1 else f"{recipe.card} GiB"
        lines.append(f"{recipe.name:<{width}}  {card:>12}  {recipe.gib:>5.1f} GiB  {recipe.title}")
    return "\n".join([*lines, "", "tralign-fast train --config NAME, or recipes cp NAME first"])


def check(name: str) -> str:
    """What a recipe is, in words, once `train` would take it; nothing is loaded.

    Raises:
        ValueError: as `train` refuses it.
    """
    from tralign_fast.training.config import TRConfig
    from tralign_fast.training.train_options import (
        TrainOptions,
        adapter_of,
        columns_given,
        loading_of,
        quantization_of,
    )

    given = Given("train", [TrainOptions, TRConfig], ["--config", str(recipe_file(name))])
    options, config = given.built()
    bits, adapter = quantization_of(options), adapter_of(options)
    loading_of(options, config)
    columns_given(options.columns)
    what = ["full weights" if adapter is None else f"LoRA of rank {adapter.r}"]
    what += ["a quantised base"] if bits is not None else []
    title = config.objective.title
    method = title if config.trust_region.is_frozen else f"TR-{title}"
    return f"{method} of {options.model} on {options.dataset}, {', '.join(what)}"
