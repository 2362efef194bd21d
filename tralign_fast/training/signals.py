"""SIGTERM and SIGHUP end a run at its next step, with a checkpoint: what a cluster's preemption
wants.

transformers' own just-in-time checkpoint waits three seconds in a thread, may save between a
backward and its optimizer step, and lets every process decide for itself when it stops, so that two
of them wait for each other for good.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_KEY = "tralign_fast/stop_at"
# Steps that processes may be apart: the host of one runs ahead of its device, and of the others, by
# less than two, as every step reduces gradients over all.
_APART = 3


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which a signal came.

    Several processes agree on the step: the first that has the signal writes it into the store by
    which they met, and all look there after every step (a tenth of a millisecond, no collective).
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stop_at: int | None = None
        self._runs = 0

    @contextlib.contextmanager
    def listening(self, wanted: bool) -> Iterator[None]:
        """Inside, the signals are caught: `wanted`, in the main thread, and not what `nohup` lets
        pass. Afterwards a caught one ends the process, with the code of its number."""
        self.received = self._stop_at = None
        self._runs += 1
        before: dict[int, Any] = {}
        if wanted and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._stops(state.global_step):
            control.should_evaluate = False  # time is short
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self._stop_at is not None and state.global_step >= self._stop_at:
            control.should_evaluate = control.should_save = False

    def _stops(self, step: int) -> bool:
        store = _store()
        if store is None:
            self._stop_at = step if self.received is not None else None
        elif self._stop_at is None:
            key = f"{_KEY}/{self._runs}"
            if self.received is not None:
                store.compare_set(key, "", f"{step + _APART} {self.received}")
            if store.check([key]):
                stop_at, number = store.get(key).decode().split()
                self._stop_at, self.received = int(stop_at), int(number)
        return self._stop_at is not None and step >= self._stop_at


def _store() -> Any:
    """By which the processes of a run met; None in a run of one."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()
