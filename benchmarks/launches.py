"""Operators that a training step dispatches at real size, counted without a GPU.

    python -m benchmarks.launches [--cases "8B LoRA 64" ...] [--kept powers] [--whole] [--top 10]
    python -m benchmarks.launches --head             head and loss alone, in one node or two

A step of the trainer's own code runs under fake tensors, on a GPU's paths (`tralign_fast.memory`),
and every operator that reaches the device is counted: those that compute. Left out are views, and
what allocates alone. An operator of torch is one or more launches (`_foreach_*` and fused AdamW:
some), Triton kernels (this library's, Liger's) and the LM head's inner products count one each. On
an H200 the same steps had 3,700 (1B full), 11,600 (8B LoRA 64) and 27,000 (8B, release) device
events before LoRA, release and the layers had kernels.

All layers but one are alike: models of one and of two layers are counted, and the difference stands
for each further one (`--whole` runs all of them).

A step is the second of a run, which has the optimizer's states, and its share of the sweep that
scored both (as with any τ; the reference's move itself, one in 512 steps, is left out).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.utils import clip_grad

from benchmarks.common import environment, format_table, write_csv
from benchmarks.phases import PHASES, Phases
from tralign_fast.memory import LiveTensors, Workload
from tralign_fast.memory.plan_options import load_config
from tralign_fast.ops.powers import KEPT
from tralign_fast.training.optimizer_kernels import KernelSteps
from tralign_kernels import adafactor, adamw

STEPS = 2


@dataclass(frozen=True)
class Case:
    model: str
    bound: int  # operators a step that it may take, as measured with Liger installed
    goal: int
    fields: dict[str, Any]


HARD = {"ref_model_mixup_alpha": 1.0}
RELEASE = {**HARD, "gradient_release": True, "max_grad_norm": 0.0, "optim": "adafactor"}
CASES = {
    "1B full": Case("llama-3.2-1b", 1_340, 1_600, {"options": HARD}),
    "8B LoRA 64": Case("llama-3.1-8b", 4_180, 5_000, {"lora_rank": 64}),
    "8B release": Case("llama-3.1-8b", 3_280, 9_000, {"options": RELEASE}),
}


class Counting(LiveTensors):
    """Counts operators that compute by (step's phase, name)."""

    def __init__(self) -> None:
        super().__init__(fake=True)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.phases: Phases | None = None

    def add(self, tensor: torch.Tensor) -> int:
        return 0  # bytes are not asked for

    def count(self, name: str) -> None:
        if self.phases is not None:
            self.counts[self.phases.now, name] += 1

    def own_kernel(self, *args: Any, **kwargs: Any) -> None:
        """In place of a Triton kernel."""
        self.count("own kernel")

    def liger_kernel(self, *args: Any, **kwargs: Any) -> None:
        self.count("Liger's kernel")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _computes(func):
            self.count(str(func).removeprefix("aten."))
        return super().__torch_dispatch__(func, types, args, kwargs)


# what allocates, or only says what a tensor is
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "_unsafe_view", "lift_fresh", "is_same_size", "_reshape_alias", "_local_scalar_dense", "item",
    "sym_size", "set_", "record_stream",
}  # fmt: skip


def _computes(func: Any) -> bool:
    namespace, name = func._schema.name.split("::")
    if (
        namespace in ("prim", "profiler") or name in _FREE or name.startswith("linear_logprobs")
    ):  # whose body is counted
        return False
    returned = func._schema.returns
    is_view = bool(returned) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returned
    )
    return not is_view


def _counted_step(counting: Counting) -> Any:
    """`KernelSteps.step`, whose kernels are not called under fake tensors, with their launches."""
    step = KernelSteps.step

    def counted(self: KernelSteps, parameter: torch.Tensor, *rest: torch.Tensor) -> None:
        step(self, parameter, *rest)
        launches_of = adamw.launches_of if self.is_adamw else adafactor.launches_of
        for _ in range(launches_of(parameter)):
            counting.count("own kernel")

    return counted


def count(
    case: Case, *, layers: int | None = None, checkpointing: bool = True, kept: str = "logits"
) -> Counter[Any]:
    """Operators of one step by (phase, name), of a model of that many layers (None: its own)."""
    from tralign_fast.memory import as_on_gpu as gpu
    from tralign_fast.memory.trace import quietly
    from tralign_fast.memory.trainers import make_trainer
    from tralign_fast.ops import backend

    config = load_config(case.model)
    if layers is not None:
        config.num_hidden_layers = layers
    # the option: what a GPU has by default, where two batches are swept as one row
    options = {
        "ref_model_sync_steps": 512, "gradient_checkpointing": checkpointing,
        "precompute_ref_batch_size": 2 * STEPS, "kept": kept,
    }  # fmt: skip
    options |= case.fields.get("options", {})
    work = Workload(config, **{**case.fields, "options": options})
    with (
        tempfile.TemporaryDirectory() as folder,
        quietly(),
        gpu.as_on_gpu(),
        gpu.fake_tensors(),
        Counting() as counting,
        mock.patch.object(backend, "_do_nothing", counting.own_kernel),
        mock.patch.object(gpu, "launch_liger", counting.liger_kernel),
        # as for a GPU's gradients, whose norm is taken by few launches
        mock.patch.object(clip_grad, "_has_foreach_support", return_value=True),
        mock.patch.object(KernelSteps, "step", _counted_step(counting)),
    ):
        trainer = make_trainer(work, folder)
        counting.phases = Phases(trainer)
        watch = _watch(counting)
        trainer.add_callback(watch)
        with counting.phases.watching():
            trainer.train()
    total = Counter(watch.step)
    for key, number in watch.sweep.items():
        total[key] += number / STEPS  # pyright: ignore[reportArgumentType]
    return total


