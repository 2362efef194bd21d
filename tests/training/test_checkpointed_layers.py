"""Runs that checkpoint the first layers alone, beside those that checkpoint all and none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast import TRConfig
from tralign_fast.ops.backend import warn_once
from tralign_fast.training.out_of_memory import _advice

CASES = {
    "packed": {},
    "padded": {"packing": False},
    "kto": {"method": "kto"},
    "lora": {"reference": "adapter"},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "release": {"gradient_release": True, "max_grad_norm": 0.0, "optim": "adafactor"},
}


def trainer_of(case, model, tokenizer, folder, layers, **extra):
    if case == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    options = {"max_steps": 3, "learning_rate": 2e-3, **CASES[case], **extra}
    if layers == "none":
        options.pop("gradient_checkpointing_kwargs", None)
    else:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_layers": layers}
    return make(model, tokenizer, folder / str(layers), **options)


SOME = ("kto", "lora", "release")  # `make test` runs these


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in SOME else pytest.mark.matrix) for c in CASES]
)
def test_a_run_has_the_losses_and_weights_of_all_and_of_no_layers(
    case, tiny_llama, small_tokenizer, tmp_path
):
    found = {}
    flags = {"none": [False, False], None: [True, True], 0.5: [True, False]}
    for layers, wanted in flags.items():
        model = copy.deepcopy(tiny_llama) if case == "lora" else tiny_llama
        trainer = trainer_of(case, model, small_tokenizer, tmp_path, layers)
        losses = history(trainer)
        decoder = trainer.model.get_decoder() if case != "lora" else trainer.model.model.model
        assert [layer.gradient_checkpointing for layer in decoder.layers] == wanted
        found[layers] = losses, [p.detach().clone() for p in trainer.model.parameters()]
    losses, weights = found.pop(None)
    assert len(set(losses)) == 3
    for theirs in found.values():
        assert theirs[0] == losses
        assert all(torch.equal(a, b) for a, b in zip(theirs[1], weights, strict=True))


def test_another_number_of_layers_is_taken_at_a_resume(tiny_llama, small_tokenizer, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of("packed", tiny_llama, small_tokenizer, tmp_path, 1, **saving)
    expected = history(whole)
    again = trainer_of("packed", tiny_llama, small_tokenizer, tmp_path, None, **saving)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "resumed with")
        again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == expected
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_is_said(tiny_llama, small_tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="layers=3: expected at most 2, the layers of Llama"):
        trainer_of("packed", tiny_llama, small_tokenizer, tmp_path, 3)
    options = {"output_dir": str(tmp_path), "gradient_checkpointing_layers": 1, "use_cpu": True}
    with pytest.raises(ValueError, match="layers=1: expected no every_n_layers in"):
        TRConfig(**options, gradient_checkpointing_kwargs={"every_n_layers": 2})
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="layers=1 has no effect: gradient_checkpointing is False"):
        TRConfig(**options, gradient_checkpointing=False)
    # where nothing is checkpointed there is nothing to count
    trainer_of("packed", tiny_llama, small_tokenizer, tmp_path, "none",
               gradient_checkpointing_layers=3)  # fmt: skip


def test_a_run_out_of_memory_checkpoints_all_layers_first(tiny_llama, small_tokenizer, tmp_path):
    trainer = trainer_of("packed", tiny_llama, small_tokenizer, tmp_path, 1)
    trainer.largest_batch = 64
    assert "tralign-fast plan: --gradient_checkpointing_layers 2; " in _advice(trainer)
    trainer.args.gradient_checkpointing_layers = None
    assert "gradient_checkpointing" not in _advice(trainer)
