"""One case in a process of its own: a trainer's `train()`, timed from window to window."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import WINDOW, Case, Shape, flops_of
from benchmarks.gpu.work import MOST, WARM_UP, make_trainer, make_work, shape_of

LEAST = 2
ENOUGH_S = 6.0  # of timed windows, once there are LEAST of them
LONG_S = 20.0  # of one window: no other is timed, and none profiled
CANNOT_FORK = "CannotFork"  # the error's name where a fork has no GPU


@dataclass(frozen=True)
class Job:
    """All that an arm's process is told."""

    case: Case
    result: str  # the file that it writes: a JSON object
    log: str  # the file of its stdout and stderr
    tiny: bool = False


@dataclass(frozen=True)
class RateJob:
    result: str
    log: str
    tiny: bool = False


def run(job: Job) -> None:
    """Writes what was measured to `job.result`, or {"error": one line}."""
    _tell(job, _measure)


def run_rate(job: RateJob) -> None:
    """As `run`, the card's rate."""
    _tell(job, lambda job: measure_rate(job.tiny))


def _tell(job: Any, measure: Callable[[Any], dict[str, Any]]) -> None:
    _to_log(job.log)
    try:
        if not job.tiny:
            _set_up_cuda()
        found = measure(job)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
    partial = Path(f"{job.result}.partial")
    partial.write_text(json.dumps(found))
    partial.rename(job.result)


