"""`tralign-fast COMMAND`: one line and exit code 2 for what cannot be run."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import linecache
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# command -> (what it does, where: a function of its arguments)
_COMMANDS = {
    "demo": ("align a small chat model on this machine's CPU, in minutes", ""),
    "train": (
        "align a model of yours: --config recipe.yaml [--option value]",
        "commands.train:run_train",
    ),
    "plan": ("does a training fit a GPU? --model llama-3.1-8b --gpu-memory 24GiB", ""),
    "recipes": ("recipes that ship: ls, cp NAME, check FILE", "commands.recipes:run_recipes"),
    "report": (
        "what came of a run, or of several side by side: RUN [RUN ...]",
        "commands.report:run_report",
    ),
    "eval": (
        "a model against its start: RUN --dataset ROWS [--judge FILE.py:FUNCTION]",
        "commands.evaluate:run_eval",
    ),
    "generate": (
        'completions before and after, side by side: RUN --prompt "..."',
        "commands.generate:run_generate",
    ),
    "chat": (
        "talk with a model, and beside it with its start: RUN --before",
        "commands.chat:run_chat",
    ),
    "merge": ("an adapter into its base: RUN --output FOLDER", "commands.merge:run_merge"),
    "migrate": (
        "a script of TRL, a YAML of axolotl or LLaMA-Factory, as one of this library",
        "migrate.command:run_migrate",
    ),
    "env": ("versions, GPUs and paths, for a report of a bug", "commands.env:run_env"),
}
_HELP = "usage: tralign-fast COMMAND [--help]: preference alignment with a moving reference\n"
_STARTED = time.time()


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(sys.argv[1:] if argv is None else [*argv])
    except KeyboardInterrupt:
        print("tralign-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `tralign-fast plan | head`, which has read enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        return 141
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        _say_once(f"tralign-fast: error: {' '.join(message.split())}")
        return 2


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0] if arguments else ""), arguments[1:]
    if command in ("-h", "--help"):
        print(_HELP + "".join(f"\n  {name:10}{help}" for name, (help, _) in _COMMANDS.items()))
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"tralign-fast {version('tralign-fast')}")
        return 0
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else " (tralign-fast --help)"
        raise ValueError(f"expected a command, {' or '.join(_COMMANDS)}, got {command!r}{hint}")
    if command == "demo":
        return _demo(rest)
    if command == "plan":
        return _plan(rest)
    module, _, function = _COMMANDS[command][1].partition(":")
    return getattr(importlib.import_module(f"tralign_fast.{module}"), function)(rest)


def _message_of(error: Exception) -> str | None:
    """What a user is told of an error that he can cause; None: it is a bug, and wants its trace.

    A ValueError is one by who raised it: a statement that checks something, not `int("x")` nor a
    tuple of the wrong length.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, (ImportError, OSError)):
        return text
    if isinstance(error, ValueError):
        return text if _is_raised(error) else None
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        # a table such as lr_scheduler_kwargs, given to whom it is for
        return None if "tralign_fast" in _place_of(error)[0] else text
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.splitlines()[0]} (tralign-fast plan says what fits)"
    # errors of transformers' own checks
    if isinstance(error, RuntimeError) and "to be installed" in text:
        return text
    if isinstance(error, KeyError) and "metric_for_best_model" in text:
        return str(error.args[0])
    return None


def _is_raised(error: Exception) -> bool:
    line = linecache.getline(*_place_of(error))
    return line.lstrip().startswith("raise") or not line  # which a zipped package has not


def _place_of(error: Exception) -> tuple[str, int]:
    """File and line where an error comes from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ("", 0)


def _say_once(line: str) -> None:
    """On a machine with several processes of a run, the first says it.

    The others wait until it has, as what ends first ends them all (torchrun), and say it themselves
    if it does not: the error is theirs alone.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    name = hashlib.sha256(line.encode()).hexdigest()[:16]
    mark = Path(tempfile.gettempdir()) / f"tralign-fast-{os.getppid()}-{name}"
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if rank != "0" and not alone:
        for _ in range(100):
            with contextlib.suppress(OSError):
                if mark.stat().st_mtime > _STARTED - 60:
                    return
            time.sleep(0.1)
        line = f"{line} (process {rank})"
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()  # which ends its line
    print(line, file=sys.stderr, flush=True)
    if rank == "0" and not alone:
        with contextlib.suppress(OSError):
            for old in mark.parent.glob("tralign-fast-*-*"):
                if old.stat().st_mtime < _STARTED - 3600:
                    old.unlink()
            mark.touch()


def _demo(arguments: list[str]) -> int:
    from tralign_fast.demo.run import DemoOptions, run_demo

    return run_demo(_parse("demo", [DemoOptions], arguments)[0])


def _plan(arguments: list[str]) -> int:
    from tralign_fast.memory.plan import run_plan
    from tralign_fast.memory.plan_options import PlanOptions
    from tralign_fast.memory.plan_recipe import plan_arguments

    arguments, more = plan_arguments(arguments)
    options = _parse("plan", [PlanOptions], arguments)[0]
    options.more = more
    return run_plan(options)


def _parse(command: str, classes: list[Any], arguments: list[str]) -> Any:
    """Dataclasses from a YAML file (--config) and the command line, which wins."""
    from tralign_fast.command_line import parse

    return parse(command, classes, arguments)


if __name__ == "__main__":
    sys.exit(main())
