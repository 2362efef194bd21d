"""The same steps for real, on a GPU: what the allocator gave out, and how long a step takes."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from tralign_fast.memory.trace import quietly
from tralign_fast.memory.workload import Workload, make_trainer, make_trl_trainer

_STEPS = 5  # the first two set up: optimizer states, a reference that has moved, memory that stays


class Measured(NamedTuple):
    peak: int  # bytes of tensors at once: `torch.cuda.max_memory_allocated`
    reserved: int  # bytes that the allocator took from the GPU for them
    seconds: float  # median of a step, the move of the reference and the sweep ahead included


def measure(work: Workload, *, trl: bool = False) -> Measured:
    """Five steps of training on random weights; the reference moves after every one of them.

    Weights and batches are those of `trace`, made on the GPU. With `trl`, as `trace_trl`.

    Raises:
        RuntimeError: there is no GPU, or (`torch.OutOfMemoryError`) not enough of it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure needs a GPU; trace does not")
    options = {"ref_model_sync_steps": 1} if trl and work.lora_rank is None else {}
    work = dataclasses.replace(work, options={**work.options, **options, "max_steps": _STEPS})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer = (make_trl_trainer if trl else make_trainer)(work, folder, on_gpu=True)
        if not trl and not trainer.reference.schedule.is_frozen:
            schedule = trainer.reference.schedule
            trainer.reference.schedule = dataclasses.replace(schedule, every=1)
        trainer.add_callback(clock := _Clock())
        trainer.train()
    return Measured(
        torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), clock.seconds()
    )


class _Clock(TrainerCallback):
    """Notes when steps end, all that they asked of the GPU done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return statistics.median(b - a for a, b in itertools.pairwise(self.ends[1:]))
