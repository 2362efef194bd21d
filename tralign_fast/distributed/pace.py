"""Which process keeps the others waiting.

All processes take as long for a step, as they wait for each other. What one does by itself differs:
waiting for its batches, and the forward of DDP. Under FSDP2 and ZeRO-3 a forward waits for shards
of all, so that a slow GPU cannot be told there, and slow batches can.
"""

from __future__ import annotations

import contextlib
import platform
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from tralign_fast.reference.sharding import from_all

SLOW = 1.5  # times the median
LEAST = 0.01  # seconds a step above the median
LOGS = 3  # one after another


class Pace(TrainerCallback):
    """Times each process's own work, and names one that is slow for `LOGS` logs.

    One gather of two numbers at each log, where processes wait for each other anyway. On a GPU the
    forward is timed by events, which are read when the device has come to the log.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._alone = accelerator.num_processes == 1
        self._loading = 0.0  # seconds since the last log
        self._forwards: list[tuple[Any, Any]] = []  # begin and end, since then
        self._step = 0  # of the last log
        self._behind: dict[int, int] = {}  # process -> logs one after another
        self._hosts: list[str] = []

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._loading += time.perf_counter() - start

    @contextlib.contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """Times what happens inside from where the policy's own forward begins: DDP, around it,
        waits for the first process's buffers."""
        if self._alone or not model.training:
            yield
            return
        begun: list[Any] = []
        hook = model.register_forward_pre_hook(lambda *_: begun.append(self._now()))
        try:
            yield
        finally:
            hook.remove()
        if begun:
            self._forwards.append((begun[0], self._now()))

    def _now(self) -> Any:
        if self._accelerator.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._loading, self._forwards, self._behind = 0.0, [], {}
        self._step = state.global_step
        self._hosts = [] if self._alone else from_all(platform.node())

    def on_log(self, args, state, control, logs: Any = None, **kwargs) -> None:
        steps = state.global_step - self._step
        if self._alone or steps <= 0 or "loss" not in (logs or {}):
            return
        seconds = [self._loading, sum(_between(*times) for times in self._forwards)]
        own = torch.tensor(seconds, dtype=torch.float32, device=self._accelerator.device) / steps
        self._loading, self._forwards, self._step = 0.0, [], state.global_step
        every: Any = self._accelerator.gather(own)
        lines = self.lines(every.view(-1, 2).tolist())
        if state.is_world_process_zero:
            for line in lines:
                warnings.warn(line, stacklevel=2)

    def lines(self, seconds: list[list[float]]) -> list[str]:
        """What is said after a log.

        Args:
            seconds: (processes, 2), of a step: loading, forward.
        """
        totals = [sum(parts) for parts in seconds]
        median = sorted(totals)[(len(totals) - 1) // 2]  # of two the faster one
        said = []
        for process, (total, parts) in enumerate(zip(totals, seconds, strict=True)):
            is_slow = total > SLOW * median and total - median > LEAST
            self._behind[process] = self._behind.get(process, 0) + 1 if is_slow else 0
            if self._behind[process] == LOGS:
                said.append(
                    f"process {process} on {self._hosts[process]} keeps the others waiting: "
                    f"{total:.3f} s of a step are its own (batches {parts[0]:.3f}, forward "
                    f"{parts[1]:.3f}), the median of {len(totals)} is {median:.3f}"
                )
        return said


def _between(begin: Any, end: Any) -> float:
    """Seconds between two moments, of the host or of the device."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
