"""Seconds and memory of one optimizer step: TRL's DPOTrainer beside our TRTrainer.

    python -m benchmarks.step [--distribution chat|summarisation|long|all] [--steps N] [--pairs 2]
                              [--ablations | --references | --drop_in] [--dtype fp32]
                              [--model smollm2] [--output_dir benchmarks/results]

On a GPU the defaults are eight pairs, bf16 and random weights of Llama-3.2-1B's shape, and the
results' names begin with "gpu_".

Both run TR-DPO with a resident reference that moves every two steps, on the same rows in the same
order, without gradient checkpointing, evaluation or saving. Every arm is a process of its own that
runs the trainer's own `train()`, so its peak memory is its own.

**Turns.** An arm stops at the start of every step until the parent lets it go, and the parent lets
one go only while all others wait: A B A B …, step for step, so that noise of the machine hits all
alike.

**The timed span** reaches from the end of `on_step_begin` to the end of `on_step_end`: forward of
policy and reference, loss, metrics, backward, clipping, AdamW, the scheduler and the move of the
reference (the timing callback is added after the trainers' own, so the sync lies inside). The batch
has been fetched and collated before `on_step_begin`, and logging follows `on_step_end`, in all arms
alike; what that takes is the CSV's `between_s`. The first step is a warm-up and left out. How many
cores other processes used during the steps is `others_cores`; on a busy machine times mean nothing,
as threads that wait for a preempted one only spin.

**Windows.** A reference that is not run at every step scores the steps until its next update ahead
of them, before `on_step_begin`. `--references` compares the places of the reference under hard
updates, by `window_s`: seconds per step from the end of one window to the end of the next, all that
lies between included, for every arm.

**The gate.** After every step the arms' losses must agree, and their gradient norms too: at the
first step the policy is the reference, and DPO's loss is log 2 whatever was computed.

**Tokens.** Computed: positions that go through the transformer, padding counted, of policy and
reference together. Useful: prompt + chosen and prompt + rejected of every pair, counted once, the
same for all arms.

**Parts.** `--ablations` measures what each part gives, two arms beside each other: without it and
with it.

**Memory.** The process's peak resident memory (on a GPU the allocator's peak), and how far that is
above what was there once both models were loaded: gradients, AdamW's moments, activations, logits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Summary,
    device_name,
    environment,
    format_table,
    plot_bars,
    summarize,
    write_csv,
)
from benchmarks.step_arm import (
    ARMS,
    COMPARISONS,
    DISTRIBUTIONS,
    MODELS,
    SYNC_EVERY,
    TORCH_DTYPES,
    Job,
    run_arm,
)

# Largest relative difference from the first arm. Seen against TRL, over ten steps in fp32: 1.4e-5
# and 1.0e-5, not growing.
# bf16 has 8 bits, and rounds differently in every layout.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1}
# A core's worth of other work that already disturbs threads which wait for each other.
QUIET_CORES = 0.1


@dataclass
class Run:
    """What an arm's process told: one entry a step, the warm-up included."""

    arm: str
    spans: list[tuple[float, float]] = field(default_factory=list)  # monotonic clock, begin and end
    others: list[float] = field(default_factory=list)  # cores that other processes used meanwhile
    between: list[float] = field(default_factory=list)  # seconds from a step to the next
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)  # tokens of the batch's sequences
    facts: dict[str, Any] = field(default_factory=dict)  # loaded_mb, peak_mb, model

    @property
    def seconds(self) -> list[float]:
        return [end - begin for begin, end in self.spans]

    @property
    def window_seconds(self) -> list[float]:
        """Seconds per step of every window after the first, with what lies between the steps."""
        whole = [b + s for b, s in zip(self.between, self.seconds[1:], strict=True)]
        starts = range(SYNC_EVERY - 1, len(whole) - SYNC_EVERY + 1, SYNC_EVERY)
        return [sum(whole[i : i + SYNC_EVERY]) / SYNC_EVERY for i in starts]

    @property
    def useful(self) -> list[int]:
        return [sum(lengths) for lengths in self.lengths]


class Disagreement(Exception):
    """Two arms did not compute the same thing."""


# --- in the parent --------------------------------------------------------------------------------


START = "spawn"  # a fresh interpreter an arm; tests fork one that has imported everything


