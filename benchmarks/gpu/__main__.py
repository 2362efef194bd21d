"""The matrix of optimizer steps on a GPU: TRL beside this library, models, shapes, checkpointing.

    python -m benchmarks.gpu [--cases '8b-lora64/*' ...] [--minutes 8] [--again] [--output_dir DIR]
    python -m benchmarks.gpu --table [--output_dir DIR]
    python -m benchmarks.gpu --dry [--cases ...]     without a card: what each would need of one

Cases are named MODEL/SHAPE/CHECKPOINTING/ARM (`--list` prints them); without `--cases` a default
list runs, most important first. Every case is a process of its own, one after the other, and a row
of `gpu_steps.csv` as soon as it ends. Another call goes on with the cases that have no row for this
commit and card (git, or the environment's TRALIGN_COMMIT); a case that failed is a row too.

**What is timed.** TR-DPO by each trainer's own `train()`, bf16, random weights (the same for every
arm), rows of random tokens, other rows in every step. The reference moves every 4 steps, and those
are a window: from the end of a window's move and log to the end of its last step, before the move.
The GPU is waited for at the borders of windows and where a window's first step begins, nowhere
else, in all arms alike, so steps overlap as they do in training. The first window is a warm-up,
the median of 2 to 5 others is the result, and one more is profiled; where a window takes more than
20 s, one is the result, and none is profiled.

`step_s` has a whole forward of the reference for every step: inside the step with TRL, in the sweep
before the window with ours (`sweep_s`; of a frozen, precomputed reference its share of the one
sweep before the training, which later epochs do not pay). `tau512_s` adds a 512th of a move, as
TRL's default schedule has it, `tau4_s` a fourth, as the windows here have it.

**The limit** is the time that the step's needed operations take at the card's measured rate, that
of a bf16 product of 8192 x 8192 x 8192; MFU is the limit over `step_s`. The reference's forward is
among the operations, what checkpointing computes again is not, prompts are computed once, and a
frozen base has no gradients of weights (`cases.flops_of`).

**The gate.** In the first window all references are the start: mean loss, summed log-probs and the
last gradient norm must agree with TRL's of the same model and shape (`agrees_with_trl`; exit code 1
if one does not). The profile counts kernels, copies and fills of a window with its sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import environment
from benchmarks.gpu import arm, cases, results
from benchmarks.gpu.cases import Case

# asking whether there is a GPU must not set CUDA up in the process that is forked
_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
TIMEOUT_S = 240


def card() -> str | None:
    """The first GPU's name, asked of the driver, so that this process takes none of its memory."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={first}"]
    told = subprocess.run(asked, capture_output=True, text=True)
    return told.stdout.strip() or None if told.returncode == 0 else None


