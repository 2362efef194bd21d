"""The batches of the coming optimizer steps in the trainer's real order, before it trains on them.

What is left of the running epoch is taken from the trainer's own iterator and handed on to it
later. Batches of later epochs are read from a second dataloader set to that epoch; the trainer
reads them again when it gets there.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy
import torch
from transformers.trainer_utils import has_length


class Lookahead:
    """Reads ahead of `trainer`'s training loop."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._ahead: deque[Any] = deque()  # fetched from the running epoch, not yet trained on

    def take(self, epoch_iterator: Iterator[Any], count: int) -> list[Any]:
        """The next `count` batches of the running epoch (fewer at its end)."""
        batches = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        return [*batches, *islice(epoch_iterator, count - len(batches))]

    def steps(self, epoch_iterator: Iterator[Any], count: int) -> Iterator[Any]:
        """The batches of the next `count` optimizer steps.

        Raises:
            ValueError: a stream ends twice before the steps do.
        """
        trainer = self._trainer
        group = trainer.args.gradient_accumulation_steps
        sized = has_length(trainer.train_dataset)
        epoch = running = int(trainer.state.epoch or 0)
        while True:
            while count > 0 and (batches := list(islice(epoch_iterator, group))):
                if epoch == running:
                    self._ahead.extend(batches)
                yield from batches
                # the last step of an epoch may have fewer batches; a stream that ends inside a
                # group makes no step of it (transformers does not know there that it was the last)
                count -= len(batches) == group or sized
            if count <= 0:
                return
            epoch += 1
            if not sized and epoch > running + 1:
                raise ValueError(
                    f"ref_model_sync_steps={trainer.args.ref_model_sync_steps}: the window is "
                    "longer than an epoch of the streamed dataset, whose length is unknown; use a "
                    'smaller value, a dataset with a length, or reference="resident"'
                )
            epoch_iterator = self._later_epoch(epoch)

    def _later_epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of a later epoch, leaving random states and accelerate's books alone."""
        trainer = self._trainer
        with _kept_random_states():
            loader = trainer.get_train_dataloader()
            trainer.accelerator._dataloaders.pop()
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            iterator = iter(loader)
        try:
            while True:
                with _kept_random_states():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        finally:
            if hasattr(loader, "end"):
                with contextlib.suppress(ValueError):  # it has ended by itself
                    loader.end()


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
