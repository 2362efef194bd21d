"""Models that transformers saves under other names than their own: resumed, and the best one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from tests.training.test_load_balance import make_moe
from tests.training.test_processing import llava, qwen
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import TRConfig, TRTrainer

MODELS = {
    "Mixtral": lambda tokenizer: make_moe(tokenizer, "Mixtral"),
    "Qwen3-MoE": lambda tokenizer: make_moe(tokenizer, "Qwen3-MoE"),
    "LLaVA": llava,
    "Qwen2.5-VL": qwen,
}


def trainer_of(model, tokenizer, folder, **extra):
    args = TRConfig(
        **options(folder, max_steps=4, **{"save_strategy": "steps", "save_steps": 2, **extra})
    )
    rows = pair_rows(16)
    return TRTrainer(
        model, args=args, train_dataset=rows, eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_resume_goes_on_with_all_weights(name, small_tokenizer, tmp_path):
    model = MODELS[name](small_tokenizer)
    losses = history(trainer_of(copy.deepcopy(model), small_tokenizer, tmp_path))
    resumed = trainer_of(model, small_tokenizer, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = [log["loss"] for log in resumed.state.log_history if "loss" in log]
    assert again == pytest.approx(losses, rel=0, abs=1e-6)


def test_the_best_model_has_all_of_its_weights(small_tokenizer, tmp_path):
    seen = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            assert model is not None
            seen[state.global_step] = copy.deepcopy(model.state_dict())

    trainer = trainer_of(
        make_moe(small_tokenizer), small_tokenizer, tmp_path, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="num_tokens", greater_is_better=False,
    )  # fmt: skip
    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 2
    for key, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, seen[2][key]), key
    assert not torch.equal(seen[2]["model.layers.0.mlp.experts.down_proj"],
                           seen[4]["model.layers.0.mlp.experts.down_proj"])  # fmt: skip


def test_weights_that_a_checkpoint_has_not_are_named(tiny_llama, small_tokenizer, tmp_path):
    trainer = trainer_of(tiny_llama, small_tokenizer, tmp_path)
    short = copy.deepcopy(tiny_llama)
    del short.model.layers[1]
    short.save_pretrained(tmp_path / "short")
    trainer.state.best_model_checkpoint = str(tmp_path / "short")
    with pytest.raises(ValueError, match=r"short has no weights for 9 .*, model\.layers\.1\."):
        trainer._load_best_model()
