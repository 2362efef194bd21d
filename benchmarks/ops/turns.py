"""Arms in turn: each in a process of its own, checked once, timed, its memory watched."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.arms import ARMS, SEQUENCES, UNCHECKED, Case, Inputs, dpo, make_inputs

# Relative errors of loss and gradients (Frobenius). What rounding logits to the dtype makes of the
# loss and, through its slope, of all gradients alike is 2e-5 in fp32 and 6e-3 in bf16 at N=1,024.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

# --- the gate -------------------------------------------------------------------------------------


def exact_loss_and_gradients(inputs: Inputs, block: int = 512) -> tuple[float, Tensor, Tensor]:
    """Loss, d hidden and d weight (fp32) by the equations, `block` rows of logits at a time.

    In fp64 for fp32 inputs, in fp32 for bf16 ones: 2⁻¹⁶ of their unit in either case, or less.
    """
    dtype = torch.float64 if inputs.weight.dtype == torch.float32 else torch.float32
    index, targets = inputs.index, inputs.scored_targets

    def blocks(hidden: Tensor, weight: Tensor) -> Iterable[tuple[slice, Tensor, Tensor]]:
        rows = hidden.detach().flatten(0, 1)[index].to(dtype)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            yield part, rows[part], (rows[part] @ weight.t()).log_softmax(-1)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        parts = [
            p.gather(1, targets[part, None])[:, 0]
            for part, _, p in blocks(hidden, weight.to(dtype))
        ]
        return torch.cat(parts).view(SEQUENCES, -1).sum(1)

    weight = inputs.weight.detach().to(dtype)
    own = logps(inputs.hidden, weight).requires_grad_()
    loss = dpo(own, logps(inputs.ref_hidden, inputs.ref_weight))
    (per_sequence,) = torch.autograd.grad(loss, own)
    grad = per_sequence.repeat_interleave(len(index) // SEQUENCES)
    d_weight = torch.zeros_like(weight)
    d_rows = weight.new_empty(len(index), weight.shape[1])
    for part, rows, log_p in blocks(inputs.hidden, weight):
        d_logits = log_p.exp_().mul_(-grad[part, None])
        d_logits[torch.arange(len(rows)), targets[part]] += grad[part]
        d_rows[part] = d_logits @ weight
        d_weight += d_logits.t() @ rows
    d_hidden = torch.zeros_like(inputs.hidden.detach(), dtype=torch.float32)
    d_hidden.view(-1, weight.shape[1])[index] = d_rows.float()
    return loss.item(), d_hidden, d_weight.float()


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


# --- in the process of an arm ---------------------------------------------------------------------


def serve_arm(arm: str, pipe: Any) -> None:
    """Answers the parent's words: ("setup", case), ("call",), ("check", path), ("rest", whether it
    goes on), ("stop",)."""
    warnings.filterwarnings("ignore")
    # a custom operator's first call imports it, in 1.6 s, where nothing (a Trainer does) has before
    importlib.import_module("torch._dynamo")
    inputs = call = None
    rested = False
    while True:
        word, *arguments = pipe.recv()
        try:
            if word == "setup":
                inputs = call = None
                gc.collect()
                inputs = make_inputs(arguments[0])
                call = ARMS[arm][1](inputs)
                answer, rested = None, False
            elif word == "call":
                assert inputs is not None
                assert call is not None
                if rested:  # the allocator asks the card for memory again, which takes long
                    _timed_call(inputs, call)
                answer, rested = _timed_call(inputs, call), False
            elif word == "check":
                assert inputs is not None
                answer = _errors(inputs, arguments[0])
            elif word == "rest":
                if inputs is not None:
                    inputs.hidden.grad = inputs.weight.grad = None
                if not arguments[0]:
                    inputs = call = None
                    gc.collect()
                torch.cuda.empty_cache()
                answer, rested = None, True
            else:
                return
            pipe.send(("ok", answer))
        except Exception:  # a rival's own; the parent leaves the arm out and says why
            pipe.send(("failed", traceback.format_exc().strip().splitlines()[-1]))


def _timed_call(inputs: Inputs, call: Callable[[], Tensor]) -> tuple[float, float, float]:
    """(loss, seconds, MiB on top of what was there) of one call, forward and backward."""
    inputs.hidden.grad = inputs.weight.grad = None
    memory = _PeakMemory(inputs.hidden.device)
    begin = time.perf_counter()
    loss = call()
    if loss.requires_grad:
        loss.backward()
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return loss.item(), seconds, memory.peak_mb()


class _PeakMemory:
    """The peak since it was made, above what was there then."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present
            self.start = _status_kb("VmRSS")

    def peak_mb(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated() - self.start) / 2**20
        if sys.platform == "linux":
            return (_status_kb("VmHWM") - self.start) / 2**10
        return float("nan")


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _errors(inputs: Inputs, path: str) -> tuple[float, float]:
    """Relative errors of d hidden and d weight against the parent's exact ones."""
    if inputs.hidden.grad is None:
        return 0.0, 0.0
    exact = torch.load(path, mmap=True)
    pairs = zip((inputs.hidden.grad, inputs.weight.grad), exact, strict=True)
    hidden, weight = (relative_error(g, e.to(g.device)) for g, e in pairs if g is not None)
    return hidden, weight