def _to_log(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


class CannotFork(RuntimeError):
    """CUDA cannot be used: where it was set up before the process was forked."""


def _set_up_cuda() -> None:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise CannotFork(str(error).splitlines()[0]) from error


def _measure(job: Job) -> dict[str, Any]:
    import datasets
    import torch

    datasets.disable_caching()  # log-probs of a reference that an earlier case has left there
    on_gpu = torch.cuda.is_available() and not job.tiny
    if not on_gpu:
        torch.set_num_threads(1)
    from tralign_fast.memory.trace import quietly

    work = make_work(job.case, job.tiny)
    with tempfile.TemporaryDirectory() as folder, quietly(), _counting_graphs() as graphs:
        trainer = make_trainer(job.case, work, folder, on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock = make_clock(on_gpu, ENOUGH_S / 20 if job.tiny else ENOUGH_S)
        scoring = _time_scoring(trainer) if job.case.arm == "ours_frozen" else []
        trainer.callback_handler.callbacks.insert(0, clock.before)
        trainer.add_callback(clock.after)
        trainer.train()
    record = summarize(clock, shape_of(job.case, job.tiny), on_gpu)
    if scoring:
        _add_scoring(record, scoring, work.pairs)
    flops = flops_of(work.model, shape_of(job.case, job.tiny), work.lora_rank)
    return {
        **record,
        "pairs": work.pairs,
        "packed_tokens": work.tokens,
        "dtype": work.dtype,
        "flops": flops.needed,
        "recomputed_flops": flops.recomputed * _checkpointed(job.case),
        **graphs,
    }


def _checkpointed(case: Case) -> float:
    """Of the layers, those that run a second time."""
    half = case.arm == "ours_half"
    return 0.0 if not case.checkpointing else 0.5 if half else 1.0


@contextlib.contextmanager
def _counting_graphs() -> Iterator[dict[str, int]]:
    """CUDA graphs of the models made inside: lengths of rows that were captured, forwards that
    were replayed, of the policy and of the reference's sweeps; filled at the end."""
    from unittest import mock

    from tralign_fast.model import graphs

    made: list[graphs.DecoderGraphs] = []
    found: dict[str, int] = {}

    class Counted(graphs.DecoderGraphs):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    with mock.patch.object(graphs, "DecoderGraphs", Counted):
        yield found
    found["graphs_captured"] = sum(g.captured for g in made)
    found["graphs_replayed"] = sum(g.replayed for g in made)


# --- clocks ---------------------------------------------------------------------------------------


def make_clock(on_gpu: bool, enough_s: float) -> Any:
    """Callbacks `before` and `after` all others of a trainer, that note a window's times."""
    import torch
    from transformers import TrainerCallback

    from benchmarks.gpu.trace import DeviceWork, Profile

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock:
        def __init__(self) -> None:
            self.windows: list[tuple[float, ...]] = []  # start, first step begins, last ends, moved
            self.logs: list[dict[str, float]] = []
            self.start = self.first = self.end = 0.0
            self.work: DeviceWork | None = None
            self.profile: Profile | None = None
            self.no_profile = ""  # why there is none
            self.peak = self.reserved = 0
            self.last = False
            self.before, self.after = Before(), After()

        def is_enough(self) -> bool:
            """Called between windows: whether no further one is to be timed."""
            timed = self.windows[WARM_UP:]
            seconds = sum(w[3] - w[0] for w in timed)
            enough = len(timed) >= LEAST and seconds >= enough_s
            return enough or len(timed) >= MOST or self.is_long()

        def is_long(self) -> bool:
            return any(w[3] - w[0] >= LONG_S for w in self.windows[WARM_UP : WARM_UP + 1])

        def next_window(self) -> None:
            if self.last:
                return
            self.last = self.is_enough()
            if self.last and on_gpu:
                self.peak = torch.cuda.max_memory_allocated()
                self.reserved = torch.cuda.max_memory_reserved()
                with self.without_profile_if_it_fails():
                    if self.is_long():
                        raise ValueError(f"a window takes more than {LONG_S:.0f} s")
                    self.profile = Profile()
            self.start = now()

        @contextlib.contextmanager
        def without_profile_if_it_fails(self) -> Iterator[None]:
            try:
                yield
            except (RuntimeError, AssertionError, OSError, ValueError) as error:
                self.no_profile = f"no profile: {error}"  # the times are good without it

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % WINDOW == 0:
                clock.end = now()
                if clock.profile is not None:
                    with clock.without_profile_if_it_fails():
                        clock.work = clock.profile.stop()
                    clock.profile = None

    class After(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            clock.next_window()

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step % WINDOW == 0:
                clock.first = now()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % WINDOW == 0:
                clock.windows.append((clock.start, clock.first, clock.end, now()))
                profiles = on_gpu and not clock.is_long()
                control.should_training_stop |= clock.last or (not profiles and clock.is_enough())

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                clock.logs.append(dict(logs))
                clock.next_window()

    clock = Clock()
    return clock


def _time_scoring(trainer: Any) -> list[tuple[float, int]]:
    """(seconds, pairs) of every batch that the precomputed reference scores before the training.
    Each ends with a copy to the host, so nothing is waited for that the run does not wait for."""
    reference, found = trainer.reference, []
    score = reference._score

    def timed(batches: Any) -> Any:
        begin = time.perf_counter()
        score(batches)()
        pairs = sum(len(part.scored_lengths) for parts in batches for part in parts) // 2
        found.append((time.perf_counter() - begin, pairs))
        return lambda: None

    reference._score = timed
    return found


def summarize(clock: Any, shape: Shape, on_gpu: bool) -> dict[str, Any]:
    """The columns that times give; seconds are medians over the timed windows."""
    last = -1 if on_gpu and not clock.is_long() else None  # the profiled one
    timed = clock.windows[WARM_UP:last]

    def median(begin: int, end: int, steps: int = WINDOW) -> float:
        return statistics.median(w[end] - w[begin] for w in timed) / steps

    totals = [(w[2] - w[0]) / WINDOW for w in timed]
    first = clock.logs[0]  # in which every arm's reference is the start
    record: dict[str, Any] = {
        "windows": len(timed),
        "step_s": statistics.median(totals),
        "step_s_min": min(totals),
        "step_s_max": max(totals),
        "alone_s": median(1, 2),
        "sweep_s": median(0, 1),
        "move_ms": 1e3 * median(2, 3, 1),
        "loss": first["loss"],
        "grad_norm": first.get("grad_norm"),
        "logps_chosen": first.get("logps/chosen"),
        "logps_rejected": first.get("logps/rejected"),
        "useful_tokens": shape.useful,
    }
    if on_gpu:
        record |= {
            "peak_gib": clock.peak / 2**30,
            "reserved_gib": clock.reserved / 2**30,
            "reason": clock.no_profile,
        }
    if on_gpu and clock.work is not None:
        record |= {
            "gpu_busy_s": clock.work.busy_s / WINDOW,
            "kernels": clock.work.kernels / WINDOW,
            "device_events": clock.work.events / WINDOW,
        }
    return record


def _add_scoring(record: dict[str, Any], scoring: list[tuple[float, int]], step: int) -> None:
    """A frozen reference's scoring of all rows: its median share of a step, first batch left out.

    The window's own `sweep_s` holds the fetching of batches alone.
    """
    pairs = max(pairs for _, pairs in scoring)
    seconds = statistics.median(s for s, n in scoring[1:] or scoring if n == pairs)
    share = seconds / pairs * step  # `step`: pairs of a step
    for column in ("step_s", "step_s_min", "step_s_max", "sweep_s"):
        record[column] += share


# --- without a card ------------------------------------------------------------------------------


def trace_case(case: Case) -> float:
    """GiB at the peak of two steps, of a GPU's paths on fake tensors: what a card would need.

    Raises:
        Exception: what the arm raises.
    """
    import dataclasses

    from tralign_fast.memory import trace, trace_trl

    work = make_work(case, tiny=False, traced=True)
    options = {**work.options, "max_steps": 2, "ref_model_sync_steps": 1}
    work = dataclasses.replace(work, options=options)
    return (trace_trl if case.is_trl else trace)(work).peak / 2**30


# --- the card's rate ------------------------------------------------------------------------------


def measure_rate(tiny: bool) -> dict[str, Any]:
    """Floating-point operations a second of a bf16 product of 8192 x 8192 x 8192; the card."""
    import torch

    on_gpu = torch.cuda.is_available() and not tiny
    size = 8192 if on_gpu else 256
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(60):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.mm(a, b, out=out)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - start)
    return {"rate": 2 * size**3 / statistics.median(seconds[20:])}
