"""What every process of `tests/distributed/test_resized.py` runs.

    torchrun --nproc_per_node P -m tests.distributed.resized_run KIND FROM STEP INTO CASE...

KIND is ddp or fsdp2. With STEP 0 a run starts, else one goes on from FROM/CASE/checkpoint-STEP.
Writes checkpoints and INTO/CASE/losses.json, losses of every step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training.distributed_run import FSDP, _let_accelerate_shard_on_cpus
from tests.training.test_trainer import make
from tests.training.test_trl_parity import kto_rows, pair_rows
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
EVALUATED = ("dpo-snapshot", "kto-snapshot")


def trained(case: str, into: Path, checkpoint: str | None, processes: int, **extra):
    """Losses of every step; those before the checkpoint are the run's that wrote it."""
    tokenizer = make_small_tokenizer()
    method, options = CASES[case]
    policy = make_tiny_llama(tokenizer)
    if "lora" in case:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
    rows = (kto_rows if method == "kto" else pair_rows)(14 if case == "dpo-uneven" else 24)
    passes = 4 // processes if case == "dpo-accumulated" else 1
    if case in EVALUATED:
        extra |= {"eval_strategy": "steps", "eval_steps": 4, "held_out": rows.select(range(8))}
    trainer = make(
        policy, tokenizer, into / case, method, rows, max_steps=STEPS, learning_rate=2e-3,
        per_device_train_batch_size=ROWS // processes // passes,
        gradient_accumulation_steps=passes, save_strategy="steps", save_steps=3,
        **{**options, **extra},
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
    if kind != "ddp":
        _let_accelerate_shard_on_cpus()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for case in cases:
        checkpoint = None if step == "0" else f"{source}/{case}/checkpoint-{step}"
        found = trained(case, into, checkpoint, processes, **KINDS[kind])
        (into / case / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    kind, source, step, into, *cases = sys.argv[1:]
    main(kind, source, step, Path(into), cases)
