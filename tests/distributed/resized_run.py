"""What every process of `tests/distributed/test_resized.py` runs.

    torchrun --nproc_per_node P -m tests.distributed.resized_run KIND FROM STEP INTO CASE...

KIND is one of KINDS, or of TENSOR, whose model lies beside INTO; with +async behind it checkpoints
are written in the background. With STEP 0 a run starts, else one goes on from
FROM/CASE/checkpoint-STEP.
Writes checkpoints and INTO/CASE/losses.json, losses of every step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training.distributed_run import FSDP, _let_accelerate_shard_on_cpus
from tests.training.tensor_parallel_run import _open_accelerate_to_cpus, make_tied
from tests.training.test_trl_parity import kto_rows, pair_rows
from tests.training.test_trl_parity import options as common_options
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.reference import score_cache

STEPS = 8
ROWS = 4  # of a step
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4}
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 4}
CASES = {
    "dpo-resident": ("dpo", {"reference": "resident", **SOFT}),
    "dpo-snapshot": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-offloaded": ("dpo", {"reference": "offloaded", **SOFT}),
    "kto-resident": ("kto", {"reference": "resident", **SOFT}),
    "kto-snapshot": ("kto", {"reference": "snapshot", **HARD}),
    "kto-offloaded": ("kto", {"reference": "offloaded", **SOFT}),
    "dpo-tied": ("dpo", {"reference": "resident", **SOFT}),  # and a vocabulary of an odd size
    # 14 rows are three steps and a half
    "dpo-uneven": ("dpo", {"reference": "snapshot", "train_sampling_strategy": "random", **HARD}),
    # as many rows of a step in twice as many passes, on half as many processes
    "dpo-accumulated": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-lora": ("dpo", {"reference": "adapter", **SOFT}),
    "dpo-lora-snapshot": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-precomputed": (
        "dpo", {"reference": "auto", "sync_ref_model": None, "precompute_ref_log_probs": True},
    ),
    "dpo-grouped": (
        "dpo",
        {"reference": "snapshot", "train_sampling_strategy": "group_by_length", **HARD},
    ),
}  # fmt: skip
SHARDS = {"state_dict_type": "SHARDED_STATE_DICT"}
KINDS = {
    "ddp": {},
    "fsdp2": FSDP,
    "fsdp2-shards": {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], **SHARDS}},
}
TENSOR: dict[str, dict[str, Any]] = {
    "tp2": {"tp_size": 2},
    "tp2-fsdp2": {"tp_size": 2, "fsdp_size": 2},
}
EVALUATED = ("dpo-snapshot", "kto-snapshot")


def trained(
    case: str, into: Path, checkpoint: str | None, processes: int, kind: str = "ddp", **extra
):
    """Losses of every step; those before the checkpoint are the run's that wrote it.

    Args:
        processes: those that get rows of their own.
    """
    tokenizer = make_small_tokenizer()
    method, options = CASES[case]
    policy: Any = make_tiny_llama(tokenizer)
    if kind in TENSOR:
        cut = DistributedConfig(**TENSOR[kind])
        name = "model-tied" if case == "dpo-tied" else "model"
        policy = AutoModelForCausalLM.from_pretrained(into.parent / name, distributed_config=cut)
    elif case == "dpo-tied":
        policy = make_tied(tokenizer)
    if "lora" in case:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
    rows = (kto_rows if method == "kto" else pair_rows)(14 if case == "dpo-uneven" else 24)
    passes = 4 // processes if case == "dpo-accumulated" else 1
    if case in EVALUATED:
        extra |= {"eval_strategy": "steps", "eval_steps": 4}
    config = TRConfig(
        **common_options(
            into / case, loss_type=method, max_steps=STEPS, learning_rate=2e-3,
            per_device_train_batch_size=ROWS // processes // passes,
            gradient_accumulation_steps=passes, save_strategy="steps", save_steps=3,
            **{**options, **extra},
        )
    )  # fmt: skip
    trainer = TRTrainer(
        policy, args=config, train_dataset=rows, processing_class=tokenizer,
        eval_dataset=rows.select(range(8)) if case in EVALUATED else None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # log-probs that another run has left prove nothing
        patch.setattr(score_cache, "FOLDER", str(into / case / "cache"))
        trainer.train(resume_from_checkpoint=checkpoint)
    logs = trainer.state.log_history
    return {
        "losses": [log["loss"] for log in logs if "loss" in log],
        "tokens": [log["num_tokens"] for log in logs if "loss" in log],
        "evaluated": [log["eval_loss"] for log in logs if "eval_loss" in log],
    }


def main(kind: str, source: str, step: str, into: Path, cases: list[str]) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    later, kind = kind.endswith("+async"), kind.removesuffix("+async")
    if kind in TENSOR:
        _open_accelerate_to_cpus()
        processes //= TENSOR[kind]["tp_size"]
    elif kind != "ddp":
        _let_accelerate_shard_on_cpus()
    for case in cases:
        checkpoint = None if step == "0" else f"{source}/{case}/checkpoint-{step}"
        found = trained(
            case, into, checkpoint, processes, kind, async_save=later, **KINDS.get(kind, {})
        )
        (into / case / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    kind, source, step, into, *cases = sys.argv[1:]
    main(kind, source, step, Path(into), cases)
