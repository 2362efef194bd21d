"""All that a GPU is had for, stage after stage, in calls of eight minutes.

    python -m benchmarks.gpu.everything [--minutes 8] [--stages matrix head ...] [--again]

which is `make bench-gpu`; `make card` has all stages. In order: the `tests` of a GPU; the `matrix`
of steps (`python -m benchmarks.gpu`); the `head`; further `cases` of the matrix; the `other`
benchmarks; and `evidence`, arms on people's pairs in the file `--data`. Every stage has minutes of
its own in a call, so that none keeps the others from a card that is had for half an hour.

A part that has ended stands in `gpu_parts.csv` with the card and the commit, a failed one too; the
next call goes on behind it, and the matrix and the arms where they stopped. What parts print is in
runs/gpu. With `$OUT` set results and logs are packed into $OUT/card.tar.gz after every part: on
another machine unpack them in the checkout of the same commit, and call again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment, read_csv
from benchmarks.gpu import __main__ as matrix
from benchmarks.gpu.results import PACKAGES, of_here, replace_csv

LOGS = Path("runs/gpu")


@dataclass(frozen=True)
class Part:
    command: str  # of python -m
    usual_s: float  # no time to start it in if less is left
    folder: str = "--output_dir"  # its option; "": it writes no results
    limit_s: float = 480.0  # no longer than that
    environment: tuple[tuple[str, str], ...] = ()
    goes_on: str = ""  # what it prints where it is not done; it is told its minutes


def _tests(paths: str, limit_s: float, *options: str, on: str = "") -> Part:
    """Tests marked gpu, or with `on` those that can compute on either device; no matrices."""
    environment = (("TRALIGN_TEST_DEVICE", on),) if on else ()
    kinds = "not matrix" if on else "gpu and not matrix"
    command = shlex.join(["pytest", "-q", "-m", kinds, *options, *paths.split()])
    return Part(command, 30, "", limit_s, environment)


# what `make test-gpu` runs, newest first
TESTS = [
    _tests("tests/test_gpu.py tests/training/test_async_save.py", 120),
    _tests("tests/model/test_checkpointing.py", 120, on="cuda"),
    _tests("tests/model/test_graphs.py tests/model/test_attention.py", 120, on="cuda"),
    _tests("tests/model", 180),
    _tests("tests/kernels/test_linear_powers.py", 180),
    _tests("tests/kernels", 300, "--ignore=tests/kernels/test_linear_powers.py"),
    _tests("tests/ops/test_logprobs.py", 120, on="cuda"),
    _tests(
        "tests/training/test_trl_parity.py tests/training/test_gradient_release.py "
        "tests/training/test_trainer.py", 180, on="cuda",
    ),
    _tests("tests/reference", 240, on="cuda"),
]  # fmt: skip
HEAD = [Part("benchmarks.ops --scaling N", 60, limit_s=240), Part("benchmarks.ops", 90)]
OTHER = [
    Part("benchmarks.memory --measure --models llama-3.1-8b", 90, "--out"),
    Part("benchmarks.memory --measure --models llama-3.2-1b", 40, "--out"),
    Part("benchmarks.ema", 40),
    Part("benchmarks.step --steps 8", 60),
    Part("benchmarks.ops --scaling V", 60),
    Part("benchmarks.ops --scaling H", 60),
    Part("benchmarks.ops --vocab_filter", 40),
]
# of the matrix, behind its default list
CASES = (
    "8b-lora64/2p32k/ckpt/trl_liger", "8b-lora64/2p64k/ckpt/trl", "8b-*/2p4k/ckpt/ours_frozen",
    "8b-*/2p4k/ckpt/ours_powers", "1b-full/2p4k/*/ours_*", "*qlora64/2p4k/ckpt/ours*",
)  # fmt: skip
# and the minutes of a call that each may have at most
STAGES = {"tests": 4.0, "matrix": 5.0, "head": 3.0, "cases": 5.0, "other": 5.0, "evidence": 8.0}


def evidence(data: str) -> Part:
    return Part(
        f"benchmarks.evidence overoptimize --arms core --data {data}", 180, "--out",
        goes_on="arms are left",
    )  # fmt: skip


class Session:
    """Runs parts while the time lasts, and keeps what has ended."""

    def __init__(
        self, folder: Path, here: Mapping[str, str], until: float, again: bool = False
    ) -> None:
        self._folder, self._here, self.until, self._again = folder, here, until, again
        self._path = folder / "gpu_parts.csv"
        self._rows: list[dict[str, Any]] = [*read_csv(self._path)]
        self.left: list[Part] = []
        self.failed: list[Part] = []

    def run(self, parts: Sequence[Part], minutes: float) -> None:
        """Runs those that have not ended at this commit on this card."""
        until = min(self.until, time.monotonic() + 60 * minutes)
        mine = of_here(self._rows, self._here)
        done = set() if self._again else {row["part"] for row in mine}
        for part in parts:
            if part.command in done:
                continue
            seconds = until - time.monotonic()
            begin = time.monotonic()
            status = self._run(part, seconds) if seconds >= part.usual_s else None
            if status is None:
                self.left.append(part)
            else:
                self._keep(part, status, time.monotonic() - begin)
            pack(self._folder)

    def _run(self, part: Part, seconds: float) -> str | None:
        """ "done", or why it failed; None: its time was spent, or it is to go on."""
        limit = min(seconds, part.limit_s)
        command = [sys.executable, "-m", *shlex.split(part.command)]
        command += [part.folder, str(self._folder)] if part.folder else []
        command += ["--minutes", f"{limit / 60 - 0.75:.2f}"] if part.goes_on else []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
        LOGS.mkdir(parents=True, exist_ok=True)
        path = LOGS / (re.sub(r"[^a-z0-9]+", "-", part.command.lower())[:80].strip("-") + ".txt")
        with path.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # it has arms of its own
                    process.wait()
        text = path.read_text(errors="replace").strip()
        print(f"$ python -m {part.command}\n" + "\n".join(text.splitlines()[-12:]), flush=True)
        if part.goes_on and (code is None or part.goes_on in text):
            return None
        if code is None:
            return f"failed: took more than {limit:.0f} s" if limit == part.limit_s else None
        last = text.splitlines()[-1][:200] if text else f"exit code {code}"
        return "done" if code == 0 else f"failed: {last}"

    def _keep(self, part: Part, status: str, seconds: float) -> None:
        row = {
            "part": part.command, "status": status, "seconds": round(seconds, 1), **self._here
        }  # fmt: skip
        mine = of_here(self._rows, self._here)
        self._rows = [r for r in self._rows if r not in mine or r["part"] != part.command]
        replace_csv(self._path, rows := [*self._rows, row], list(row))
        self._rows = rows
        self.failed += [part] * (status != "done")
        print(f"{part.command}: {status} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def pack(folder: Path) -> None:
    """Results and logs as one file in $OUT, if that is set; whole, or as it was."""
    if not (out := os.environ.get("OUT")):
        return
    whole = Path(out) / "card.tar.gz"
    partial = whole.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for path in (folder, LOGS):
            if path.is_dir():
                archive.add(path)
    partial.rename(whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if there is no GPU, a part failed, or arms of the matrix disagree."""
    parser = argparse.ArgumentParser(description="All that a GPU is had for, in stages.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE",
        default=["matrix", "head", "cases", "other"], help=f"of {', '.join(STAGES)}; or all",
    )  # fmt: skip
    parser.add_argument("--data", default="", help="people's pairs, for benchmarks.evidence")
    parser.add_argument("--again", action="store_true", help="repeat what has ended")
    parser.add_argument("--output_dir", type=Path, help="default: benchmarks/results/CARD")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    device = matrix.card()
    if device is None:
        print("no GPU here: nothing measured", file=sys.stderr)
        return 1
    folder = options.output_dir or Path("benchmarks/results") / matrix.folder_of(device)
    here = {**environment(PACKAGES), "device": device}
    session = Session(folder, here, until, options.again)

    def steps(*chosen: str, minutes: float) -> int:
        minutes = min(minutes, (until - time.monotonic()) / 60)
        if minutes <= 0:
            return 0
        given = ["--minutes", f"{minutes:.2f}", "--output_dir", str(folder)]
        given += [*["--again"] * options.again, *chosen]
        try:
            return matrix.main(given)
        except SystemExit as error:  # the other stages may go all the same
            print(error, file=sys.stderr)
            return 1
        finally:
            pack(folder)

    code = 0
    for stage, minutes in STAGES.items():
        if stage not in options.stages and "all" not in options.stages:
            continue
        if stage == "matrix":
            code |= steps(minutes=minutes)
        elif stage == "cases":
            code |= steps("--cases", *CASES, minutes=minutes)
        elif stage != "evidence":
            session.run({"tests": TESTS, "head": HEAD, "other": OTHER}[stage], minutes)
        elif options.data:
            session.run([evidence(options.data)], minutes)
        else:
            print("evidence: left out; expected --data FILE", file=sys.stderr)
    if session.left:
        names = "; ".join(part.command for part in session.left)
        print(f"left, the minutes are spent: {names}", file=sys.stderr)
    return code | bool(session.failed)


if __name__ == "__main__":
    sys.exit(main())