class _ArmProcess:
    """A running arm, between two steps whenever no method of this is running."""

    def __init__(self, job: Job) -> None:
        self.run = Run(job.arm)
        context = multiprocessing.get_context(START)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_arm, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # the arm's end closes when the arm dies
        self._wait()

    def step(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, as `_wait` will find
            self._pipe.send("go")
        self._wait()

    def stop(self) -> None:
        if not self.run.facts:  # in the middle of its work
            self._process.terminate()
        self._process.join()

    def _wait(self) -> None:
        """Reads what the arm tells until it waits for its next turn, or has ended."""
        run = self.run
        while True:
            try:
                kind, message = self._pipe.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                killed = self._process.exitcode == -signal.SIGKILL
                why = "killed, by the system if memory ran out" if killed else "see its error above"
                raise RuntimeError(f"the arm {run.arm} died: {why}") from None
            if kind == "step":
                run.spans.append(message[:2])
                run.others.append(message[2])
            elif kind == "log":
                run.losses.append(message[0])
                run.gradient_norms.append(message[1])
            elif kind == "ready":
                at, computed, lengths = message
                run.between += [at - run.spans[-1][1]] if run.spans else []
                run.computed.append(computed)
                run.lengths.append(lengths)
                return
            else:
                run.facts = message
                return


def measure(jobs: Sequence[Job], on_turn: Callable[[], Any] = lambda: None) -> list[Run]:
    """Runs the jobs' steps in turn: the first job's step 1, the second job's step 1, …, step 2, ….

    Raises:
        Disagreement: an arm's loss or gradient norm is not that of the first; raised at once.
    """
    arms: list[_ArmProcess] = []
    try:
        for job in jobs:
            arms.append(_ArmProcess(job))
            on_turn()
        for _ in range(jobs[0].steps):
            for arm in arms:
                arm.step()
                on_turn()
            check_agreement([arm.run for arm in arms], jobs[0].dtype)
        return [arm.run for arm in arms]
    finally:
        for arm in arms:
            arm.stop()


def check_agreement(runs: Sequence[Run], dtype: str = "fp32") -> None:
    """Raises Disagreement if a run's last step is not the first run's, in numbers or in rows."""
    first = runs[0]
    for run in runs[1:]:
        step = len(run.losses)
        what = f"step {step}: {run.arm} and {first.arm} disagree"
        if run.lengths[step - 1] != first.lengths[step - 1]:
            raise Disagreement(f"{what}: other rows, or other tokens of the same rows")
        for name, ours, theirs, tolerance in (
            ("loss", run.losses, first.losses, LOSS_TOLERANCE[dtype]),
            ("gradient norm", run.gradient_norms, first.gradient_norms, GRADIENT_TOLERANCE[dtype]),
        ):
            # written so that NaN fails
            if not largest_difference(ours[-1:], theirs[-1:]) <= tolerance:
                raise Disagreement(
                    f"{what}: {name} {ours[-1]:.7g} and {theirs[-1]:.7g}; expected equality to "
                    f"{tolerance:g}"
                )


def largest_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


# --- results --------------------------------------------------------------------------------------


def make_records(jobs: Sequence[Job], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The CSV's rows of one distribution; the warm-up is left out of all but the agreement.

    `ratio_to_first` is the median of the arm `first` over this arm's: above 1, this arm is faster;
    `pairwise_ratio_to_first` is the median of the same ratio step by step, `total_ratio_to_first`
    that of all steps' time. Steps differ in their rows, so in their time and in their ratio.
    Tokens are means per step, memory is in MiB.
    """
    trl = runs[0]
    return [_record(job, run, trl) for job, run in zip(jobs, runs, strict=True)]


def _record(job: Job, run: Run, trl: Run) -> dict[str, Any]:
    seconds, theirs = run.seconds[1:], trl.seconds[1:]
    time_of = summarize(seconds)
    tokens = [n for lengths in run.lengths for n in lengths]
    words = DISTRIBUTIONS[job.distribution]
    return {
        "distribution": job.distribution,
        "part": job.part,
        "first": trl.arm,
        "arm": job.arm,
        "steps": len(seconds),
        "median_s": time_of.median,
        "p20_s": time_of.p20,
        "p80_s": time_of.p80,
        "ratio_to_first": summarize(theirs).median / time_of.median,
        "pairwise_ratio_to_first": summarize(
            [a / b for a, b in zip(theirs, seconds, strict=True)]
        ).median,
        "total_s": sum(seconds),
        "total_ratio_to_first": sum(theirs) / sum(seconds),
        "between_s": summarize(run.between).median,
        "window_s": summarize(run.window_seconds).median if run.window_seconds else float("nan"),
        "others_cores": sum(run.others[1:]) / len(seconds),
        "tokens_computed": round(sum(run.computed[1:]) / len(seconds)),
        "useful_tokens": round(sum(run.useful[1:]) / len(seconds)),
        "useful_tokens_per_s": summarize(
            [n / s for n, s in zip(run.useful[1:], seconds, strict=True)]
        ).median,
        "peak_mb": run.facts["peak_mb"],
        "delta_mb": run.facts["peak_mb"] - run.facts["loaded_mb"],
        "last_loss": run.losses[-1],
        "max_rel_loss_diff": largest_difference(run.losses, trl.losses),
        "max_rel_grad_norm_diff": largest_difference(run.gradient_norms, trl.gradient_norms),
        "dtype": job.dtype,
        "model": MODELS[job.model],
        "shapes": f"pairs={job.pairs} tokens={min(tokens)}-{max(tokens)} {run.facts['model']}",
        "words": f"prompt={'-'.join(map(str, words.prompt))} "
        f"completion={'-'.join(map(str, words.completion))}",
        "sync_every": SYNC_EVERY,
        "device": device_name(job.device),
        "threads": run.facts["threads"],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    header = [
        "", "s/step", "p20", "p80", "speed-up", "pairwise", "in total", "with sweep", "tokens",
        "useful tok/s", "peak MiB", "+MiB", "loss diff",
    ]  # fmt: skip
    rows = [
        [
            f"{r['distribution']}: {r['part'] and r['part'] + ': '}{ARMS[r['arm']].label}",
            *(f"{r[key]:.3f}" for key in ("median_s", "p20_s", "p80_s")),
            *(
                f"{r[key]:.2f}x"
                for key in ("ratio_to_first", "pairwise_ratio_to_first", "total_ratio_to_first")
            ),
            f"{r['window_s']:.3f}",
            f"{r['tokens_computed']:,}",
            f"{r['useful_tokens_per_s']:,.0f}",
            *(f"{r[key]:,.0f}" for key in ("peak_mb", "delta_mb")),
            f"{r['max_rel_loss_diff']:.1e}",
        ]
        for r in records
    ]
    return format_table(header, rows)


def plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    one = records[0]
    parts = bool(one["part"])
    groups = list(dict.fromkeys((r["distribution"], r["part"]) for r in records))
    series: dict[str, list[Summary]] = {}
    for r in records:
        summary = Summary(r["median_s"], r["p20_s"], r["p80_s"])
        without = "without" if r["arm"] == r["first"] else "with"
        series.setdefault(without if parts else ARMS[r["arm"]].label, []).append(summary)
    title = (
        f"One optimizer step of TR-DPO, {one['model']}, {one['dtype']}, "
        f"{one['shapes'].split()[0].split('=')[1]} pairs a batch\n"
        f"{one['device']}; median of {one['steps']} steps, p20 to p80"
    )
    labels = [distribution + (part and f":\n{part}") for distribution, part in groups]
    plot_bars(path, labels, series, title=title, ylabel="seconds per step (lower is better)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the arms disagree, and writes nothing of that distribution."""
    options = _parser().parse_args(arguments)
    names = list(DISTRIBUTIONS) if options.distribution == "all" else [options.distribution]
    parts = COMPARISONS[options.comparison]
    system, records = environment(), []
    import torch
    from tqdm import tqdm  # not above: an arm switches it off before it imports it

    on_gpu = torch.cuda.is_available()
    pairs = options.pairs or (8 if on_gpu else 2)
    dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    model = options.model or ("llama-3.2-1b" if on_gpu else "smollm2")
    path = Path(options.output_dir) / ("gpu_" * on_gpu + options.comparison)

    steps = options.steps + 1  # the warm-up
    turns = len(names) * sum(map(len, parts.values())) * (steps + 1)  # an arm's start counts as one
    with tqdm(total=turns, unit="turn", file=sys.stderr) as progress:
        for name, (part, arms) in itertools.product(names, parts.items()):
            progress.set_description(f"{name} {part}")
            jobs = [
                Job(arm, name, steps, pairs, dtype, model, "cuda" if on_gpu else "cpu", part)
                for arm in arms
            ]
            try:
                runs = measure(jobs, progress.update)
            except Disagreement as error:
                print(f"{name}: not a comparison, nothing is reported: {error}", file=sys.stderr)
                return 1
            records += [{**record, **system} for record in make_records(jobs, runs)]
            write_csv(path.with_suffix(".csv"), records)  # after each: a run may be cut short
            plot(path.with_suffix(".png"), records)
    print(table(records))
    loss, norm = (max(r[f"max_rel_{key}_diff"] for r in records) for key in ("loss", "grad_norm"))
    print(
        f"\nTimed steps: {options.steps}; pairs a step: {pairs}. Speed-up: the first arm's "
        "time over the arm's.\nTokens: computed per step, by policy and reference. Largest "
        "relative\ndifference from the first arm in any step: "
        f"loss {loss:.1e}, gradient norm {norm:.1e}."
    )
    others = max(r["others_cores"] for r in records)
    if others > QUIET_CORES and not on_gpu:
        print(f"Not a quiet machine: other processes took {others:.2f} cores. Times are noise.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--distribution", choices=[*DISTRIBUTIONS, "all"], default="all")
    parser.add_argument(
        "--steps", type=_positive, default=10, help="timed steps; one more is the warm-up"
    )
    parser.add_argument("--pairs", type=_positive, help="in a batch; default: 2, on a GPU 8")
    parser.set_defaults(comparison="step")
    extra = parser.add_mutually_exclusive_group()
    for name, text in (
        ("ablations", "what every part gives: arms without it"),
        ("references", "the places of the reference, hard updates"),
        ("drop_in", "TRL's trainer without and with use_fast_logprobs"),
    ):
        extra.add_argument(
            f"--{name}", dest="comparison", action="store_const", const=f"step_{name}", help=text
        )
    parser.add_argument("--dtype", choices=list(TORCH_DTYPES), help="default: fp32, on a GPU bf16")
    parser.add_argument(
        "--model", choices=list(MODELS), help="default: smollm2; tiny: to try it out"
    )
    parser.add_argument("--output_dir", default="benchmarks/results", help="for its CSV and PNG")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
