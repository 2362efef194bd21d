"""What `tralign-fast` and `python -m tralign_fast` run.

A command wants the packages of the extra "train". Without them the help and the version still come.
"""

from __future__ import annotations

import sys

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

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