def _watch(counting: Counting) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Takes the counts of the sweep, which is done when the first step begins, and of the last
        step."""

        sweep: Counter[tuple[str, str]]
        step: Counter[tuple[str, str]]

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 0:
                self.sweep = Counter(
                    {k: n for k, n in counting.counts.items() if k[0] == "reference"}
                )

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.step, counting.counts = counting.counts, Counter()

    return Watch()


def at_full_size(case: Case, **options: Any) -> Counter[Any]:
    """`count` of all layers, from models of one and of two: each further layer adds the same."""
    one, two = (count(case, layers=n, **options) for n in (1, 2))
    further = load_config(case.model).num_hidden_layers - 1
    return Counter({key: one[key] + further * (two[key] - one[key]) for key in one | two})


# What a trainer may call for head and loss: (as one node, what is kept, whether it logs statistics)
HEADS = {
    "two calls": (False, "logits", False),
    "one node": (True, "logits", False),
    "two calls, powers": (False, "powers", False),
    "one node, powers": (True, "powers", False),
    "two calls, statistics": (False, "logits", True),
    "two calls, statistics, powers": (False, "powers", True),
}


def count_head(
    node: bool, kept: str, statistics: bool, *, tokens: int = 1024, hidden: int = 4096,
    vocab: int = 128256,
) -> Counter[tuple[str, str]]:  # fmt: skip
    """Operators by (forward or backward, name) from hidden states to DPO's loss of two pairs and to
    both gradients, in bf16: Llama-3-8B's head."""
    from types import SimpleNamespace

    from tralign_fast import linear_preference_loss, preference_loss
    from tralign_fast.memory import as_on_gpu as gpu
    from tralign_fast.ops import backend
    from tralign_fast.ops.logprobs import linear_logprobs_and_statistics

    names = ("entropy", "mean_logits", "is_top1") if statistics else ()
    with (
        gpu.as_on_gpu(),
        gpu.fake_tensors(),
        Counting() as counting,
        mock.patch.object(backend, "_do_nothing", counting.own_kernel),
    ):
        rows, weight = (
            torch.empty(n, hidden, dtype=torch.bfloat16, requires_grad=True)
            for n in (tokens, vocab)
        )
        targets = torch.zeros(tokens, dtype=torch.int64)
        offsets, references = torch.arange(5) * (tokens // 4), torch.zeros(4)
        now: Any = SimpleNamespace(now="forward")
        counting.phases = now
        if node:
            loss = linear_preference_loss(
                rows, weight, targets, offsets, references, loss="dpo", beta=0.1, kept=kept
            ).loss
        else:
            logps, _ = linear_logprobs_and_statistics(rows, weight, targets, names, kept=kept)
            loss = preference_loss(logps, references, offsets, loss="dpo", beta=0.1).loss
        now.now = "backward"
        loss.backward()
    return counting.counts


def _heads(out: Path) -> None:
    rows, lines = [], []
    for name, kind in HEADS.items():
        counts = count_head(*kind)
        phases = [sum(n for k, n in counts.items() if k[0] == p) for p in ("forward", "backward")]
        own = sum(n for k, n in counts.items() if k[1] == "own kernel")
        lines.append([name, *map(str, phases), str(counts.total()), str(own)])
        rows += [
            {"case": name, "phase": phase, "operator": operator, "count": number}
            for (phase, operator), number in sorted(counts.items())
        ]
    print(format_table(["head and loss", "forward", "backward", "all", "own kernels"], lines))
    about = environment(("torch",))
    write_csv(out / "launches_head.csv", [{**row, **about} for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Operators that a training step dispatches.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--whole", action="store_true", help="run all layers (minutes)")
    parser.add_argument("--top", type=int, default=10, help="operators to name by themselves")
    parser.add_argument("--kept", default="logits", choices=KEPT, help="TRConfig's option")
    parser.add_argument("--head", action="store_true", help="head and loss alone")
    options = parser.parse_args(arguments)
    if options.head:
        _heads(options.out)
        return 0
    rows, lines = [], []
    for name in options.cases:
        for checkpointing in (True, False):
            case = CASES[name]
            counter = count if options.whole else at_full_size
            counts = counter(case, checkpointing=checkpointing, kept=options.kept)
            label = name + ", powers" * (options.kept == "powers")
            label += "" if checkpointing else ", no checkpointing"
            by_phase = {p: sum(n for k, n in counts.items() if k[0] == p) for p in PHASES}
            lines.append(
                [label, *(f"{n:,.0f}" for n in by_phase.values()), f"{counts.total():,.0f}",
                 f"{case.goal:,}" if checkpointing else ""]
            )  # fmt: skip
            rows += [
                {"case": label, "phase": phase, "operator": operator, "count": number}
                for (phase, operator), number in sorted(counts.items())
            ]
            if checkpointing:
                print(f"{label}: {_top(counts, options.top)}")
    print(format_table(["operators a step", *PHASES, "all", "goal"], lines))
    about = environment(("torch", "transformers", "peft", "liger-kernel"))
    name = "launches.csv" if options.kept == "logits" else f"launches_{options.kept}.csv"
    write_csv(options.out / name, [{**row, **about} for row in rows])
    return 0


def _top(counts: Counter[Any], size: int) -> str:
    by_name: Counter[str] = Counter()
    for (_, operator), number in counts.items():
        by_name[operator] += number
    return ", ".join(f"{name} {number:,.0f}" for name, number in by_name.most_common(size))


if __name__ == "__main__":
    sys.exit(main())
