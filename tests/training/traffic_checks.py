"""What four processes send in a run, counted against the least that DDP and FSDP2 can do with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.training.matrix_run import CASES, KINDS, PROCESSES, ROWS, STEPS, trainer_of
from tests.training.traffic import Traffic, least_bytes_sent

PHASES = {
    "sync": "move", "score_window": "sweep", "training_step": "training", "_run": "",
    "keep_weights": "kept",  # of a window that the run's end cuts short, written to the disk
}  # fmt: skip


class Run:
    """A run, its traffic by phase, and how often what was called."""

    def __init__(self, case: str, folder: Path, **options: Any) -> None:
        self.trainer = trainer_of(case, folder, batch=ROWS, logging_strategy="no", **options)
        self.traffic, self.calls = Traffic(), dict.fromkeys(PHASES, 0)
        trainer: Any = self.trainer
        reference = trainer.reference
        owners = (reference, trainer._lookahead, trainer, reference, reference)
        for (name, phase), owner in zip(PHASES.items(), owners, strict=True):
            if hasattr(owner, name):
                setattr(owner, name, self._counted(getattr(owner, name), name, phase))
        with self.traffic:
            self.trainer.train()

    def _counted(self, inner: Any, name: str, phase: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            with self.traffic.phase(phase or self.traffic.current):
                return inner(*args, **kwargs)

        return counted


def padded(parameters: Sequence[Any]) -> int:
    """Bytes of shards of equal size, as FSDP2 sends them."""
    rows = (-(-p.shape[0] // PROCESSES) * PROCESSES for p in parameters)
    return sum(n * p.shape[1:].numel() * p.itemsize for n, p in zip(rows, parameters, strict=True))


def check_ddp(place: str, folder: Path) -> None:
    """Gradients once a step, and what DDP sends besides: a number a weight, which was used, and the
    model's buffers, before every forward. Moves are made by every process for itself."""
    run = Run(f"dpo-{place}", folder)
    model, traffic = run.trainer.model, run.traffic
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    assert traffic.of("training")["all-reduce"] == STEPS * (gradients + 4 * len(trained)), place
    assert traffic.of("move") == {}, (place, traffic.of("move"))
    assert run.calls["sync"] == STEPS // CASES[f"dpo-{place}"][1]["ref_model_sync_steps"]
    buffers = sum(b.nbytes for b in model.buffers())
    forwards = STEPS * (2 if place == "resident" else 1)
    assert traffic.of("training")["broadcast"] + traffic.of("sweep").get("broadcast", 0) <= (
        (forwards + run.calls["_run"]) * buffers
    ), place
    assert set(traffic.of("sweep")) <= {"broadcast"}, place


def check_fsdp2(place: str, folder: Path) -> None:
    """Weights twice a step and gradients once; of the moving reference a forward of every batch,
    and its moves nothing, but for an adapter's, which gather the factors."""
    run = Run(f"dpo-{place}", folder, **KINDS["fsdp2"])
    model, traffic, calls = run.trainer.model, run.traffic, run.calls
    model = model.base_model.model if place == "adapter" else model  # PEFT's
    trained = [p for p in model.parameters() if p.requires_grad]
    assert traffic.of("training")["reduce-scatter"] == STEPS * padded(trained), place
    if place == "adapter":
        moved = {"all-gather": calls["sync"] * padded(trained)}
    else:
        moved = {}
    assert traffic.of("move") == moved, (place, traffic.of("move"))
    whole = padded([*model.parameters()])
    tail = padded([*model.lm_head.parameters(), *model.model.norm.parameters()])
    if place == "resident":  # a second forward a step, whose tail stays gathered until it moves
        assert traffic.of("sweep") == {}
        least = STEPS * (whole + whole - tail + whole - tail) + (calls["sync"] + 1) * tail
    else:  # the tail stays gathered for a sweep
        sweeps = calls["score_window"]
        swept = calls["_run"] * (whole - tail) + sweeps * tail
        assert traffic.of("sweep")["all-gather"] == swept, (place, swept, traffic.of("sweep"))
        assert calls["_run"] == STEPS
        least = STEPS * (whole + whole - tail)
    sent = traffic.of("training")["all-gather"]
    # FSDP2 may gather a group in vain, before the first step after other forwards
    assert least <= sent <= least * 1.1, (place, least, sent)
    if torch.distributed.get_rank() == 0:
        table = {f"{a} {b}": n for (a, b), n in traffic.bytes.items() if a != "step"}
        floor = least_bytes_sent("all-gather", least, PROCESSES)
        print(f"fsdp2 {place}: {table}; the least sent for the steps' weights: {floor:.0f}")


CHECKS = {"ddp": check_ddp, "fsdp2": check_fsdp2}
