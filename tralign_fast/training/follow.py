"""Options that change after a trainer was made: by hand, a callback or a search."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainerCallback

# numbers of the loss: from the next step or evaluation on, the new ones count
_FOLLOWED = (
    "loss_type", "loss_weights", "loss_options", "beta", "label_smoothing", "discopop_tau",
    "desirable_weight", "undesirable_weight", "length_normalized", "f_divergence_type",
    "f_alpha_divergence_coef",
)  # fmt: skip
# what models, reference, rows or collator were made by
_FIXED = (
    "ref_model_mixup_alpha", "ref_model_sync_steps", "sync_ref_model", "reference", "ema_rounding",
    "adapter_tolerance", "precompute_ref_log_probs", "max_length", "truncation_mode", "ld_alpha",
    "prefix_sharing", "packing", "logits_budget_mb", "vocab_filter", "disable_dropout",
    "router_aux_loss_coef", "gradient_release",
)  # fmt: skip


class FollowOptions(TrainerCallback):
    """Looks before every step, and when it is called, whether options of `trainer` have changed.

    A loss of a trainer follows its numbers (`args.beta` of a schedule in a callback); what else has
    changed would be in checkpoints and model card, and not in the run.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._followed, self._fixed = (copy.deepcopy(self._read(n)) for n in (_FOLLOWED, _FIXED))

    def __call__(self) -> None:
        """Lets the loss follow.

        Raises:
            ValueError: one that cannot change, or a loss of other rows.
        """
        fixed = self._read(_FIXED)
        if fixed != self._fixed:
            changes = zip(_FIXED, self._fixed, fixed, strict=True)
            name, was, now = next(change for change in changes if change[1] != change[2])
            raise ValueError(
                f"{name} was {was!r} when the trainer was made, and is {now!r}: make a new "
                "TRTrainer"
            )
        followed = self._read(_FOLLOWED)
        if followed == self._followed:
            return
        trainer = self._trainer
        before, after = trainer._objective, trainer.args.objective
        if (before.paired, before.needs_kl) != (after.paired, after.needs_kl):
            raise ValueError(
                f"loss_type: the trainer was made for {before.title}, and {after.title} takes "
                "other rows: make a new TRTrainer"
            )
        trainer._objective = after
        self._followed = copy.deepcopy(followed)

    def _read(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        args = self._trainer.args
        return tuple(getattr(args, name) for name in names)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self()
