"""Seconds and memory of one optimizer step: TRL's DPOTrainer beside our TRTrainer, on a CPU.

    python -m benchmarks.step [--distribution chat|summarisation|long|all] [--steps N] [--pairs 2]
                              [--ablations] [--dtype fp32] [--output_dir benchmarks/results]

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

**The gate.** After every step the arms' losses must agree, and their gradient norms too: at the
first step the policy is the reference, and DPO's loss is log 2 whatever was computed.

**Tokens.** Computed: positions that go through the transformer, padding counted, of policy and
reference together. Useful: prompt + chosen and prompt + rejected of every pair, counted once, the
same for all arms.

**Memory.** The process's peak resident memory, and how far that is above what was resident once
both models were loaded: gradients, AdamW's moments, activations, logits.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Summary,
    environment,
    format_table,
    plot_bars,
    summarize,
    write_csv,
)

SYNC_EVERY = 2
MAX_LENGTH = 2048
SEED = 0
# Largest relative difference from TRL. Seen over ten steps in fp32: 1.4e-5 and 1.0e-5, not growing.
# bf16 has 8 bits, and rounds differently in every layout.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1}
# A core's worth of other work that already disturbs threads which wait for each other.
QUIET_CORES = 0.1
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "tiny": "two random layers"}


@dataclass(frozen=True)
class Distribution:
    """Words of prompts and completions, each drawn uniformly, both ends included."""

    prompt: tuple[int, int]
    completion: tuple[int, int]


DISTRIBUTIONS = {
    "chat": Distribution((100, 200), (30, 70)),
    "summarisation": Distribution((300, 500), (20, 50)),
    "long": Distribution((20, 60), (200, 300)),
}


@dataclass(frozen=True)
class Arm:
    label: str
    is_trl: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of TRConfig
    patch: str | None = None  # a function of this module, called in the arm's process


# Of ours, each adds one part to the one before it: compact head, no padding, prompts shared.
ARMS = {
    "trl": Arm("TRL", is_trl=True),
    "trl_compact": Arm("TRL, head on completions only", is_trl=True, patch="_let_trl_compact"),
    "full_logits": Arm(
        "ours: padded, full logits", options={"packing": False}, patch="_score_with_full_logits"
    ),
    "padded": Arm("ours: padded, compact head", options={"packing": False}),
    "packed": Arm("ours: packed", options={"prefix_sharing": False}),
    "tralign_fast": Arm("tralign-fast: packed, prompts shared"),
}
MAIN_ARMS = ("trl", "tralign_fast")


@dataclass(frozen=True)
class Job:
    """What an arm's process is told."""

    arm: str
    distribution: str
    steps: int  # the warm-up included
    pairs: int
    dtype: str
    model: str


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
    def useful(self) -> list[int]:
        return [sum(lengths) for lengths in self.lengths]


class Disagreement(Exception):
    """Two arms did not compute the same thing."""


# --- in the process of an arm ---------------------------------------------------------------------


def run_arm(job: Job, pipe: Any) -> None:
    """Trains, one step for each word of the parent, and tells it what it took."""
    _quieten()
    import torch
    from transformers import PrinterCallback

    if (patch := ARMS[job.arm].patch) is not None:
        globals()[patch]()
    model, tokenizer = load_model(job.model, getattr(torch, _TORCH_DTYPES[job.dtype]))
    reference = copy.deepcopy(model)
    loaded_mb = _resident_mb()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(job, model, reference, tokenizer, folder)
        trainer.data_collator = counter = _CountingCollator(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_make_turns(pipe, counter))  # the last one: after the sync
        trainer.train()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    config = model.config
    shape = f"layers={config.num_hidden_layers} H={config.hidden_size} V={config.vocab_size}"
    facts = {"loaded_mb": loaded_mb, "peak_mb": peak_mb, "model": shape}
    pipe.send(("done", {**facts, "threads": torch.get_num_threads()}))


_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _quieten() -> None:
    """No progress bars or paths on the parent's terminal; warnings stay, one line each."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    import transformers

    transformers.utils.logging.disable_progress_bar()


def load_model(name: str, dtype: Any) -> tuple[Any, Any]:
    """SmolLM2 or, to try the benchmark, two random layers of its vocabulary; and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tralign_fast.smollm2 import load_smollm2, load_smollm2_tokenizer

    if name == "smollm2":
        return load_smollm2(dtype)
    tokenizer: Any = load_smollm2_tokenizer()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(dtype), tokenizer


