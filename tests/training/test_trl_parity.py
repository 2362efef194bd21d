"""The losses of TRL 1.16's trainers: same rows, same order, eight optimizer steps with syncs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import DEVICE, words
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data.packing import PreferenceCollator

STEPS = 8


def number(low, high, g):
    return int(torch.randint(low, high, (1,), generator=g))


def pair_rows(n=STEPS * 4, conversational=False):
    g = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(n):
        ranges = ((3, 20), (2, 12), (2, 12))
        prompt, chosen, rejected = (words(number(low, high, g), g) for low, high in ranges)
        if conversational:
            rows.append({
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            })  # fmt: skip
        else:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return Dataset.from_list(rows)


def kto_rows(n=STEPS * 4):
    g = torch.Generator().manual_seed(4)
    return Dataset.from_list([
        {
            "prompt": words(number(3, 20, g), g),
            "completion": " " + words(number(2, 12, g), g),
            "label": bool(torch.rand((), generator=g) < 0.6),
        }
        for _ in range(n)
    ])  # fmt: skip


def options(output_dir, **extra):
    return {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": DEVICE.type == "cpu",
        "sync_ref_model": True,
        "max_length": 64,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **extra,
    }


def history(trainer, key="loss"):
    trainer.train()
    return [log[key] for log in trainer.state.log_history if key in log]


def trl_classes(method) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    return (KTOConfig, KTOTrainer) if method == "kto" else (DPOConfig, DPOTrainer)


def run_both(
    method, model, tokenizer, tmp_path, rows, ours=None, held_out=None, **extra
) -> tuple[Any, Any]:
    theirs_config, theirs_trainer = trl_classes(method)
    name = {"dpo": "sigmoid"}.get(method, method)
    theirs = theirs_trainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=theirs_config(**options(tmp_path / "trl", **{"loss_type": name, **extra})),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    mine = TRTrainer(
        copy.deepcopy(model),
        args=TRConfig(
            **options(
                tmp_path / "ours",
                **{"loss_type": method, "reference": "resident", **extra, **(ours or {})},
            )
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    if not {"packing", "prefix_sharing"} & (ours or {}).keys():
        assert isinstance(mine.data_collator, PreferenceCollator)
        assert mine.data_collator.layout == "shared"
    return theirs, mine


SCHEDULES = {
    "soft": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1},
    "hard": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3},
    "hybrid": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_losses_equal_trl_at_every_step(method, schedule, tiny_llama, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    schedule = SCHEDULES[schedule]
    theirs, mine = run_both(method, tiny_llama, small_tokenizer, tmp_path, rows, **schedule)
    expected, losses = history(theirs), history(mine)
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    # the run is worth comparing: it moved, and the reference with it
    assert len(set(losses)) > 2
    assert mine.state.log_history[-2]["tr/syncs"] == STEPS // schedule["ref_model_sync_steps"]
    for a, b in zip(mine.reference.model.parameters(), theirs.ref_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_kto_with_cut_completions_equals_trl(tiny_llama, small_tokenizer, tmp_path):
    """A completion that its own prompt cuts is lent whole to a shorter prompt."""
    rows = kto_rows(64)
    extra = {"max_length": 50, "ref_model_sync_steps": 2}
    theirs, mine = run_both(
        "kto", tiny_llama, small_tokenizer, tmp_path, rows, ours={"on_bad_rows": "drop"}, **extra
    )
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in mine.train_dataset]
    assert max(lengths) > 50
    assert len(mine.train_dataset) == len(theirs.train_dataset)
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


def test_metrics_have_trls_names_and_values(tiny_llama, small_tokenizer, tmp_path):
    rows = pair_rows(conversational=True)
    extra = {"ref_model_sync_steps": 3, "max_length": 256}
    theirs, mine = run_both("dpo", tiny_llama, small_tokenizer, tmp_path, rows, **extra)
    for trainer in (theirs, mine):
        trainer.train()
    keys = [
        "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "logps/chosen", "logps/rejected",
    ]  # fmt: skip
    logs = zip(mine.state.log_history[:-1], theirs.state.log_history[:-1], strict=True)
    for step, (a, b) in enumerate(logs):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), (step, key)


def test_ipo_and_kto_metrics(tiny_llama, small_tokenizer, tmp_path):
    for method, rows in (("ipo", pair_rows()), ("kto", kto_rows())):
        theirs, mine = run_both(
            method, tiny_llama, small_tokenizer, tmp_path / method, rows, ref_model_sync_steps=3
        )
        for trainer in (theirs, mine):
            trainer.train()
        keys = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "kl"}
        for a, b in zip(mine.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
            assert keys & a.keys() == keys & b.keys()
            for key in keys & a.keys():
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), (method, key)


@pytest.mark.parametrize("layout", [{"prefix_sharing": False}, {"packing": False}])
def test_other_layouts_equal_trl_too(layout, tiny_llama, small_tokenizer, tmp_path):
    rows, extra = pair_rows(), {"ref_model_sync_steps": 3}
    theirs, mine = run_both(
        "dpo", tiny_llama, small_tokenizer, tmp_path, rows, ours=layout, **extra
    )
    assert mine.data_collator.layout == ("packed" if "prefix_sharing" in layout else "padded")
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


def test_accumulation_and_evaluation_equal_trl(tiny_llama, small_tokenizer, tmp_path):
    extra = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_eval_batch_size": 4,
        "ref_model_sync_steps": 3,
        "max_length": 256,
    }
    held_out = pair_rows(8, conversational=True)
    theirs, mine = run_both(
        "dpo", tiny_llama, small_tokenizer, tmp_path, pair_rows(), held_out=held_out, **extra
    )
    expected, losses = history(theirs), history(mine)
    assert losses == pytest.approx(expected, rel=1e-4)
    keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen")
    for key in keys:
        a = [log[key] for log in mine.state.log_history if key in log]
        b = [log[key] for log in theirs.state.log_history if key in log]
        assert len(a) == 2
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5), key
