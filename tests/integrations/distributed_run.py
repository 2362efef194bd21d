"""What each of two processes runs for `test_distributed.py`.

    torchrun --nproc_per_node 2 -m tests.integrations.distributed_run FOLDER

Writes FOLDER/found.pt: (kind, case) -> what `train` returns.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import TrainingArguments

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.integrations.test_any_trainer import ROWS, PairTrainer
from tests.training.distributed_run import FSDP, _let_accelerate_shard_on_cpus
from tests.training.test_trl_parity import options, pair_rows, trl_classes
from tralign_fast.integrations.callback import TrustRegionCallback
from tralign_fast.integrations.trl import use_fast_logprobs
from tralign_fast.model.scoring import enable_logprobs

STEPS, PROCESSES, ROWS_EACH = 6, 2, 1
CASES = ("plain", "trl")
KINDS = {"ddp": {}, "fsdp2": FSDP}
RESUMED = ("fsdp2",)


def build(case: str, folder: Path, *, batch: int, fast: bool = False, **extra: Any) -> Any:
    """A trainer whose reference follows every other step, α = 0.4."""
    tokenizer = make_small_tokenizer()
    model, ref_model = make_tiny_llama(tokenizer), make_tiny_llama(tokenizer)
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": batch, "save_strategy": "steps",
        "save_steps": 3, "learning_rate": 2e-3,
        # else AdamW makes a whole step of the rounding of a gradient that is nearly zero
        "adam_epsilon": 1e-2, **extra,
    }  # fmt: skip
    if case == "plain":
        for one in (model, ref_model):
            enable_logprobs(one)
        common = options(folder, remove_unused_columns=False, **args)
        kept = TrainingArguments.__dataclass_fields__.keys() & common.keys()
        trainer = PairTrainer(
            model, TrainingArguments(**{k: common[k] for k in kept}), train_dataset=ROWS,
            data_collator=lambda rows: {"ids": pairs([row["ids"] for row in rows])},
        )  # fmt: skip
        fsdp = trainer.is_fsdp_enabled
        trainer.ref_model = (
            fsdp2_prepare_model(trainer.accelerator, ref_model) if fsdp else ref_model
        )
    else:
        config, trainer_class = trl_classes("dpo")
        trainer = trainer_class(
            model, ref_model=ref_model, processing_class=tokenizer, train_dataset=pair_rows(),
            args=config(**options(folder, **{**args, "sync_ref_model": False})),
        )  # fmt: skip
    if case == "trl" and fast:
        use_fast_logprobs(trainer)
    trainer.add_callback(TrustRegionCallback(0.4, 2, trainer=trainer))
    return trainer


def pairs(ids: list[torch.Tensor]) -> torch.Tensor:
    """The chosen of all pairs, then the rejected."""
    return torch.stack(ids, 1).flatten(0, 1)


def train(case: str, folder: Path, *, resume_from=None, **extra: Any) -> dict[str, Any]:
    trainer = build(case, folder, **extra)
    trainer.train(resume_from_checkpoint=resume_from)
    callback = trainer.callback_handler.callbacks[-1]
    named = trainer.ref_model.named_parameters()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "syncs": callback.syncs,
        "sharded": callback._reference.is_sharded,
        "reference": {name: whole(p) for name, p in named},
    }


def whole(parameter: Any) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "to_local") else parameter
    return full.detach().clone()


def refused(folder: Path) -> list[str]:
    """A reference that is not sharded; shards of more processes than there are."""
    found = []
    trainer = build("plain", folder / "whole", batch=ROWS_EACH, **FSDP)
    trainer.ref_model = make_tiny_llama(make_small_tokenizer())
    enable_logprobs(trainer.ref_model)
    trainer.callback_handler.callbacks.pop()
    trainer.add_callback(TrustRegionCallback(0.4, 2, trainer=trainer))
    with pytest.raises(ValueError, match="shard both alike") as error:
        trainer.train()
    found.append(str(error.value))
    checkpoint = folder / "fsdp2" / "plain" / "checkpoint-3"
    own = checkpoint / "reference" / f"model-{os.environ['RANK']}-of-2.safetensors"
    own.rename(own.with_name(own.name.replace("of-2", "of-3")))
    with pytest.raises(ValueError, match="as many processes as wrote it") as error:
        train("plain", checkpoint.parent, batch=ROWS_EACH, resume_from=str(checkpoint), **FSDP)
    return [*found, str(error.value)]


def main(folder: Path) -> None:
    _let_accelerate_shard_on_cpus()
    found: dict[Any, Any] = {}
    for kind, extra in KINDS.items():
        for case in CASES:
            AcceleratorState._reset_state(reset_partial_state=True)
            options = {"batch": ROWS_EACH, "fast": True, **extra}
            place = folder / kind / case
            found[kind, case] = train(case, place, **options)
            if kind in RESUMED:
                checkpoint = str(place / "checkpoint-3")
                found[kind, case]["resumed"] = train(case, place, resume_from=checkpoint, **options)
    found["refused"] = refused(folder)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