def folder_of(device: str) -> str:
    """A name for its results: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    noise = re.compile(r"nvidia|\d+gb|hbm\d\w?|sxm\d|pcie")
    return "-".join(word for word in words if not noise.fullmatch(word))


def imported_once(on_gpu: bool) -> list[str]:
    """Modules that the process whose forks are the arms imports; what it leaves out a fork does."""
    names = ["datasets", "transformers.models.llama.modeling_llama"]
    # peft imports bitsandbytes where it is installed, which sets CUDA up: forks could not use it
    if not on_gpu or not (find_spec("bitsandbytes") and find_spec("peft")):
        names += ["peft", "trl.trainer.dpo_trainer", "tralign_fast.memory",
                  "tralign_fast.training.trainer"]  # fmt: skip
    return names


class Processes:
    """Starts arms as forks of one process that has imported what they import, 10 s a case less; of
    a fresh interpreter each if a fork finds CUDA in use."""

    def __init__(self, fresh: bool, on_gpu: bool = True) -> None:
        self._context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            self._context.set_forkserver_preload(imported_once(on_gpu))

    def call(self, function: Any, job: Any, result: Path, log: Path, timeout: float) -> Any:
        """What the function wrote to `result`; {"error": ...} if it died; None: out of time."""
        found = self._once(function, job, result, log, timeout)
        if found is not None and str(found.get("error", "")).startswith(arm.CANNOT_FORK):
            print("forks have no GPU here: every case is a fresh process", file=sys.stderr)
            self._context = multiprocessing.get_context("spawn")
            found = self._once(function, job, result, log, timeout)
        return found

    def _once(self, function: Any, job: Any, result: Path, log: Path, timeout: float) -> Any:
        result.unlink(missing_ok=True)
        process = self._context.Process(target=function, args=(job,))
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        if result.is_file():
            return json.loads(result.read_text())
        killed = process.exitcode == -signal.SIGKILL
        why = "killed, by the system if memory ran out" if killed else _last_line(log)
        return {"error": f"the process died: {why}"}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "it said nothing"


class Matrix:
    """Runs cases until the time is spent, and keeps their rows."""

    def __init__(self, options: argparse.Namespace, here: Mapping[str, str], folder: Path) -> None:
        self._options, self._here, self._folder = options, here, folder
        self.path = folder / "gpu_steps.csv"
        self.rows = results.load(self.path)
        self._until = time.monotonic() + 60 * options.minutes
        self._processes = Processes(options.fresh, not options.tiny)

    def run(self, chosen: Sequence[Case]) -> list[Case]:
        """The cases that are left."""
        with tempfile.TemporaryDirectory() as scratch:
            waiting = [c for c in chosen if self._options.again or self._row_of(c) is None]
            rate = self._rate(Path(scratch)) if waiting else 0.0
            spent: dict[str, float] = {}
            for index, case in enumerate(waiting):
                left = self._until - time.monotonic()
                usual_s = max(case.usual_s, spent.get(case.work, 0.0))
                if left < usual_s:
                    return waiting[index:]
                begin = time.monotonic()
                timeout = min(self._options.timeout, left)
                found = self._measure(case, Path(scratch), timeout)
                seconds = time.monotonic() - begin
                spent[case.work] = max(seconds, spent.get(case.work, 0.0))
                if found is None and timeout < self._options.timeout:
                    return waiting[index:]  # the end of the minutes cut it
                if found is None:
                    found = {"error": f"took more than {timeout:.0f} s"}
                self._keep(case, {**found, "case_s": round(seconds, 1)}, rate)
        return []

    def _row_of(self, case: Case) -> dict[str, Any] | None:
        rows = results.of_here(self.rows, self._here)
        return next((row for row in rows if row["case"] == case.name), None)

    def _measure(self, case: Case, scratch: Path, timeout: float) -> dict[str, Any] | None:
        log = scratch / "log"
        job = arm.Job(case, str(scratch / "result"), str(log), self._options.tiny)
        return self._processes.call(arm.run, job, Path(job.result), log, timeout)

    def _keep(self, case: Case, found: dict[str, Any], rate: float) -> None:
        row = {**results.make_row(case, found, rate), "case_s": found["case_s"], **self._here}
        old = self._row_of(case)
        self.rows = [r for r in self.rows if r is not old] + [row]
        results.save(self.path, self.rows)
        self.rows = results.load(self.path)
        if row["status"] == "failed":
            said = row["reason"]
        else:
            said = (
                f"{row['step_s']:.3f} s a step, {row['step_s'] / row['limit_s']:.2f} times the "
                f"limit; alone {row['alone_s']:.3f}, sweep {row['sweep_s']:.3f}, move "
                f"{row['move_ms']:.0f} ms"
            )
            if row["gpu_busy_share"] is not None:
                said += f"; busy {row['gpu_busy_share']:.0%}, {row['device_events']:,.0f} events"
            if "peak_gib" in row:
                said += f"; peak {row['peak_gib']:.1f} GiB"
        print(f"{case.name}: {said} ({found['case_s']:.0f} s)", file=sys.stderr, flush=True)

    def _rate(self, scratch: Path) -> float:
        """Measured once for a card and a torch, and kept beside the results."""
        path = self._folder / "gpu_rate.json"
        key = {name: self._here[name] for name in ("device", "torch")}
        if path.is_file():
            kept = json.loads(path.read_text())
            if key.items() <= kept.items():
                return kept["rate"]
        job = arm.RateJob(str(scratch / "result"), str(scratch / "log"), self._options.tiny)
        found = self._processes.call(
            arm.run_rate, job, Path(job.result), Path(job.log), self._options.timeout
        )
        if found is None or "error" in found:
            raise SystemExit(f"the card's rate could not be measured: {found}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**key, "date": self._here["date"], **found}, indent=1) + "\n")
        return found["rate"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if an arm's losses are not TRL's, or if there is nothing to run on."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        chosen = cases.choose(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if options.dry:
        return dry(chosen)
    device = "tiny models on a CPU" if options.tiny else card()
    if device is None and not options.table:
        print("no GPU here: nothing measured (--tiny tries the benchmark out)", file=sys.stderr)
        return 1
    folder = options.output_dir or Path("benchmarks/results") / folder_of(device or "")
    here = {**environment(results.PACKAGES), "device": device or ""}
    matrix = Matrix(options, here, folder)
    left = [] if options.table else matrix.run(chosen)
    # of the last commit that the file has
    rows = results.of_here(matrix.rows, matrix.rows[-1]) if matrix.rows else []
    if not rows:
        print(f"{matrix.path}: no rows", file=sys.stderr)
        return 1
    rows = results.in_order(rows)
    print(results.table(rows))
    if find_spec("matplotlib") and any(row["status"] == "measured" for row in rows):
        results.plot(folder / "gpu_steps.png", rows)
    for line in results.disagreeing(rows):
        print(line, file=sys.stderr)
    if left:
        names = " ".join(case.name for case in left)
        print(f"left, the minutes are spent: {names}", file=sys.stderr)
    return int(bool(results.disagreeing(rows)))


def dry(chosen: Sequence[Case]) -> int:
    """Prints what each case would need of a card; returns 1 if one raises."""
    failed = 0
    for case in chosen:
        try:
            print(f"{case.name}: {arm.trace_case(case):.1f} GiB", flush=True)
        except Exception as error:
            failed = 1
            print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The matrix of optimizer steps on a GPU.")
    parser.add_argument("--cases", nargs="+", default=[], metavar="GLOB", help="default: a list")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is started after them")
    parser.add_argument("--again", action="store_true", help="repeat cases that have a row")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds of a case")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every case")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try it out")
    parser.add_argument("--dry", action="store_true", help="trace the cases, without a GPU")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--output_dir", type=Path, help="default: benchmarks/results/CARD")
    return parser


if __name__ == "__main__":
    sys.exit(main())