def _make_trainer(job: Job, model: Any, reference: Any, tokenizer: Any, folder: str) -> Any:
    from datasets import Dataset

    arm = ARMS[job.arm]
    rows = make_rows(job.distribution, job.steps * job.pairs)
    options = {
        "output_dir": folder,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.pairs,
        "train_sampling_strategy": "sequential",
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-5,  # 1e-6 moves the loss by 1e-4 in five steps: nothing to compare
        "lr_scheduler_type": "constant",
        "sync_ref_model": True,
        "ref_model_sync_steps": SYNC_EVERY,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
        **arm.options,
    }
    if arm.is_trl:
        from trl import DPOConfig, DPOTrainer

        make_trainer, config = DPOTrainer, DPOConfig(**options)
    else:
        from tralign_fast import TRConfig, TRTrainer

        make_trainer, config = TRTrainer, TRConfig(**options, reference="resident")
    return make_trainer(
        model,
        ref_model=reference,
        args=config,  # pyright: ignore[reportArgumentType]
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def make_rows(distribution: str, count: int) -> list[dict[str, str]]:
    """Text rows of English from Python's own help; the first n are the same whatever the count."""
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).split()
    draw, lengths = random.Random(SEED), DISTRIBUTIONS[distribution]

    def text(bounds: tuple[int, int]) -> str:
        length = draw.randint(*bounds)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return [
        {
            "prompt": text(lengths.prompt),
            "chosen": " " + text(lengths.completion),
            "rejected": " " + text(lengths.completion),
        }
        for _ in range(count)
    ]


class _CountingCollator:
    """Notes what goes into a batch; runs between steps, outside the timed span."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator
        self.counts: list[tuple[int, list[int]]] = []  # tokens computed, tokens of the sequences

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        lengths = [
            len(example["prompt_ids"]) + len(example[completion])
            for completion in ("chosen_ids", "rejected_ids")
            for example in examples
        ]
        assert max(lengths) < MAX_LENGTH, "a row was cut; expected max_length to hold every row"
        tokens = batch["input_ids"].numel() if isinstance(batch, dict) else batch.num_tokens
        self.counts.append((2 * tokens, lengths))  # the policy's and the reference's
        return batch


def _make_turns(pipe: Any, counter: _CountingCollator) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Waits for the arm's turn before a step, and tells what the step took after it."""

        begin = busy = 0.0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            # the loader fetches one batch ahead, so the newest count is not this step's
            pipe.send(("ready", (time.monotonic(), *counter.counts[state.global_step])))
            pipe.recv()
            self.busy = _others_seconds()
            self.begin = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            end = time.monotonic()
            others = max(0.0, _others_seconds() - self.busy) / (end - self.begin)
            pipe.send(("step", (self.begin, end, others)))

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                pipe.send(("log", (logs["loss"], logs["grad_norm"])))

    return Turns()


def _others_seconds() -> float:
    """CPU seconds that all processes but this one have used since the machine started."""
    import psutil

    times = psutil.cpu_times()._asdict()
    idle = sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return sum(times.values()) - idle - time.process_time()


