"""The same steps for real, on a GPU: what the allocator gave out, and how long a step takes."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from tralign_fast.memory.trace import quietly
from tralign_fast.memory.trainers import make_trainer, make_trl_trainer
from tralign_fast.memory.workload import Workload

_EVERY = 2  # steps between two moves of the reference
_STEPS = 3 * _EVERY  # those before the first move set up: optimizer states, memory that stays


class Measured(NamedTuple):
    peak: int  # bytes of tensors at once: `torch.cuda.max_memory_allocated`
    reserved: int  # bytes that the allocator took from the GPU for them
    seconds: float  # of a step, its share of the reference's move and of the sweep included


def measure(work: Workload, *, trl: bool = False) -> Measured:
    """Six steps of training on random weights; the reference moves after every second one.

    Weights and batches are those of `trace`, made on the GPU. With `trl`, as `trace_trl`.

    Raises:
        RuntimeError: there is no GPU, or (`torch.OutOfMemoryError`) not enough of it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measure needs a GPU; trace does not")
    options = {**work.options, "max_steps": _STEPS, "ref_model_sync_steps": _EVERY}
    work = dataclasses.replace(work, options=options)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer = (make_trl_trainer if trl else make_trainer)(work, folder, on_gpu=True)
        trainer.add_callback(clock := _Clock())
        trainer.train()
    return Measured(
        torch.cuda.max_memory_allocated() - before,
        torch.cuda.max_memory_reserved() - reserved,
        (clock.ends[-1] - clock.ends[_EVERY - 1]) / (_STEPS - _EVERY),
    )


class _Clock(TrainerCallback):
    """Notes when steps end, all that they asked of the GPU done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
