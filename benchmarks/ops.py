"""Seconds and memory of the head: hidden states to a DPO loss and back, ours beside its rivals.

    python -m benchmarks.ops [--dtype fp32 bf16] [--tokens N] [--hidden H] [--vocab V]
    python -m benchmarks.ops --scaling N|V|H         time and memory against one size
    python -m benchmarks.ops --vocab_filter          ε against columns kept, error and time
    python -m benchmarks.ops --quick                 small sizes, to try it out

**The work.** Two pairs, so four sequences, half of whose positions are completions: N scored of
2·N. LM head and DPO's loss alone: policy forward and backward (gradients of hidden states and of
the weight) and reference forward. Every arm is called as its documentation says. On a GPU the
default sizes are those of Llama-3-8B, on a CPU smaller ones.

**Turns.** Every arm is a process of its own, and one works at a time: A B C … A B C …, so that
noise of the machine hits all alike. An arm that has used up `--arm_seconds` leaves the round (at
least one steady call is timed); `calls` says how many were.

**The gate.** After the first call, loss and gradients are compared with exact ones from the same
inputs (fp64 for fp32, fp32 for bf16). An arm outside the tolerance is marked wrong and timed on; if
it is ours, the exit code is 1.

**Memory.** What a steady call needs on top of inputs: on a GPU the allocator's peak, on Linux the
process's peak resident memory, reset before the call (/proc/self/clear_refs; freed memory is given
back to the system first). Both gradients are in it.

**First call.** The first of the process, imports done: compilation, if any, without disk caches.

**The limit** is the four bare matrix products over the N scored rows, without anything around them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    Summary,
    device_name,
    environment,
    format_table,
    plot_lines,
    plot_panels,
    read_csv,
    summarize,
    write_csv,
)

BETA = 0.1
SEQUENCES = 4
LEAN_MB = 4  # too little to keep the logits: they are computed again
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative errors of loss and gradients (Frobenius). What rounding logits to the dtype makes of the
# loss and, through its slope, of all gradients alike is 2e-5 in fp32 and 6e-3 in bf16 at N=1,024.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


@dataclass(frozen=True)
class Case:
    """One shape; everything an arm is told."""

    tokens: int  # N
    hidden: int  # H
    vocab: int  # V
    dtype: str
    device: str


@dataclass
class Inputs:
    hidden: Tensor  # (S, L, H)
    weight: Tensor  # (V, H)
    ref_hidden: Tensor  # (S, L, H)
    ref_weight: Tensor  # (V, H)
    targets: Tensor  # (S, L)
    mask: Tensor  # (S, L) bool: the second half of every sequence
    labels: Tensor  # (S, L): targets, or -100
    index: Tensor  # (N,) positions of the scored rows in (S·L,)

    @property
    def scored_targets(self) -> Tensor:
        return self.targets.flatten()[self.index]


def make_inputs(case: Case) -> Inputs:
    """The same numbers for a case whatever the arm: logits of standard deviation one."""
    generator = torch.Generator().manual_seed(0)
    length = 2 * case.tokens // SEQUENCES
    dtype, device = DTYPES[case.dtype], case.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(SEQUENCES, length, case.hidden)
    ref_hidden = (hidden + 0.1 * normal(*hidden.shape)).to(device, dtype)
    weight = (normal(case.vocab, case.hidden) / case.hidden**0.5).to(device, dtype)
    targets = torch.randint(0, case.vocab, (SEQUENCES, length), generator=generator)
    mask = torch.zeros(SEQUENCES, length, dtype=torch.bool)
    mask[:, length // 2 :] = True
    return Inputs(
        hidden.to(device, dtype).requires_grad_(),
        weight.clone().requires_grad_(),
        ref_hidden,
        weight,
        targets.to(device),
        mask.to(device),
        torch.where(mask, targets, -100).to(device),
        mask.flatten().nonzero()[:, 0].to(device),
    )


def dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """DPO's loss of (S,) summed log-probs, the chosen half first."""
    (c, r), (ref_c, ref_r) = logps.chunk(2), ref_logps.chunk(2)
    return -F.logsigmoid(BETA * ((c - r) - (ref_c - ref_r))).mean()