def _resident_mb() -> float:
    """Resident memory now, what the allocator holds back given to the system first."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    import psutil

    return psutil.Process().memory_info().rss / 2**20


# --- what an ablation replaces --------------------------------------------------------------------


def _let_trl_compact() -> None:
    """TRL scores completions alone where it has Triton, every position on a CPU: here as there."""
    import trl.trainer.utils as utils

    assert hasattr(utils, "_use_triton"), "TRL's head has changed: this ablation needs a new patch"
    # in this module it decides which positions are scored; the kernels ask their own module
    utils._use_triton = lambda device: True


def _score_with_full_logits() -> None:
    """The head by the book: log_softmax over the logits of every position, padding too."""
    import tralign_fast.reference.resident as resident
    import tralign_fast.trainer as trainer

    def sequence_logps(model: Any, batch: Any) -> Any:
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits  # (S, L, V)
        logps = logits.float().log_softmax(-1)
        return batch.sum_per_sequence(logps.flatten(0, 1)[batch.score_index, batch.targets])

    assert hasattr(resident, "sequence_logps")
    assert hasattr(trainer, "sequence_logps")
    resident.sequence_logps = trainer.sequence_logps = sequence_logps


# --- in the parent --------------------------------------------------------------------------------


class _ArmProcess:
    """A running arm, between two steps whenever no method of this is running."""

    def __init__(self, job: Job) -> None:
        self.run = Run(job.arm)
        context = multiprocessing.get_context("spawn")  # a fresh interpreter
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_arm, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # the arm's end closes when the arm dies
        self._wait()

    def step(self) -> None:
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
            except EOFError:
                raise RuntimeError(f"the arm {run.arm} died: see its error above") from None
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

    `ratio_to_trl` is TRL's median over the arm's (above 1: faster than TRL),
    `pairwise_ratio_to_trl` the median of the same ratio step by step; tokens are means per step,
    memory is in MiB.
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
        "arm": job.arm,
        "steps": len(seconds),
        "median_s": time_of.median,
        "p20_s": time_of.p20,
        "p80_s": time_of.p80,
        "ratio_to_trl": summarize(theirs).median / time_of.median,
        "pairwise_ratio_to_trl": summarize(
            [a / b for a, b in zip(theirs, seconds, strict=True)]
        ).median,
        "between_s": summarize(run.between).median,
        "others_cores": sum(run.others[1:]) / len(seconds),
        "tokens_computed": round(sum(run.computed[1:]) / len(seconds)),
        "useful_tokens": round(sum(run.useful[1:]) / len(seconds)),
        "useful_tokens_per_s": summarize(
            [n / s for n, s in zip(run.useful[1:], seconds, strict=True)]
        ).median,
        "peak_rss_mb": run.facts["peak_mb"],
        "delta_rss_mb": run.facts["peak_mb"] - run.facts["loaded_mb"],
        "last_loss": run.losses[-1],
        "max_rel_loss_diff": largest_difference(run.losses, trl.losses),
        "max_rel_grad_norm_diff": largest_difference(run.gradient_norms, trl.gradient_norms),
        "dtype": job.dtype,
        "model": MODELS[job.model],
        "shapes": f"pairs={job.pairs} tokens={min(tokens)}-{max(tokens)} {run.facts['model']}",
        "words": f"prompt={'-'.join(map(str, words.prompt))} "
        f"completion={'-'.join(map(str, words.completion))}",
        "sync_every": SYNC_EVERY,
        "threads": run.facts["threads"],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    header = ["", "s/step", "p20", "p80", "speed-up", "pairwise", "tokens", "useful tok/s",
              "peak MiB", "+MiB", "loss diff"]  # fmt: skip
    rows = [
        [
            f"{r['distribution']}: {ARMS[r['arm']].label}",
            *(f"{r[key]:.3f}" for key in ("median_s", "p20_s", "p80_s")),
            *(f"{r[key]:.2f}x" for key in ("ratio_to_trl", "pairwise_ratio_to_trl")),
            f"{r['tokens_computed']:,}",
            f"{r['useful_tokens_per_s']:,.0f}",
            *(f"{r[key]:,.0f}" for key in ("peak_rss_mb", "delta_rss_mb")),
            f"{r['max_rel_loss_diff']:.1e}",
        ]
        for r in records
    ]
    return format_table(header, rows)


def plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    groups = list(dict.fromkeys(r["distribution"] for r in records))
    series: dict[str, list[Summary]] = {}
    for r in records:
        summary = Summary(r["median_s"], r["p20_s"], r["p80_s"])
        series.setdefault(ARMS[r["arm"]].label, []).append(summary)
    one = records[0]
    title = (
        f"One optimizer step of TR-DPO, {one['model']}, {one['dtype']}, "
        f"{one['shapes'].split()[0].split('=')[1]} pairs a batch\n"
        f"{one['cpu']}, {one['threads']} threads; median of {one['steps']} steps, p20 to p80"
    )
    plot_bars(path, groups, series, title=title, ylabel="seconds per step (lower is better)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the arms disagree, and writes nothing of that distribution."""
    options = _parser().parse_args(arguments)
    names = list(DISTRIBUTIONS) if options.distribution == "all" else [options.distribution]
    arms = list(ARMS) if options.ablations else list(MAIN_ARMS)
    system, records = environment(), []
    folder = Path(options.output_dir)
    from tqdm import tqdm  # not above: an arm switches it off before it imports it

    steps = options.steps + 1  # the warm-up
    turns = len(names) * len(arms) * (steps + 1)  # an arm's start counts as one
    with tqdm(total=turns, unit="turn", file=sys.stderr) as progress:
        for name in names:
            progress.set_description(name)
            jobs = [
                Job(arm, name, steps, options.pairs, options.dtype, options.model) for arm in arms
            ]
            try:
                runs = measure(jobs, progress.update)
            except Disagreement as error:
                print(f"{name}: not a comparison, nothing is reported: {error}", file=sys.stderr)
                return 1
            records += [{**record, **system} for record in make_records(jobs, runs)]
            write_csv(folder / "step.csv", records)  # after each: a long run may be cut short
            plot(folder / "step.png", records)
    print(table(records))
    loss, norm = (max(r[f"max_rel_{key}_diff"] for r in records) for key in ("loss", "grad_norm"))
    print(
        f"\nTimed steps: {options.steps}; pairs a step: {options.pairs}. Speed-up: TRL's time over "
        "the arm's.\nTokens: computed per step, by policy and reference. Largest relative "
        f"difference\nfrom TRL in any step: loss {loss:.1e}, gradient norm {norm:.1e}."
    )
    others = max(r["others_cores"] for r in records)
    if others > QUIET_CORES:
        print(f"Not a quiet machine: other processes took {others:.2f} cores. Times are noise.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--distribution", choices=[*DISTRIBUTIONS, "all"], default="all")
    parser.add_argument(
        "--steps", type=_positive, default=10, help="timed steps; one more is the warm-up"
    )
    parser.add_argument("--pairs", type=_positive, default=2, help="pairs in a batch")
    parser.add_argument("--ablations", action="store_true", help="also arms with one part off")
    parser.add_argument("--dtype", choices=list(_TORCH_DTYPES), default="fp32")
    parser.add_argument(
        "--model", choices=list(MODELS), default="smollm2", help="tiny: to try it out"
    )
    parser.add_argument("--output_dir", default="benchmarks/results", help="step.csv, step.png")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
