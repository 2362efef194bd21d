"""What `tralign-fast` and `python -m tralign_fast` run.

A command wants the packages of the extra "train". Without them the help and the version still come.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from tralign_fast.extras import missing, needed


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else [*argv]
    command = arguments[0] if arguments else "--help"
    if not command.startswith("-") and (names := missing("train")):
        line = needed(f"tralign-fast {command}", names, "train")
        print(f"tralign-fast: error: {line}", file=sys.stderr)
        return 2
    from tralign_fast.cli import main as run

    with warnings_in_one_line():
        return run(arguments)


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """What this package warns of, without the place and the line of code that a program would want:
    who runs a command has written neither."""
    usual, package = warnings.formatwarning, str(Path(__file__).parent)

    def brief(message, category, filename, lineno, line=None) -> str:
        if not issubclass(category, UserWarning) or not filename.startswith(package):
            return usual(message, category, filename, lineno, line)
        return f"tralign-fast: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = brief
    try:
        yield
    finally:
        warnings.formatwarning = usual


if __name__ == "__main__":
    sys.exit(main())
