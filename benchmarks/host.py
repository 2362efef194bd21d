"""Host time of a training step, phase by phase: TRL's DPOTrainer beside our TRTrainer, on a CPU.

    python -m benchmarks.host [--rounds 7] [--cases full lora] [--profile CASE]

A Llama of 32 layers and hidden size 32 computes next to nothing, so that what a step takes is what
the host does for it: Python, autograd's books, dispatch. A GPU waits for that where batches are
small.

**What runs.** Two pairs of 48 tokens, fp32, AdamW, gradient checkpointing, one thread. Full: hard
updates, a resident reference in TRL and a snapshot here. LoRA: soft updates here (past adapters),
a reference that stands still in TRL, which refuses to move it. τ = 16 = the steps of a round: the
reference's sweep and one move are in the figures.

**Turns.** Both trainers live in one process and train a round in turn; the first is a warm-up.
Counted is the process's CPU time, of which what else the machine does takes no part but by the
caches. A figure is the median over rounds of a round's mean step.

**Products** are PyTorch's: on an AMD CPU this library runs fp32 through oneDNN by a function of its
own, which a GPU never sees, and which at hidden size 32 is all that would be measured.

**The sweep** scores four batches as one row, which is the default where there is a GPU; without one
it scores them one by one.

**Attention.** A CPU has no variable-length kernel: a sequence is an attention call of its own. The
rows "one call" have a single call in its place, as a GPU has: its host work, other values.

**Layer kernels.** Where Liger is installed, a GPU runs norms, gated MLPs and rotary embeddings by
its kernels. In the rows of that name Liger's own Python runs, and one small operator (a norm's
backward: two) in place of each launch; what Triton's launcher takes is left out. TRL runs there as
it comes, and with the same kernels. "Torch's norm kernel": no Liger, where a GPU runs norms by
PyTorch's own operator, in whose place stands one that a CPU has; TRL as it comes.

**Graphs.** Where launches hold a GPU up, the decoder of packed rows is replayed as CUDA graphs, one
launch forward and one back. In the rows of that name all that the host does for that runs, and one
small operator in place of each replay, so the gradients are zeros; what a graph's launch takes is
left out. TRL as it comes.

**The gate.** The mean losses of the warm-up agree (not where values are others).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.common import environment, format_table, read_csv, write_csv
from benchmarks.phases import PHASES, Phases

STEPS = 16  # of a round, and τ
PAIR = 48  # tokens of a packed pair
SWEPT = 4  # batches that the reference scores as one row, by default on an accelerator
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """What both trainers train."""

    lora_rank: int | None = None
    alpha: float = 1.0
    one_call: bool = False
    layer_kernels: bool = False
    torch_norms: bool = False
    graphs: bool = False
    layers: int = 32
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "full": Case(),
    "full, one call": Case(one_call=True),
    "lora": Case(1, 0.6),
    "lora, one call": Case(1, 0.6, one_call=True),
    "full, torch's norm kernel": Case(one_call=True, torch_norms=True),
    "full, layer kernels": Case(one_call=True, layer_kernels=True),
    "lora, layer kernels": Case(1, 0.6, one_call=True, layer_kernels=True),
    "full, graphs": Case(one_call=True, graphs=True),
    "lora, graphs": Case(1, 0.6, one_call=True, graphs=True),
}
# TRL with the same layer kernels, which it has by an option
ARMS = {False: ("trl", "ours"), True: ("trl", "trl, layer kernels", "ours")}


def workload(case: Case) -> Any:
    from transformers import LlamaConfig

    from tralign_fast.memory import Workload

    class Rows(Workload):
        def rows(self) -> list[dict[str, Any]]:
            draw = random.Random(0)

            def ids(count: int) -> list[int]:
                return [
                    draw.randrange(1, self.model.vocab_size) for _ in range(count)
                ]  # 0: padding

            return [
                {
                    "row": row,
                    "prompt_ids": ids(PAIR // 2),
                    "chosen_ids": ids(PAIR // 4),
                    "rejected_ids": ids(PAIR // 4),
                }
                for row in range(STEPS * self.pairs)
            ]

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=case.layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    options = {
        "bf16": False, "max_steps": STEPS, "ref_model_sync_steps": STEPS, "learning_rate": 1e-3,
        "ref_model_mixup_alpha": case.alpha, "lr_scheduler_type": "constant",
        "precompute_ref_batch_size": 2 * SWEPT, **case.options,
    }  # fmt: skip
    return Rows(
        config, tokens=2 * PAIR, dtype="float32", lora_rank=case.lora_rank, lora_dtype="float32",
        options=options,
    )  # fmt: skip


class Arm:
    """A trainer that trains a round at a time."""

    def __init__(self, name: str, work: Any, folder: str) -> None:
        import torch

        from tralign_fast.memory.trainers import make_trainer, make_trl_trainer

        torch.manual_seed(0)
        self.trainer = (make_trainer if name == "ours" else make_trl_trainer)(work, folder)
        if name == "ours" and self.trainer.data_collator.layout != "shared":
            raise ValueError("ours runs padded batches here, which is not what a GPU runs")
        if name != "ours":
            _prepare_trl(self.trainer, layer_kernels="kernels" in name)
        self.seconds: list[dict[str, float]] = []  # of a step, for each round
        self.first_loss = float("nan")  # mean of the warm-up
        self._now: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._at = 0.0
        self.phases = Phases(self.trainer, self._charge)
        self.trainer.add_callback(_clock(self))

    def _charge(self, phase: str) -> None:
        now = time.process_time()
        self._now[phase] += now - self._at
        self._at = now

    def begin(self) -> None:
        self._now = dict.fromkeys(PHASES, 0.0)
        self._at = time.process_time()

    def end(self) -> None:
        self._charge(self.phases.now)
        self.seconds.append({phase: spent / STEPS for phase, spent in self._now.items()})

    def round(self) -> None:
        from tralign_fast.memory.trace import quietly

        with quietly(), self.phases.watching():
            output = self.trainer.train()
        if len(self.seconds) == 1:
            self.first_loss = output.training_loss

    def summary(self) -> dict[str, float]:
        """Milliseconds a step by phase and in all, medians over rounds without the warm-up."""
        rounds = self.seconds[1:]
        by_phase = {p: 1e3 * median(r[p] for r in rounds) for p in PHASES}
        return {**by_phase, "all": 1e3 * median(sum(r.values()) for r in rounds)}


def _prepare_trl(trainer: Any, layer_kernels: bool) -> None:
    from tralign_fast.model.layer_kernels import use_layer_kernels

    models = [trainer.model]
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(trainer.model.state_dict())
        models.append(trainer.ref_model)
    for model in models if layer_kernels else ():
        ids = model.get_input_embeddings().weight.new_ones((1, 4)).long()
        use_layer_kernels(model, "auto", functools.partial(model, input_ids=ids))


def _clock(arm: Arm) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            arm.begin()

        def on_epoch_end(self, args, state, control, **kwargs) -> None:
            arm.end()

    return Clock()


@contextlib.contextmanager
def as_asked(case: Case) -> Iterator[None]:
    """PyTorch's products, and what stands for a GPU's variable-length kernel: one call for all
    sequences, of other values."""
    from torch.nn.functional import scaled_dot_product_attention as attend

    from tralign_fast.model import attention, prepare
    from tralign_fast.ops.cpu import onednn

    def function(q: Any, k: Any, v: Any, arguments: Any, window: Any, options: Any) -> Any:
        # a pair's queries see a pair's keys, so that a sweep's long row is no long sequence; a row
        # that was filled up is one sequence, which warm-ups alone compute
        rows = 1 if q.shape[0] % PAIR else q.shape[0] // PAIR
        q, k, v = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, scale=options.scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def always(value: Any) -> Any:  # a call of a Mock takes as long as what is measured
        return lambda *args, **kwargs: value

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(onednn, "is_faster", always(False)))
        if case.one_call:
            patch = mock.patch.object(attention, "_varlen_function", always(function))
            stack.enter_context(patch)
            # which would find its values, and fall back to padded batches
            stack.enter_context(mock.patch.object(prepare, "_why_not_packed", always(None)))
        if case.layer_kernels:
            stack.enter_context(_kernels_without_a_gpu())
        if case.torch_norms:
            stack.enter_context(_torch_norm_without_a_gpu())
        if case.graphs:
            stack.enter_context(_graphs_without_a_gpu())
        yield


@contextlib.contextmanager
def _kernels_without_a_gpu() -> Iterator[None]:
    """Liger's launchers run, with one operator of other values in place of each launch."""
    from tralign_fast.model import kernel_probe, layer_kernels, liger_ops

    patches = [
        (layer_kernels, "_can_run", lambda parameter, asked: True),
        (kernel_probe, "best_norm", lambda norms, kernels: kernels[0]),
        (kernel_probe, "best_product", lambda mlps, products, *_: products[0]),
        (kernel_probe, "check_rotary", lambda *_: None),
    ]
    patches += [
        (module, name, _Kernel(_LAUNCHES[name]))
        for module, name in liger_ops.kernels()
        if name in _LAUNCHES
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def _torch_norm_without_a_gpu() -> Iterator[None]:
    """A norm of other values in place of the kernel: one operator forward and one backward too."""
    import torch

    from tralign_fast.model import kernel_probe, layer_kernels

    def layer_norm(x: Any, shape: Any, weight: Any, eps: float) -> Any:
        return torch.native_layer_norm(x, shape, weight, None, eps)

    with (
        mock.patch.object(layer_kernels, "_can_run", return_value=True),
        mock.patch.object(layer_kernels, "_liger", return_value=None),
        mock.patch.object(layer_kernels, "_has_fused_norm", return_value=True),
        mock.patch.object(kernel_probe, "best_norm", lambda norms, kernels: kernels[0]),
        mock.patch.object(torch, "_fused_rms_norm", layer_norm),
    ):
        yield


@contextlib.contextmanager
def _graphs_without_a_gpu() -> Iterator[None]:
    """Captures keep what their function returned; replays are one operator."""
    from tralign_fast.model import graphs

    with (
        mock.patch.object(graphs, "backend", _Captures()),
        mock.patch.object(graphs, "_check_same", return_value=None),
    ):
        yield


class _Captures:
    """The surface of `graphs.CudaBackend`, where launches hold the device up."""

    def takes(self, device: Any) -> bool:
        return True

    has_room = takes

    def pool(self) -> Any:
        return object()

    @contextlib.contextmanager
    def timed(self, device: Any) -> Iterator[Any]:
        yield SimpleNamespace(host=1.0, device=lambda: 1.0)

    def beside(self, device: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        import torch

        result = function()
        launched = torch.zeros(1)
        return SimpleNamespace(replay=lambda: launched.add_(1.0)), result


class _Kernel:
    """A function that is launched on any grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self._function


def _norm_backward(dy: Any, _: Any, dx: Any, *rest: Any, **options: Any) -> None:
    dx.copy_(dy)
    of_weight = rest[8]
    if of_weight is not None:
        of_weight.zero_()


_LAUNCHES: dict[str, Any] = {
    "_rms_norm_forward_kernel": lambda y, _, x, *rest, **options: y.copy_(x),
    "_rms_norm_backward_kernel": _norm_backward,
    "_swiglu_forward_kernel": lambda a, b, c, *rest, **options: c.copy_(a),
    "_swiglu_backward_kernel": lambda dc, a, *rest, **options: a.copy_(dc),
    "_triton_rope": lambda q, *rest, **options: q.mul_(1.0),
}


def measure(case: Case, rounds: int, names: Sequence[str] = ()) -> list[Arm]:
    """Arms, of these names or those of the case, with the times of their rounds.

    Raises:
        ValueError: their losses differ.
    """
    from tralign_fast.memory.trace import quietly

    work = workload(case)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_asked(case))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with quietly():
            names = names or ARMS[case.layer_kernels]
            arms = [Arm(name, work, f"{folder}/{name}") for name in names]
        for _ in range(rounds + 1):
            for arm in arms:
                arm.round()
    losses = [arm.first_loss for arm in arms]
    if not case.one_call and max(losses) - min(losses) > LOSS_TOLERANCE * max(losses):
        raise ValueError(f"mean losses {losses}: expected equality to {LOSS_TOLERANCE:g}")
    return arms


def profile(case: Case, count: int) -> None:
    """What ours spends its time on in a round after the warm-up."""
    profiler = cProfile.Profile()
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_asked(case))
        arm = Arm("ours", workload(case), stack.enter_context(tempfile.TemporaryDirectory()))
        arm.round()
        profiler.enable()
        arm.round()
        profiler.disable()
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler, stream=sys.stdout).sort_stats(order).print_stats(count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host time of a training step.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--profile", metavar="CASE", choices=CASES, help="ours under cProfile")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if options.profile:
        profile(CASES[options.profile], 40)
        return 0
    rows, lines = [], []
    order = {name: place for place, name in enumerate(CASES)}
    for name in options.cases:
        case = CASES[name]
        arms = [arm.summary() for arm in measure(case, options.rounds)]
        for arm, figures in zip(ARMS[case.layer_kernels], arms, strict=True):
            ratio = figures["all"] / arms[0]["all"]
            rows.append({
                "case": name, "arm": arm, "rounds": options.rounds,
                **{f"{k}_ms": v for k, v in figures.items()}, "ratio_to_trl": ratio,
            })  # fmt: skip
            lines.append([f"{name}: {arm}", *(f"{v:.2f}" for v in (*figures.values(), ratio))])
    header = ["host ms a step", *PHASES, "all", "of TRL's"]
    print(format_table(header, lines))
    about = environment(("torch", "transformers", "trl", "peft"))
    rows = [{**row, **about} for row in rows]
    # cases that were not asked for keep their rows, with the commit that they are of
    kept = [row for row in read_csv(options.out / "host.csv") if row["case"] not in options.cases]
    write_csv(options.out / "host.csv", sorted([*kept, *rows], key=lambda r: order[r["case"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
