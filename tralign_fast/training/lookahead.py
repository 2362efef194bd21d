"""What a window of steps will look at, in the trainer's real order, before it trains on it.

What is left of the running epoch is taken from the trainer's own iterator and handed on to it
later. Batches of later epochs are read from a second dataloader set to that epoch; the trainer
reads them again when it gets there.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, Protocol

import numpy
import torch
from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer_utils import has_length

from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.ops.backend import warn_once
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.precomputed import PrecomputedReference
from tralign_fast.reference.window import WindowedReference
from tralign_fast.training.config import TRConfig


class LoopingTrainer(Protocol):
    """What reading ahead asks of a trainer."""

    args: TRConfig
    state: TrainerState
    accelerator: Accelerator
    train_dataset: Any
    eval_dataset: Any
    model_wrapped: Any
    optimizer: Any
    reference: ReferencePolicy

    def parts_of(self, batch: PackedBatch | SplitBatch, /) -> tuple[PackedBatch, ...]: ...
    def get_train_dataloader(self) -> Any: ...
    def get_eval_dataloader(self, eval_dataset: Any, /) -> Any: ...
    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, /) -> Any: ...
    def compute_loss_context_manager(self) -> AbstractContextManager[Any]: ...
    def is_world_process_zero(self) -> bool: ...


class Lookahead:
    """Reads ahead of `trainer`'s training loop, and lets its reference score what it reads."""

    def __init__(self, trainer: LoopingTrainer) -> None:
        self._trainer = trainer
        self._ahead: deque[Any] = deque()  # fetched from the running epoch, not yet trained on
        self._epoch = 0  # the running one; of a stream `state.epoch` tells it one step late

    def score_window(self, epoch_iterator: Iterator[Any]) -> None:
        """Scores the steps until the next update, and the evaluations that fall between."""
        trainer, args = self._trainer, self._trainer.args
        if not has_length(trainer.train_dataset):
            first = list(islice(epoch_iterator, 1))
            if not first:  # the stream is over: the window begins with its next epoch
                return
            epoch_iterator = chain(first, epoch_iterator)
        step, reference = trainer.state.global_step, trainer.reference
        assert isinstance(reference, WindowedReference), reference.name
        left, schedule = trainer.state.max_steps - step, reference.schedule
        every = int(schedule.every)  # steps: the run has begun
        window = None if schedule.is_frozen else every - step % every
        steps = left if window is None else min(left, window)
        by_tokens = args.precompute_ref_batch_size is None and args.merged_batches > 1
        # a window of one step is swept at every step: no bar for it
        bar = trainer.is_world_process_zero() and not args.disable_tqdm and steps > 1

        def score(batches: Iterable[Any], total: int | None) -> None:
            parts = map(trainer.parts_of, batches)
            reference.score_window(
                parts, total if bar else None, merge=args.merged_batches, by_tokens=by_tokens
            )

        reference.wrapped = trainer.model_wrapped
        self._take_trained_weights()
        if isinstance(reference, PrecomputedReference):
            self._score_rows(reference)
            return
        if steps != window and reference.needs_window:
            reference.keep_weights()
        # one visit of the reference's weights for all that is scored
        with trainer.compute_loss_context_manager(), reference.weights():
            batches = self.steps(epoch_iterator, steps)
            score(batches, steps * args.gradient_accumulation_steps)
            if self._evaluates_between(step, step + steps):
                for loader in self._eval_loaders():
                    score(loader, len(loader) if has_length(loader) else None)
        reference.scored_until = step + steps

    def _score_rows(self, reference: PrecomputedReference) -> None:
        """Scores every row of the run's datasets, to train on and held out, once."""
        trainer, args = self._trainer, self._trainer.args
        bar = trainer.is_world_process_zero() and not args.disable_tqdm
        merge = max(1, args.merged_batches * args.train_batch_size // args.eval_batch_size)
        with trainer.compute_loss_context_manager(), reference.weights():
            sweeps = [*self._training_sweeps(), *((e, len(e), merge) for e in self._eval_loaders())]
            for batches, total, merged in sweeps:
                parts = map(trainer.parts_of, batches)
                reference.score_window(parts, total if bar else None, merge=merged)
            reference.finish()

    def _training_sweeps(self) -> Iterator[tuple[Iterable[Any], int, int]]:
        """(batches, how many, how many as one): between them all sequences of the training."""
        trainer, args = self._trainer, self._trainer.args
        rows = trainer.train_dataset
        if not args.objective.needs_kl:
            with _all_rows(args):
                size = args.merged_batches * args.train_batch_size
                loader = trainer._get_dataloader(rows, "Reference", size)
                trainer.accelerator._dataloaders.pop()
            yield loader, len(loader), 1
            return
        # a row borrows the completion of its neighbour in the batch
        in_order = args.train_sampling_strategy == "sequential"
        total = -(-len(rows) // (args.train_batch_size * args.world_size))
        for epoch in range(1 if in_order else trainer.state.num_train_epochs):
            yield self._later_epoch(epoch), total, args.merged_batches

    def score_held_out(self) -> None:
        """Scores the evaluations that may come, and no step: the window is closed."""
        trainer, reference = self._trainer, self._trainer.reference
        assert isinstance(reference, WindowedReference), reference.name
        self._take_trained_weights()
        with trainer.compute_loss_context_manager(), reference.weights():
            for loader in [[], *self._eval_loaders()]:
                parts = map(trainer.parts_of, loader)
                reference.score_window(parts, None, merge=trainer.args.merged_batches)

    def _take_trained_weights(self) -> None:
        """An optimizer that averages weights (schedule-free) gives the model others to evaluate:
        the reference is made of those that are trained."""
        train = getattr(self._trainer.optimizer, "train", None)
        if callable(train):
            train()

    def _eval_loaders(self) -> list[Any]:
        held_out = self._trainer.eval_dataset
        sets = held_out.values() if isinstance(held_out, dict) else [held_out]
        return [self._trainer.get_eval_dataloader(d) for d in sets if d is not None]

    def _evaluates_between(self, first: int, last: int) -> bool:
        """Whether held-out batches are looked at after step `first` and up to `last`."""
        trainer = self._trainer
        if trainer.eval_dataset is None:
            return False
        if last == trainer.state.max_steps or trainer.args.eval_strategy == "epoch":
            return True
        every: Any = trainer.state.eval_steps if trainer.args.eval_strategy == "steps" else 0
        return bool(every) and last // every > first // every

    def restart(self) -> None:
        """Another training begins: what an earlier one has fetched is not its."""
        self._ahead.clear()
        self._epoch = int(self._trainer.state.epoch or 0) - 1

    def begin_epoch(self) -> None:
        self._epoch += 1

    def take(self, epoch_iterator: Iterator[Any], count: int) -> list[Any]:
        """The next `count` batches of the running epoch (fewer at its end; of a stream none, as
        transformers would add their gradients to those of the next epoch's first step).

        Raises:
            ValueError: a stream that is over before the first step.
        """
        batches = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        batches += islice(epoch_iterator, count - len(batches))
        if len(batches) in (0, count) or has_length(self._trainer.train_dataset):
            return batches
        if self._trainer.state.global_step == 0:
            raise ValueError(
                f"gradient_accumulation_steps={count}: a step takes {count} batches, and the "
                f"streamed dataset has {len(batches)}; expected fewer, or more rows"
            )
        warn_once(
            f"the last {len(batches)} batches of the streamed dataset make no step of "
            f"gradient_accumulation_steps={count}, and are left out of every epoch"
        )
        return []

    def steps(self, epoch_iterator: Iterator[Any], count: int) -> Iterator[Any]:
        """The batches of the next `count` optimizer steps.

        Raises:
            ValueError: a stream ends twice before the steps do.
        """
        trainer = self._trainer
        group = trainer.args.gradient_accumulation_steps
        sized = has_length(trainer.train_dataset)
        epoch = running = self._epoch
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
def _all_rows(args: TRConfig) -> Iterator[None]:
    """Inside, a dataloader is made of all rows: another epoch drops others than the last ones."""
    drops, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drops


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