# --- in the parent --------------------------------------------------------------------------------


@dataclass
class Run:
    """What an arm did on one case."""

    arm: str
    first: float = float("nan")  # seconds of the first call
    seconds: list[float] = field(default_factory=list)  # of the steady ones
    peak_mb: list[float] = field(default_factory=list)
    errors: tuple[float, float, float] | None = None  # of loss, d hidden, d weight
    failed: str | None = None

    def verdict(self, dtype: str) -> str:
        """ok, wrong, failed or unchecked (sweeps, and arms that give another loss or none)."""
        if self.failed is not None:
            return "failed"
        if self.errors is None:
            return "unchecked"
        tolerances = LOSS_TOLERANCE[dtype], *[GRADIENT_TOLERANCE[dtype]] * 2
        good = all(e <= t for e, t in zip(self.errors, tolerances, strict=True))  # NaN is not
        return "ok" if good else "wrong"


class Failed(Exception):
    """An arm could not do what it was told."""


START = "spawn"  # a fresh interpreter an arm; tests fork one that has imported everything


class ArmProcess:
    """A process with one arm; it works only while a method of this is running."""

    def __init__(self, arm: str) -> None:
        context: Any = multiprocessing.get_context(START)
        self.arm = arm
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_arm, args=(arm, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *words: Any) -> Any:
        try:
            self._pipe.send(words)
            kind, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise Failed("its process died") from None
        if kind == "failed":
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(("stop",))
        self._process.join()


def measure(
    processes: Sequence[ArmProcess],
    case: Case,
    *,
    rounds: int,
    arm_seconds: float,
    gate: bool = True,
) -> list[Run]:
    """Calls the arms in turn: once to warm up and to be checked, then `rounds` times.

    On a card an arm gives its memory back after its turn: the others' logits would not fit beside
    what its allocator keeps, and ours take what is free.
    """
    runs = {process: Run(process.arm) for process in processes}
    used = dict.fromkeys(processes, 0.0)
    loss, *gradients = exact_loss_and_gradients(make_inputs(case)) if gate else (0.0,)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/gradients.pt"
        torch.save([g.cpu() for g in gradients], path)
        del gradients
        if case.device == "cuda":
            torch.cuda.empty_cache()  # the card is the arms' now
        for round in range(rounds + 1):
            for process, run in runs.items():
                if run.failed or (round > 1 and used[process] > arm_seconds):
                    continue
                try:
                    if round == 0:
                        process.ask("setup", case)
                    value, seconds, peak = process.ask("call")
                    if round > 0:
                        used[process] += seconds
                        run.seconds.append(seconds)
                        run.peak_mb.append(peak)
                    else:
                        run.first = seconds
                        if gate and run.arm not in UNCHECKED:
                            errors = process.ask("check", path)
                            run.errors = (abs(value - loss) / abs(loss), *errors)
                except Failed as error:
                    run.failed = str(error)
                if case.device == "cuda":
                    with contextlib.suppress(Failed):
                        process.ask("rest", run.failed is None)
    return list(runs.values())
