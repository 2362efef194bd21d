"""`tralign-fast migrate FILE`: the diff on stdout, what there is to know of it on stderr."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import tempfile
from pathlib import Path

from tralign_fast.command_line import PositionalParser
from tralign_fast.migrate.report import Migration
from tralign_fast.migrate.source import read

_SUFFIXES = (".py", ".yaml", ".yml")


def run_migrate(arguments: list[str]) -> int:
    """Shows, and with --write or --output writes, a file as one of this library.

    Raises:
        ValueError: there is nothing to migrate, or nowhere to write.
    """
    given = migration_options(arguments)
    path = Path(given.file)
    if path.suffix not in _SUFFIXES:
        hint = " (jupyter nbconvert --to script)" if path.suffix == ".ipynb" else ""
        raise ValueError(f"{path}: expected a script (.py) or a YAML (.yaml, .yml){hint}")
    text, encoding = read(path)
    backup = path.with_name(f"{path.name}.orig")
    if given.write and backup.exists():
        raise ValueError(f"--write: {backup} is there from before; expected a free name to keep it")
    if given.output and Path(given.output).exists():
        raise ValueError(f"--output: {given.output} is there; expected the name of a new file")
    done = _migrated(path, text, given.moving)
    if done is None:
        print(f"{path}: it is one of this library already", file=sys.stderr)
        return 0
    sys.stdout.write(_diff(path, text, done.text))
    sys.stdout.flush()
    _tell(done)
    if given.write:
        target = path.resolve()
        _write(backup, path.read_bytes(), target)
        _write(target, done.text.encode(encoding), target)
        print(f"written: {path}; {backup} is what it was", file=sys.stderr)
    elif given.output:
        _write(Path(given.output), done.text.encode(encoding), path)
        print(f"written: {given.output}", file=sys.stderr)
    else:
        print("nothing is written: --write changes the file, --output FILE", file=sys.stderr)
    return 0


def migration_options(arguments: list[str]) -> argparse.Namespace:
    parser = PositionalParser(prog="tralign-fast migrate", description=__doc__)
    parser.add_argument("file", help="A script of TRL, or a YAML of axolotl or LLaMA-Factory.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--write", action="store_true", help="Change the file, and keep it as FILE.orig."
    )
    where.add_argument("--output", metavar="FILE", help="Write a new file.")
    parser.add_argument(
        "--moving", action="store_true", help="Let a reference move that stood still."
    )
    return parser.parse_args(arguments)


def _migrated(path: Path, text: str, moving: bool) -> Migration | None:
    if path.suffix == ".py":
        from tralign_fast.migrate.script import migrate_script

        return migrate_script(text, str(path), moving)
    from tralign_fast.migrate.recipe import migrate_yaml

    return migrate_yaml(text, path, moving)


def _diff(path: Path, before: str, after: str) -> str:
    """A unified diff that `patch` takes."""
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (before, after))
    lines = difflib.unified_diff(old, new, str(path), str(path))
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


def _tell(done: Migration) -> None:
    titled = ("other numbers", done.numbers), ("same numbers", done.same), ("not kept", done.lost)
    for title, lines in titled:
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)


def _write(path: Path, data: bytes, like: Path) -> None:
    """A whole file or none, with the rights of another."""
    handle, name = None, ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(like.stat().st_mode & 0o7777)
        Path(name).replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