# --- the arms: from inputs to a loss --------------------------------------------------------------


def _both(inputs: Inputs, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss, of a function from hidden states (S, L, H) and weight to (S,) log-probs."""
    logps = score(inputs.hidden, inputs.weight)
    with torch.no_grad():
        ref_logps = score(inputs.ref_hidden, inputs.ref_weight)
    return dpo(logps, ref_logps)


def _of_scored(inputs: Inputs, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """As `_both`, of a function from rows (N, H), weight and targets (N,) to log-probs (N,)."""

    def score_sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)[inputs.index]
        # as many scored rows in every sequence
        return score(rows, weight, inputs.scored_targets).view(SEQUENCES, -1).sum(1)

    return _both(inputs, score_sequences)


def make_bare(inputs: Inputs) -> Callable[[], Tensor]:
    rows = inputs.hidden.detach().flatten(0, 1)[inputs.index]
    ref_rows = inputs.ref_hidden.flatten(0, 1)[inputs.index]
    weight = inputs.weight.detach()

    def products() -> Tensor:
        logits = rows.new_empty(len(rows), len(weight))
        torch.mm(ref_rows, inputs.ref_weight.t(), out=logits)
        torch.mm(rows, weight.t(), out=logits)
        gradients = logits @ weight, logits.t() @ rows
        return gradients[0].new_zeros(())

    return products


def make_tralign_fast(inputs: Inputs) -> Callable[[], Tensor]:
    from tralign_fast import linear_logprobs

    return lambda: _of_scored(inputs, linear_logprobs)


def make_tralign_fast_lean(inputs: Inputs) -> Callable[[], Tensor]:
    from tralign_fast import linear_logprobs

    recomputed = functools.partial(linear_logprobs, logits_budget_mb=LEAN_MB)
    return lambda: _of_scored(inputs, recomputed)


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def make_eager(inputs: Inputs) -> Callable[[], Tensor]:
    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        return (_log_softmax(hidden, weight, inputs.targets) * inputs.mask).sum(-1)

    return lambda: _both(inputs, score)


def make_eager_scored(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: _of_scored(inputs, _log_softmax)


def make_compiled(inputs: Inputs) -> Callable[[], Tensor]:
    compiled = torch.compile(_log_softmax)
    return lambda: _of_scored(inputs, compiled)


def make_torch(inputs: Inputs) -> Callable[[], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return lambda: _of_scored(inputs, score)


def make_cce(inputs: Inputs) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.hidden.is_cuda else "torch_compile"

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = linear_cross_entropy(
            hidden, weight, inputs.labels, ignore_index=-100, reduction="none", impl=impl
        )
        return -nll.sum(-1)

    return lambda: _both(inputs, score)


def make_liger(inputs: Inputs) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(
        ignore_index=-100,
        beta=BETA,
        use_ref_model=True,
        average_log_prob=False,
        compiled=inputs.hidden.is_cuda,
        compute_nll_loss=False,
    )
    arguments = (inputs.weight, inputs.hidden, inputs.labels, None)
    return lambda: loss(*arguments, inputs.ref_hidden, inputs.ref_weight)[0]


def make_trl(inputs: Inputs) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets, width = inputs.targets.flatten(), inputs.hidden.shape[-1]

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        logps: Any = ChunkedLogProbFunction.apply(
            hidden.reshape(-1, width), weight, None, targets, 1.0, 8192, None, 1.0, ()
        )
        return (logps[0].view_as(inputs.mask) * inputs.mask).sum(-1)

    return lambda: _both(inputs, score)


# name: (label, from inputs to a function that gives the loss)
ARMS: dict[str, tuple[str, Callable[[Inputs], Callable[[], Tensor]]]] = {
    "bare": ("the bare matrix products", make_bare),
    "tralign_fast": ("tralign-fast", make_tralign_fast),
    "tralign_fast_lean": (f"tralign-fast, logits_budget_mb={LEAN_MB}", make_tralign_fast_lean),
    "cce": ("cut-cross-entropy", make_cce),
    "compiled": ("eager, torch.compile, scored rows", make_compiled),
    "eager_scored": ("eager, scored rows", make_eager_scored),
    "eager": ("eager, full logits", make_eager),
    "liger": ("Liger", make_liger),
    "trl": ("TRL", make_trl),
    "torch": ("F.linear_cross_entropy", make_torch),
}
# Of the sweeps: what else takes seconds where these take one is left out.
SCALING_ARMS = ("bare", "tralign_fast", "tralign_fast_lean", "cce", "eager_scored")


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
    """Answers the parent's words: ("setup", case), ("call",), ("check", path), ("stop",)."""
    warnings.filterwarnings("ignore")
    # a custom operator's first call imports it, in 1.6 s, where nothing (a Trainer does) has before
    importlib.import_module("torch._dynamo")
    inputs = call = None
    while True:
        word, *arguments = pipe.recv()
        try:
            if word == "setup":
                inputs = call = None
                gc.collect()
                inputs = make_inputs(arguments[0])
                call = ARMS[arm][1](inputs)
                answer = None
            elif word == "call":
                assert inputs is not None
                assert call is not None
                answer = _timed_call(inputs, call)
            elif word == "check":
                assert inputs is not None
                answer = _errors(inputs, arguments[0])
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
        """ok, wrong, failed or unchecked (sweeps, and the bare products, which give no loss)."""
        if self.failed is not None:
            return "failed"
        if self.errors is None:
            return "unchecked"
        tolerances = LOSS_TOLERANCE[dtype], *[GRADIENT_TOLERANCE[dtype]] * 2
        good = all(e <= t for e, t in zip(self.errors, tolerances, strict=True))  # NaN is not
        return "ok" if good else "wrong"


class Failed(Exception):
    """An arm could not do what it was told."""


class ArmProcess:
    """A process with one arm; it works only while a method of this is running."""

    def __init__(self, arm: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fresh interpreter
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
    """Calls the arms in turn: once to warm up and to be checked, then `rounds` times."""
    runs = {process: Run(process.arm) for process in processes}
    used = dict.fromkeys(processes, 0.0)
    loss, *gradients = exact_loss_and_gradients(make_inputs(case)) if gate else (0.0,)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/gradients.pt"
        torch.save([g.cpu() for g in gradients], path)
        del gradients
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
                        continue
                    run.first = seconds
                    if gate and run.arm != "bare":
                        run.errors = (abs(value - loss) / abs(loss), *process.ask("check", path))
                except Failed as error:
                    run.failed = str(error)
    return list(runs.values())


# --- results --------------------------------------------------------------------------------------


def make_records(case: Case, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The CSV's rows of one case. `ratio_to_bare`: median over that of the bare products."""
    bare = next((summarize(r.seconds).median for r in runs if r.arm == "bare"), float("nan"))
    return [_record(case, run, bare) for run in runs]


def _record(case: Case, run: Run, bare: float) -> dict[str, Any]:
    nothing = [float("nan")]
    seconds = summarize(run.seconds or nothing)
    loss, d_hidden, d_weight = run.errors or nothing * 3
    return {
        "arm": run.arm,
        "dtype": case.dtype,
        "N": case.tokens,
        "H": case.hidden,
        "V": case.vocab,
        "calls": len(run.seconds),
        "median_s": seconds.median,
        "p20_s": seconds.p20,
        "p80_s": seconds.p80,
        "ratio_to_bare": seconds.median / bare,
        "us_per_token": seconds.median / case.tokens * 1e6,
        "first_call_s": run.first,
        "peak_mb": max(run.peak_mb or nothing),
        "loss_error": loss,
        "d_hidden_error": d_hidden,
        "d_weight_error": d_weight,
        "verdict": run.verdict(case.dtype),
        "failure": run.failed or "",
        "device": device_name(case.device),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    header = ("arm", "median s", "p20", "p80", "× bare", "first s", "peak MiB", "loss", "d hidden",
              "d weight", "calls", "")  # fmt: skip
    rows = [
        (
            ARMS[r["arm"]][0], f"{r['median_s']:.4g}", f"{r['p20_s']:.4g}", f"{r['p80_s']:.4g}",
            f"{r['ratio_to_bare']:.3f}", f"{r['first_call_s']:.3g}", f"{r['peak_mb']:.0f}",
            *(f"{r[k]:.1e}" for k in ("loss_error", "d_hidden_error", "d_weight_error")),
            str(r["calls"]), r["failure"] if r["verdict"] == "failed" else r["verdict"],
        )
        for r in records
    ]  # fmt: skip
    return format_table(header, rows)


def plot_comparison(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Bars of every arm: seconds above, MiB below; a column of panels a dtype."""
    panels = []
    for what, key in (("seconds", "median_s"), ("peak MiB beside the inputs", "peak_mb")):
        for dtype in dict.fromkeys(r["dtype"] for r in records):
            shown = [r for r in records if r["dtype"] == dtype and int(r["calls"])]
            marks = {"wrong": " (wrong)"}
            labels = [ARMS[r["arm"]][0] + marks.get(r["verdict"], "") for r in shown]
            spread = ("median_s", "p20_s", "p80_s") if key == "median_s" else (key,) * 3
            values = [Summary(*(float(r[k]) for k in spread)) for r in shown]
            panels.append((f"{dtype}: {what}", labels, values))
    first = records[0]
    plot_panels(
        path,
        panels,
        columns=len({r["dtype"] for r in records}),
        title=f"Policy forward and backward, reference forward: N={first['N']}, H={first['H']}, "
        f"V={first['V']}, {first['device']}",
    )


def scaling_cases(axis: str, base: Case) -> list[Case]:
    sizes = {
        "N": ("tokens", (256, 1024, 4096, 16384)),
        "V": ("vocab", (32768, 65536, 131072, 262144)),
        "H": ("hidden", (512, 1024, 2048, 4096)),
    }
    name, values = sizes[axis]
    return [replace(base, **{name: value}) for value in values]


def plot_scaling(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """For every axis measured: µs a token above, MiB below."""
    panels = []
    axes = list(dict.fromkeys(r["axis"] for r in records))
    for key, unit in (("us_per_token", "µs a token"), ("peak_mb", "peak MiB beside the inputs")):
        for axis in axes:
            own = [r for r in records if r["axis"] == axis and int(r["calls"])]
            lines = {
                ARMS[arm][0]: [(float(r[axis]), float(r[key])) for r in own if r["arm"] == arm]
                for arm in dict.fromkeys(r["arm"] for r in own)
            }
            fixed = ", ".join(f"{k}={own[0][k]}" for k in "NVH" if k != axis)
            panels.append((f"{axis} ({fixed})", unit, lines))
    title = f"{records[0]['dtype']}, {records[0]['device']}"
    plot_lines(path, panels, columns=len(axes), title=title)


# --- the vocab_filter -----------------------------------------------------------------------------


@torch.no_grad()
def smollm2_tokens(model: Any, tokenizer: Any, count: int) -> tuple[Tensor, Tensor]:
    """(hidden (count, H), targets (count,)): SmolLM2's completions of the demo, its own samples."""
    from tralign_fast.data.demo import train_rows

    hidden, targets, found = [], [], 0
    for row in train_rows():
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        answer = row["chosen"][0]["content"] + tokenizer.eos_token
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)
        )
        ids = torch.tensor([prompt + answer], device=model.device)
        states = model.model(ids).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        targets.append(ids[0, len(prompt) :])
        found += len(answer)
        if found >= count:
            return torch.cat(hidden)[:count], torch.cat(targets)[:count]
    raise ValueError(f"the demo's rows have {found} tokens, expected at least {count}")


EPSILONS = (None, 3e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


def measure_vocab_filter(
    tokens: int, dtype: str, device: str, rounds: int, epsilons: Sequence[float | None] = EPSILONS
) -> list[dict[str, Any]]:
    """CSV rows, one an ε: columns kept, errors of the gradients, seconds of forward and backward.

    Errors are against the exact gradients in the same dtype, beside that of rounding those to bf16.
    Timed in turn with the three bare products over the whole vocabulary.
    """
    from tralign_fast import linear_logprobs
    from tralign_fast.smollm2 import load_smollm2
    from tralign_fast.vocab_filter import last_vocab_filter

    model: Any
    model, tokenizer = load_smollm2()
    hidden, targets = smollm2_tokens(model.to(device), tokenizer, tokens)
    leaves = [t.detach().to(DTYPES[dtype]) for t in (hidden, model.lm_head.weight)]
    hidden, weight = (t.requires_grad_() for t in leaves)
    # DPO's gradient: one sign for the tokens of a chosen completion, the other for a rejected one's
    grad = torch.where(torch.arange(tokens, device=device) % 80 < 40, 1.0, -1.0)

    def ours(epsilon: float | None) -> tuple[Tensor, ...]:
        logps = linear_logprobs(hidden, weight, targets, vocab_filter=epsilon)
        return torch.autograd.grad(logps, (hidden, weight), grad)

    def bare() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            _ = logits @ weight, logits.t() @ hidden

    exact = [g.float() for g in ours(None)]
    rounding = [relative_error(g.bfloat16(), g) for g in exact]
    reports, errors = {}, {}
    for epsilon in epsilons:
        gradients = ours(epsilon)
        reports[epsilon] = last_vocab_filter() if epsilon else None
        errors[epsilon] = [relative_error(g, e) for g, e in zip(gradients, exact, strict=True)]
    works: dict[Any, Callable[[], Any]] = {"bare": bare}
    works.update({e: (lambda e=e: ours(e)) for e in epsilons})
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            begin = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[key].append(time.perf_counter() - begin)
    limit = summarize(seconds["bare"]).median
    vocab = weight.shape[0]
    records = []
    for epsilon in epsilons:
        report, time_of = reports[epsilon], summarize(seconds[epsilon])
        records.append(
            {
                "epsilon": epsilon or 0.0,
                "dtype": dtype,
                "N": tokens,
                "H": weight.shape[1],
                "V": vocab,
                "columns": report.columns if report else vocab,
                "kept": report.columns / vocab if report else 1.0,
                "left_out_mass": report.left_out_mass if report else 0.0,
                "exact": report.exact if report else True,
                "d_hidden_error": errors[epsilon][0],
                "d_weight_error": errors[epsilon][1],
                "d_hidden_bf16_rounding": rounding[0],
                "d_weight_bf16_rounding": rounding[1],
                "median_s": time_of.median,
                "p20_s": time_of.p20,
                "p80_s": time_of.p80,
                "bare_s": limit,
                "ratio_to_bare": time_of.median / limit,
                "device": device_name(device),
            }
        )
    return records


def vocab_filter_table(records: Sequence[dict[str, Any]]) -> str:
    header = ("ε", "kept", "mass", "d hidden", "d weight", "median s", "× bare", "")
    rows = [
        (
            f"{r['epsilon']:.3g}", f"{r['kept']:.1%}", f"{r['left_out_mass']:.2%}",
            f"{r['d_hidden_error']:.3%}", f"{r['d_weight_error']:.3%}", f"{r['median_s']:.4g}",
            f"{r['ratio_to_bare']:.3f}", "exact" if r["exact"] else "",
        )
        for r in records
    ]  # fmt: skip
    first = records[0]
    return format_table(header, rows) + (
        f"\nrounding to bf16: d hidden {first['d_hidden_bf16_rounding']:.3%}, d weight "
        f"{first['d_weight_bf16_rounding']:.3%}; bare products {first['bare_s']:.4g} s"
    )


def plot_vocab_filter(path: Path, records: Sequence[dict[str, Any]]) -> None:
    shown = sorted((r for r in records if not r["exact"]), key=lambda r: r["epsilon"])
    first = records[0]

    def line(key: str) -> list[tuple[float, float]]:
        return [(r["epsilon"], r[key]) for r in shown]

    def level(value: float) -> list[tuple[float, float]]:
        return [(r["epsilon"], value) for r in shown]

    exact = next(r["ratio_to_bare"] for r in records if not r["epsilon"])
    errors = {"d hidden": line("d_hidden_error"), "d weight": line("d_weight_error")}
    errors["bf16 rounding of d hidden"] = level(first["d_hidden_bf16_rounding"])
    times = {
        "with the filter": line("ratio_to_bare"),
        "without": level(exact),
        "bare products": level(1.0),
    }
    panels = [
        ("ε", "columns kept", {"kept": line("kept")}),
        ("ε", "relative error", errors),
        ("ε", "seconds over the bare products'", times),
    ]
    title = f"vocab_filter: SmolLM2 on {first['N']} tokens of its own samples, {first['dtype']}"
    plot_lines(path, panels, columns=3, title=f"{title}, {first['device']}")


# --- command line ---------------------------------------------------------------------------------


def compare(args: argparse.Namespace, cases: Sequence[Case], gate: bool = True) -> list[dict]:
    """Runs all cases, prints a table of each; the records."""
    records = []
    processes = [ArmProcess(arm) for arm in args.arms]
    try:
        for case in cases:
            print(f"N={case.tokens} H={case.hidden} V={case.vocab} {case.dtype} on {case.device}")
            runs = measure(
                processes, case, rounds=args.rounds, arm_seconds=args.arm_seconds, gate=gate
            )
            records += (own := make_records(case, runs))
            print(table(own) + "\n", flush=True)
    finally:
        for process in processes:
            process.stop()
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.arms = args.arms or list(SCALING_ARMS if args.scaling else ARMS)
    args.dtype = args.dtype or (["bf16"] if on_gpu else list(DTYPES))
    args.rounds = args.rounds or (3 if args.scaling else 9)
    # compile times are those of a first user, not of whoever ran this before
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    folder = Path(args.output_dir)
    prefix = "gpu_" if on_gpu else ""
    defaults = (1024, 4096, 128256) if on_gpu else (1024, 1024, 65536)
    if args.scaling and not on_gpu:
        defaults = (1024, 512, 32768)
    if args.quick:
        defaults = (64, 64, 1024)
    tokens, hidden, vocab = (
        given or default
        for given, default in zip((args.tokens, args.hidden, args.vocab), defaults, strict=True)
    )
    system = environment(PACKAGES)
    if args.vocab_filter:
        rows = measure_vocab_filter(tokens, args.dtype[0], args.device, args.rounds)
        print(vocab_filter_table(rows))
        write_csv(folder / f"{prefix}vocab_filter.csv", [{**row, **system} for row in rows])
        plot_vocab_filter(folder / f"{prefix}vocab_filter.png", rows)
        return 0
    if args.scaling:
        base = Case(tokens, hidden, vocab, "bf16", args.device)
        cases = scaling_cases(args.scaling, base)
        rows = compare(args, cases, gate=False)
        rows = [{"axis": args.scaling, **row, **system} for row in rows]
        merged = _merge(folder / f"{prefix}ops_scaling.csv", rows, "axis")
        plot_scaling(folder / f"{prefix}ops_scaling.png", merged)
        return 0
    cases = [Case(tokens, hidden, vocab, dtype, args.device) for dtype in args.dtype]
    rows = compare(args, cases)
    merged = _merge(folder / f"{prefix}ops.csv", [{**row, **system} for row in rows], "dtype")
    plot_comparison(folder / f"{prefix}ops.png", merged)
    bad = [r for r in rows if r["arm"].startswith("tralign_fast") and r["verdict"] != "ok"]
    for row in bad:
        print(f"{row['arm']} is {row['verdict']} in {row['dtype']}: see above", file=sys.stderr)
    return 1 if bad else 0


def _merge(path: Path, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Replaces the rows of a CSV that have the new ones' `key`: each may be a run of its own."""
    replaced = {row[key] for row in rows}
    rows = rows + [row for row in read_csv(path) if row[key] not in replaced]
    write_csv(path, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: all")
    parser.add_argument("--tokens", type=int, help="N, scored positions; a multiple of 4")
    parser.add_argument("--hidden", type=int, help="H")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    parser.add_argument("--rounds", type=int, help="timed calls of an arm, at most")
    parser.add_argument(
        "--arm_seconds", type=float, default=15.0, help="after so many an arm leaves the round"
    )
    parser.add_argument("--scaling", choices=["N", "V", "H"], help="sweep one size instead")
    parser.add_argument("--vocab_filter", action="store_true", help="sweep ε instead")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--output_dir", default="benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
