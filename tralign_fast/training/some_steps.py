"""Runs that would take no step, and end with a model that nobody trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from tralign_fast.ops.backend import warn_once


def check_batches(loader: Any, args: Any) -> None:
    """Raises ValueError for a dataloader of a dataset that has no batch."""
    if has_length(loader) and not len(loader):
        raise ValueError(
            "dataloader_drop_last=True: the rows make no whole batch of "
            f"per_device_train_batch_size={args.per_device_train_batch_size} for each of "
            f"{args.world_size} processes, so that nothing would be trained; expected more rows, "
            "smaller batches or dataloader_drop_last=False"
        )


class SomeSteps(TrainerCallback):
    """Ends a run whose stream has too few rows for a step: transformers would read it again and
    again, or with no row at all end as if it had trained.

    Raises:
        ValueError: a pass over the stream made no step, and nobody has stopped it.
    """

    _before = 0
    _stopped = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if (steps := args.get_warmup_steps(state.max_steps)) > state.max_steps:
            warn_once(
                f"warmup_steps={steps}: the run ends after {state.max_steps} steps, before its "
                "learning rate is reached"
            )

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self._before = state.global_step
        self._stopped = control.should_training_stop or control.should_epoch_stop

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._stopped |= control.should_training_stop or control.should_epoch_stop

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if has_length(train_dataloader) or self._stopped or state.global_step > self._before:
            return
        raise ValueError(
            "train: a pass over the stream has fewer batches than a step takes "
            f"(gradient_accumulation_steps={args.gradient_accumulation_steps}), so that nothing is "
            "trained; expected more rows"
        )
