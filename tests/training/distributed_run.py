"""What each of two processes runs for `tests/training/test_distributed.py`.

    torchrun --nproc_per_node 2 -m tests.training.distributed_run FOLDER ddp|fsdp2|zero3

Writes FOLDER/losses.json: case -> losses of every step.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training.test_trainer import make
from tests.training.test_trl_parity import kto_rows, pair_rows
from tralign_fast.memory.one_rank import sharding_on_cpus
from tralign_fast.reference import score_cache

_OPEN = contextlib.ExitStack()
STEPS = 6
PROCESSES = 2
ROWS = 2  # of a batch on a process
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
}
ZERO3 = {
    "deepspeed": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        # a bound under the size of the matrices: both those that stay whole and those that do not
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }
}
KINDS = {"ddp": {}, "fsdp2": FSDP, "zero3": ZERO3}
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 2}
PRECOMPUTED = {"reference": "auto", "sync_ref_model": None, "precompute_ref_log_probs": True}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
FIRST_LAYER = {"gradient_checkpointing": True, "gradient_checkpointing_layers": 1}
CASES = {
    "dpo-resident": ("dpo", {"reference": "resident", **SOFT}),
    "dpo-snapshot": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-offloaded": ("dpo", {"reference": "offloaded", **SOFT}),
    "kto-resident": ("kto", {"reference": "resident", **SOFT}),
    "kto-snapshot": ("kto", {"reference": "snapshot", **HARD}),
    "dpo-split": ("dpo", {"reference": "snapshot", "token_budget": 40, **HARD}),
    "dpo-compiled": ("dpo", {"reference": "resident", **COMPILED, **SOFT}),
    "dpo-lora": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-adapter": ("dpo", {"reference": "adapter", **SOFT}),
    "dpo-first-layer": ("dpo", {"reference": "snapshot", **FIRST_LAYER, **HARD}),
    "dpo-precomputed": ("dpo", PRECOMPUTED),
    "kto-precomputed": ("kto", PRECOMPUTED),
    "kto-split": ("kto", {"reference": "resident", "token_budget": 60, **SOFT}),
}
REFUSED = {  # cases that a kind cannot run, and what it says
    "zero3": {"dpo-offloaded": "cannot hold weights", "dpo-compiled": "cannot compile layers"}
}
ASYNC = ("dpo-resident", "dpo-offloaded", "kto-snapshot")  # checkpoints written meanwhile
RESUMED = (
    "dpo-resident", "dpo-snapshot", "dpo-offloaded", "dpo-adapter", "kto-snapshot",
    "dpo-precomputed",
)  # fmt: skip


def rows_of(method):
    if method != "kto":
        return pair_rows(STEPS * PROCESSES * ROWS)
    rows = kto_rows(STEPS * PROCESSES * ROWS).to_list()
    # KTO borrows the completion of the row before, within a process's batch: rows 1 and 3 of four
    # have the same one, so that two batches of two borrow what one batch of four does
    for i in range(0, len(rows), 4):
        rows[i + 3]["completion"] = rows[i + 1]["completion"]
    return Dataset.from_list(rows)


def train(case, folder, *, batch, resume_from=None, **extra):
    """[loss of every step], and what an evaluation afterwards found."""
    tokenizer = make_small_tokenizer()
    method, options = CASES[case]
    policy = make_tiny_llama(tokenizer)
    if case in ("dpo-lora", "dpo-adapter"):
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
    trainer = make(
        policy, tokenizer, folder, method, rows_of(method),
        held_out=rows_of(method).select(range(8)), max_steps=STEPS, learning_rate=2e-3,
        per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        train_sampling_strategy="sequential", eval_strategy="steps", eval_steps=3,
        **options, **extra,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # log-probs that another run has left prove nothing
        patch.setattr(score_cache, "FOLDER", str(folder / "cache"))
        trainer.train(resume_from_checkpoint=resume_from)
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    evaluated = [log["eval_rewards/chosen"] for log in logs if "eval_rewards/chosen" in log]
    return {
        "losses": losses,
        "evaluated": evaluated,
        "kl": [log.get("kl") for log in logs if "loss" in log],
    }


def _let_accelerate_shard_on_cpus() -> None:
    """From here to the end of the process."""
    _OPEN.enter_context(sharding_on_cpus())


def main(folder: Path, kind: str, cases: list[str]) -> None:
    _let_accelerate_shard_on_cpus()
    extra = KINDS[kind]
    found = {}
    for case in cases:
        if message := REFUSED.get(kind, {}).get(case):
            with pytest.raises(ValueError, match=message):
                train(case, folder / case, batch=ROWS, **extra)
            continue
        saving = {"save_strategy": "steps", "save_steps": 3} if case in RESUMED else {}
        saving["async_save"] = case in ASYNC and kind != "zero3"
        found[case] = train(case, folder / case, batch=ROWS, **saving, **extra)
        if case in RESUMED:
            checkpoint = str(folder / case / "checkpoint-3")  # in mid-window
            found[f"{case}-resumed"] = train(
                case, folder / case, batch=ROWS, resume_from=checkpoint, **saving, **extra
            )
    if int(os.environ["RANK"]) == 0:
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
