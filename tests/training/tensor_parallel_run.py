"""What each of several processes runs for `tests/training/test_tensor_parallel.py`.

    torchrun --nproc_per_node 2 -m tests.training.tensor_parallel_run FOLDER LAYOUT=CASE,CASE...

FOLDER/model holds the policy. Writes FOLDER/LAYOUT.json: case -> losses of every step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training import cut_checks, tensor_checks
from tests.training.distributed_run import FIRST_LAYER, FSDP, _let_accelerate_shard_on_cpus
from tests.training.test_trl_parity import kto_rows, options, pair_rows
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.model import scoring
from tralign_fast.reference import score_cache

STEPS = 8
ROWS = 4  # of a step, of all processes
HELD_OUT = 6  # no whole number of batches
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 2}
CASES = {
    f"{method}-{place}": (method, {"reference": place, **schedule})
    for method in ("dpo", "kto")
    for place, schedule in (("resident", SOFT), ("snapshot", HARD), ("offloaded", SOFT))
} | {
    "dpo-tied": ("dpo", {"reference": "resident", **SOFT}),  # and a vocabulary of an odd size
    "dpo-split": (
        "dpo", {"reference": "snapshot", "token_budget": 60, "max_grad_norm": 0.0, **HARD}
    ),
    "dpo-by-name": ("dpo", {"reference": "resident", **SOFT}),
    "dpo-precomputed": (
        "dpo", {"reference": "auto", "sync_ref_model": None, "precompute_ref_log_probs": True}
    ),
    "dpo-sft": ("dpo", {"loss_type": ["sigmoid", "sft"], "reference": "resident", **SOFT}),
    # one pair a step: of two that divide it one has nothing
    "dpo-one": ("dpo", {"reference": "resident", "per_device_train_batch_size": 1, **SOFT}),
    "dpo-lora": ("dpo", {"reference": "snapshot", **HARD}),
    "dpo-first-layer": ("dpo", {"reference": "snapshot", **FIRST_LAYER, **HARD}),
}  # fmt: skip
# groups of several processes' length between short ones: cut, where processes divide batches
LONG = {"max_length": 480, "gradient_checkpointing": True}
CASES |= {
    f"{case}-long": (CASES[case][0], {**CASES[case][1], **LONG})
    for case in CASES
    if case.endswith(("resident", "snapshot", "offloaded", "sft", "lora"))
} | {
    "dpo-split-long": ("dpo", {**CASES["dpo-split"][1], **LONG, "token_budget": 150}),
    "kto-split-long": ("kto", {"reference": "resident", **SOFT, **LONG, "token_budget": 150}),
    "ipo-long": ("ipo", {"reference": "resident", **SOFT, **LONG}),
    "dpo-first-layer-long": (
        "dpo", {"reference": "snapshot", **HARD, **LONG, "gradient_checkpointing_layers": 1}
    ),
    "dpo-weighted-long": (
        "dpo", {"reference": "resident", "use_weighting": True, "ld_alpha": 0.5, **SOFT, **LONG}
    ),
    # prompts are cut to different ends, and stand before each completion
    "dpo-ends-long": (
        "dpo",
        {"reference": "resident", "truncation_mode": "keep_end", **SOFT, **LONG, "max_length": 200},
    ),
    "dpo-twice-long": ("dpo", {"reference": "resident", "prefix_sharing": False, **SOFT, **LONG}),
    "dpo-filled-long": ("dpo", {"reference": "snapshot", "pad_to_multiple_of": 8, **HARD, **LONG}),
}  # fmt: skip
RESUMED = (
    "dpo-resident", "dpo-snapshot", "kto-offloaded", "dpo-snapshot-long", "kto-resident-long"
)  # fmt: skip
ASYNC = ("dpo-snapshot", "kto-offloaded")  # of these, checkpoints written meanwhile
LAYOUTS = {  # processes, what transformers cuts the model into, options of the run
    "tp2": (2, {"tp_size": 2}, lambda: {}),
    "tp2-fsdp2": (4, {"tp_size": 2, "fsdp_size": 2}, lambda: {}),
    "cp2": (2, {}, lambda: _divided(cp_size=2)),
    "cp3": (3, {}, lambda: _divided(cp_size=3)),
    "cut": (2, {}, lambda: {}),  # pieces without a trainer
    "sent": (2, {}, lambda: {}),  # shared layers without one
    "cp2-fsdp2": (4, {}, lambda: _divided(cp_size=2, dp_shard_size=2)),
}


def _divided(**sizes):
    return {**FSDP, "parallelism_config": ParallelismConfig(**sizes)}


def rows_of(case):
    rows = _short_rows(CASES[case][0])
    if "-long" not in case:
        return rows
    rows = rows.to_list()
    for step in range(STEPS):
        for row in rows[ROWS * step : ROWS * step + step % 3]:  # none, one, two of a step
            for column in row:
                if isinstance(row[column], str):
                    row[column] = row[column] * (8 if column == "prompt" else 4)
    return Dataset.from_list(rows)


def _short_rows(method):
    if method != "kto":
        return pair_rows(STEPS * ROWS)
    rows = kto_rows(STEPS * ROWS).to_list()
    # KTO borrows the completion of the row before, within the batch of a process: rows 1 and 3 of
    # four have the same one, so that two batches of two borrow what one batch of four does
    for i in range(0, len(rows), ROWS):
        rows[i + 3]["completion"] = rows[i + 1]["completion"]
    return Dataset.from_list(rows)


def save_models(folder: Path) -> None:
    tokenizer = make_small_tokenizer()
    make_tiny_llama(tokenizer).save_pretrained(folder / "model")
    make_tied(tokenizer).save_pretrained(folder / "model-tied")


def make_tied(tokenizer):
    return make_tiny_llama(tokenizer, vocab_size=len(tokenizer) + 1, tie_word_embeddings=True)


def model_of(case: str, folder: Path, **sizes):
    if case == "dpo-by-name":
        return str(folder / "model")
    name = "model-tied" if case == "dpo-tied" else "model"
    cut = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(folder / name, **cut)
    if not case.startswith("dpo-lora"):
        return model
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            whole = torch.randn(parameter.shape, generator=generator) * 0.1
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(whole)
    return policy


def train(case, folder, model, *, batch=ROWS, resume_from=None, **extra):
    """What the logs of a run say."""
    method, asked = CASES[case]
    config = TRConfig(
        **options(
            folder / case, max_steps=STEPS, learning_rate=2e-3,
            per_device_eval_batch_size=batch, train_sampling_strategy="sequential",
            eval_strategy="steps", eval_steps=4,
            **{"loss_type": method, "per_device_train_batch_size": batch, **asked, **extra},
        )
    )  # fmt: skip
    rows = rows_of(case)
    seen = []  # rows that each evaluation has predictions of
    trainer = TRTrainer(
        model, args=config, train_dataset=rows, eval_dataset=rows.select(range(HELD_OUT)),
        processing_class=make_small_tokenizer(),
        compute_metrics=lambda found: seen.append(len(found.predictions)) or {},
    )  # fmt: skip
    cuts = []
    with pytest.MonkeyPatch.context() as patch:
        join = scoring.join_scores
        patch.setattr(scoring, "join_scores", lambda *given: cuts.append(1) or join(*given))
        # log-probs that another run has left prove nothing
        patch.setattr(score_cache, "FOLDER", str(folder / case / "cache"))
        trainer.train(resume_from_checkpoint=resume_from)
    logs = trainer.state.log_history
    found = {
        name: [log[name] for log in logs if name in log]
        for name in (
            "loss", "grad_norm", "kl", "entropy", "num_tokens", "mean_token_accuracy",
            "rewards/margins", "eval_loss", "eval_rewards/margins",
        )
    }  # fmt: skip
    trainer.release_model()
    return {**found, "eval_rows": seen, "cuts": len(cuts)}


def _open_accelerate_to_cpus() -> None:
    """accelerate refuses a mesh of CPUs. All that comes after is what runs on GPUs."""
    own = accelerate.Accelerator.multi_device.fget
    accelerate.Accelerator.multi_device = property(
        lambda self: own(self) or self.distributed_type == DistributedType.MULTI_CPU
    )


def run(folder: Path, layout: str, cases: list[str]) -> None:
    if layout in ("cut", "sent"):
        found = (cut_checks if layout == "cut" else tensor_checks).measured(folder)
        if int(os.environ["RANK"]) == 0:
            (folder / f"{layout}.json").write_text(json.dumps(found))
        return
    AcceleratorState._reset_state()  # an earlier layout's
    if layout.startswith("cp"):
        _let_accelerate_shard_on_cpus()
    else:
        _open_accelerate_to_cpus()
    _, sizes, more = LAYOUTS[layout]
    batch = ROWS // 2 if layout.endswith("fsdp2") else ROWS
    found = {}
    for case in cases:
        saving = {"save_strategy": "steps", "save_steps": 4} if case in RESUMED else {}
        options = {"batch": batch, "async_save": case in ASYNC, **saving, **more()}
        if case == "dpo-by-name":
            options["model_init_kwargs"] = {"distributed_config": sizes}
        found[case] = train(case, folder / layout, model_of(case, folder, **sizes), **options)
        if case in RESUMED:
            checkpoint = str(folder / layout / case / "checkpoint-4")  # in mid-window
            again = model_of(case, folder, **sizes)
            found[f"{case}-resumed"] = train(
                case, folder / layout, again, resume_from=checkpoint, **options
            )
    if int(os.environ["RANK"]) == 0:
        (folder / f"{layout}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for asked in sys.argv[2:]:
        layout, _, names = asked.partition("=")
        run(Path(sys.argv[1]), layout, names.split(","))
