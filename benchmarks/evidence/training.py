"""An arm's trainer, set up in one way for all experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from tralign_fast import TRConfig, TRTrainer


class Arm(Protocol):
    @property
    def loss(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def seed(self) -> int: ...


class Settings(Protocol):
    """What every experiment's settings name."""

    @property
    def steps(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def unpaired(rows: Sequence[Mapping[str, Any]], suffix: str = "") -> list[dict[str, Any]]:
    """KTO's rows: both completions of every pair, one after the other.

    Args:
        suffix: of the columns' names: "" for conversations and text, "_ids" for token ids.
    """
    return [
        {
            f"prompt{suffix}": row[f"prompt{suffix}"],
            f"completion{suffix}": row[f"{key}{suffix}"],
            "label": key == "chosen",
        }
        for row in rows
        for key in ("chosen", "rejected")
    ]


def make_trainer(
    arm: Arm, settings: Settings, reference: Mapping[str, Any], model: Any, tokenizer: Any,
    rows: Sequence[Mapping[str, Any]], folder: Path | str, suffix: str = "", **options: Any,
) -> TRTrainer:  # fmt: skip
    """A trainer of the arm's loss, β and seed, at a constant learning rate after a warmup.

    Args:
        reference: fields of `TRConfig`: the schedule of the reference.
        rows: pairs, with the columns prompt, chosen and rejected; others are left out.
        suffix: as `unpaired` has it.
        options: further fields of `TRConfig`: precision, logs, checkpoints.
    """
    kto = arm.loss == "kto"
    names = [f"{key}{suffix}" for key in ("prompt", "chosen", "rejected")]
    data = unpaired(rows, suffix) if kto else [{key: row[key] for key in names} for row in rows]
    config = TRConfig(
        output_dir=str(folder),
        loss_type=arm.loss,
        beta=arm.beta,
        **reference,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.pairs * (2 if kto else 1),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_length=settings.max_length,
        train_sampling_strategy="random",  # of pairs and of labels alike
        gradient_checkpointing=False,  # 135M parameters: memory is not what is short
        report_to=[],
        seed=arm.seed,
        **options,
    )
    return TRTrainer(
        model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
