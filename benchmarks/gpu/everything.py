"""All benchmarks of a GPU, part after part, in calls of eight minutes.

    python -m benchmarks.gpu.everything [--minutes 8] [--again] [--output_dir DIR]

which is `make bench-gpu`. First the matrix of steps (`python -m benchmarks.gpu`), then the
benchmarks of the head, of memory, of the reference's update and of a step of chat rows, each its
own module. A part is started while the minutes last, and is stopped with them; what has ended
stands in `gpu_parts.csv` with the card and the commit, and the next call goes on behind it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment, read_csv
from benchmarks.gpu import __main__ as matrix
from benchmarks.gpu.results import PACKAGES, of_here, replace_csv


@dataclass(frozen=True)
class Part:
    command: str  # of python -m
    usual_s: float  # no time to start it in if less is left
    folder: str = "--output_dir"  # its option


PARTS = [
    Part("benchmarks.ops", 90),
    Part("benchmarks.memory --measure --models llama-3.1-8b", 90, "--out"),
    Part("benchmarks.memory --measure --models llama-3.2-1b", 40, "--out"),
    Part("benchmarks.ema", 40),
    Part("benchmarks.step --steps 8", 60),
    Part("benchmarks.ops --scaling N", 60),
    Part("benchmarks.ops --scaling V", 60),
    Part("benchmarks.ops --scaling H", 60),
    Part("benchmarks.ops --vocab_filter", 40),
]


def run_parts(
    parts: Sequence[Part], folder: Path, here: Mapping[str, str], until: float, again: bool = False
) -> list[Part]:
    """Runs those that have not ended at this commit on this card; the parts that are left."""
    path = folder / "gpu_parts.csv"
    rows: list[dict[str, Any]] = [*read_csv(path)]
    done = set() if again else {row["part"] for row in of_here(rows, here)}
    left: list[Part] = []
    for part in parts:
        if part.command in done:
            continue
        seconds = until - time.monotonic()
        if seconds < part.usual_s:
            left.append(part)
            continue
        begin = time.monotonic()
        status = _run(part, folder, seconds)
        if status is None:
            left.append(part)
            continue
        row = {
            "part": part.command, "status": status,
            "seconds": round(time.monotonic() - begin, 1), **here,
        }  # fmt: skip
        rows = [r for r in rows if r not in of_here(rows, here) or r["part"] != part.command]
        replace_csv(path, rows := [*rows, row], list(row))
        print(f"{part.command}: {status} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return left


def _run(part: Part, folder: Path, seconds: float) -> str | None:
    """ "done", or the last line of a part that failed; None: its time was spent."""
    command = [sys.executable, "-m", *part.command.split(), part.folder, str(folder)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it has arms of its own
            process.wait()
            return None
        log.seek(0)
        lines = log.read().strip().splitlines()
    if code == 0:
        return "done"
    return f"failed: {lines[-1][:200] if lines else f'exit code {code}'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if there is no GPU, or if the arms of the matrix disagree."""
    parser = argparse.ArgumentParser(description="All benchmarks of a GPU, in parts.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--again", action="store_true", help="repeat what has ended")
    parser.add_argument("--output_dir", type=Path, help="default: benchmarks/results/CARD")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    device = matrix.card()
    if device is None:
        print("no GPU here: nothing measured", file=sys.stderr)
        return 1
    folder = options.output_dir or Path("benchmarks/results") / matrix.folder_of(device)
    steps = ["--minutes", str(options.minutes), "--output_dir", str(folder)]
    code = matrix.main([*steps, *["--again"] * options.again])
    here = {**environment(PACKAGES), "device": device}
    left = run_parts(PARTS, folder, here, until, options.again)
    if left:
        print(
            "left, the minutes are spent: " + "; ".join(part.command for part in left),
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
