"""What each of four processes runs for `tests/training/test_four_processes.py`.

    torchrun --nproc_per_node 4 -m tests.training.matrix_run FOLDER KIND:CASE... [checks]

Writes FOLDER/losses.json: KIND:CASE -> losses of every step, and those of the run resumed in its
midst. With `checks` come those of `release_checks.py`, with KIND:traffic-PLACE those of
`traffic_checks.py`.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training import release_checks
from tests.training.distributed_run import FSDP, _let_accelerate_shard_on_cpus
from tests.training.test_trainer import make
from tests.training.test_trl_parity import kto_rows, pair_rows
from tralign_fast.data.tokenization import lend_in_groups

STEPS, SAVED = 8, 5  # the checkpoint lies in the midst of a window
PROCESSES = 4
ROWS = 2  # of a batch on a process
KINDS = {"ddp": {}, "fsdp2": FSDP}
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 3}
PLACES: dict[str, dict[str, Any]] = {
    "resident": SOFT, "snapshot": HARD, "offloaded": SOFT, "adapter": SOFT
}  # fmt: skip
RELEASE: dict[str, Any] = {"gradient_release": True, "max_grad_norm": 0.0, "weight_decay": 0.1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{method}-{place}": (method, {"reference": place, **PLACES[place]})
    for method, place in product(("dpo", "kto"), PLACES)
}
RELEASED = {
    f"{method}-{place}-{optim}": (
        method, {"reference": place, "optim": optim, **PLACES[place], **RELEASE}
    )
    for (method, place), optim in product(
        (("dpo", "snapshot"), ("dpo", "offloaded"), ("kto", "resident"), ("dpo", "adapter")),
        ("adamw_torch", "adamw_torch_fused", "adafactor"),
    )
}  # fmt: skip
CASES |= RELEASED
# past adapters that are moved at every step lie where the policy does; a base of few bits
CASES["dpo-adapter-always"] = ("dpo", {"reference": "adapter", **SOFT, "ref_model_sync_steps": 1})
# an order that gives processes unequal numbers of rows
for method, place in (("dpo", "snapshot"), ("kto", "resident")):
    options = {"reference": place, "train_sampling_strategy": "batch_rebalance", **PLACES[place]}
    CASES[f"{method}-unequal"] = (method, options)
CASES["dpo-adapter-4bit"] = ("dpo", {"reference": "adapter", **SOFT})


def rows_of(method: str) -> Dataset:
    count = STEPS * PROCESSES * ROWS
    if method != "kto":
        return pair_rows(count)
    rows = kto_rows(count).to_list()
    # KTO borrows the completion of the row before, within a process's batch of two: those of one
    # batch of eight are the same ones if every second row has the same
    for i in range(1, len(rows), 2):
        rows[i]["completion"] = rows[i - i % (PROCESSES * ROWS) + 1]["completion"]
    return Dataset.from_list(rows)


def in_4_bits(policy: Any, folder: Path) -> Any:
    """The policy's linear layers in 4 bits, stored as floats, which FSDP2 can shard."""
    own = folder / os.environ.get("RANK", "alone")
    if torch.distributed.is_initialized():  # the first process alone writes from then on
        own = folder
        policy.save_pretrained(own)
        torch.distributed.barrier()
    else:
        policy.save_pretrained(own)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # which earlier trainers here have switched on
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
        return AutoModelForCausalLM.from_pretrained(own, quantization_config=config)


def trainer_of(case: str, folder: Path, *, batch: int, **extra: Any) -> Any:
    method, options = CASES[case]
    tokenizer = make_small_tokenizer()
    # sizes that four do not divide, and fewer rows of a weight than processes
    policy = make_tiny_llama(tokenizer, intermediate_size=62)
    if "4bit" in case:  # blocks of 64 weights
        policy = in_4_bits(make_tiny_llama(tokenizer, hidden_size=64, head_dim=16), folder / "base")
    if "adapter" in case:
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        policy = get_peft_model(policy, config)
    options = {"train_sampling_strategy": "sequential", **options, **extra}
    trainer = make(
        policy, tokenizer, folder, method, rows_of(method), max_steps=STEPS, learning_rate=2e-3,
        per_device_train_batch_size=batch, **options,
    )  # fmt: skip
    if case == "kto-unequal":  # what a row borrows is not to be a matter of its batch
        trainer.train_dataset = lend_in_groups(trainer.train_dataset, PROCESSES * ROWS)
    return trainer


def train(case: str, folder: Path, *, resume_from: str | None = None, **extra: Any) -> list[float]:
    """The loss of every step."""
    trainer = trainer_of(case, folder, **extra)
    trainer.train(resume_from_checkpoint=resume_from)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def check_refused(folder: Path) -> None:
    """DDP averages gradients when they are used up; 8-bit AdamW knows no shards."""
    with pytest.raises(ValueError, match="expected one process or FSDP2, got 4 processes"):
        trainer_of("dpo-snapshot-adamw_torch", folder, batch=ROWS)


def main(folder: Path, names: list[str]) -> None:
    _let_accelerate_shard_on_cpus()
    found = {}
    for kind, options in KINDS.items():
        extra = {**options, "batch": ROWS, "save_strategy": "steps", "save_steps": SAVED}
        cases = [name.split(":")[1] for name in names if name.startswith(f"{kind}:")]
        for case in cases:
            if case.startswith("traffic-"):
                from tests.training import traffic_checks  # which trains by this file

                traffic_checks.CHECKS[kind](case.removeprefix("traffic-"), folder / kind / case)
                continue
            own = folder / kind / case
            losses = train(case, own, **extra)
            checkpoint = str(own / f"checkpoint-{SAVED}")
            resumed = train(case, own, resume_from=checkpoint, **extra)
            found[f"{kind}:{case}"] = {"losses": losses, "resumed": resumed}
        if cases and kind == "ddp":
            check_refused(folder)
        AcceleratorState._reset_state()  # DDP comes first: shards change its class for good
    if "checks" in names:
        release_checks.main()
    if int(os.environ["RANK"]) == 0:
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
