"""Checkpoints that are written while training goes on.

What a save writes it hands to `write`. In a run with `async_save` that copies the tensors to the
host (`torch.distributed.checkpoint`'s stager: pinned memory on GPUs, the same buffers for every
save), and a thread writes the copies, one after the other. It is `async_save` of
`torch.distributed.checkpoint` for several parts that make one checkpoint: processes write their
shards in one order, agree that all went well, and only then is the checkpoint given its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from tralign_fast.reference.writes import Part, handed_to


class Background:
    """Writes a checkpoint at a time.

    Several processes make theirs together, hand over what is collective in the same order, and call
    `start` and `wait` alike. Host memory: a copy of what this process writes.
    """

    def __init__(self) -> None:
        # not the `DefaultStager` around it, which PyTorch 2.11 empties after one use
        self._stager: StateDictStager | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._parts: list[tuple[Part, Any]] = []
        self._written: Future[None] | None = None
        several = dist.is_initialized() and dist.get_world_size() > 1
        # training's collectives have another group, whose order these do not share
        self.group: Any = dist.new_group(backend="gloo") if several else None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, what is handed to `write` is written later, by `start`."""
        assert self._written is None
        self._parts = []
        try:
            with handed_to(self):
                yield
        except BaseException:
            self._parts = []
            raise

    def add(self, part: Part, content: Any) -> None:
        if self._stager is None:
            self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        # a copy that does not block would not be done on return
        self._parts.append((part, self._stager.stage(content, non_blocking=False)))

    def start(self, finish: Callable[[], None]) -> None:
        """Writes what was collected, then `finish`, which every process runs once all have written
        their parts. Returns at once."""
        parts, self._parts = self._parts, []
        self._written = self._thread.submit(self._run, parts, finish)

    def _run(self, parts: list[tuple[Part, Any]], finish: Callable[[], None]) -> None:
        error: Exception | None = None
        while parts:
            part, content = parts.pop(0)
            if error is not None and self.group is None:
                continue  # a file that came after would be taken for the one that failed
            try:
                part(content, self.group)
            except Exception as found:  # what is collective the others still wait for
                error = error or found
        self._agree(error)
        try:
            finish()
        except Exception as found:
            error = found
        self._agree(error)

    def _agree(self, error: Exception | None) -> None:
        """Raises in every process if there was an error in any of them."""
        own = "" if error is None else str(error) or type(error).__name__
        said = [own]
        if self.group is not None:
            said = [""] * dist.get_world_size(self.group)
            dist.all_gather_object(said, own, group=self.group)
        if error is not None:
            raise error
        if first := next((text for text in said if text), None):
            raise OSError(first)

    def wait(self) -> bool:
        """Waits until what was started is written, and raises what went wrong there.

        Returns:
            Whether there was anything.
        """
        written, self._written = self._written, None
        if written is None:
            return False
        written.result()
        return True

    def close(self) -> None:
        """Waits for the thread, and lets go of the buffers."""
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)
