"""An out-of-memory error says what takes less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.test_trl_parity import options, pair_rows
from tralign_fast import TRConfig, TRTrainer

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    ("lora", "changed", "named"),
    [
        (False, {}, "--gradient_checkpointing true; --gradient_release true"),
        (False, {"reference": "resident", "gradient_checkpointing": True}, "--reference auto"),
        (True, {"gradient_checkpointing": True}, "--lora_rank 4 --base_bits 4"),
    ],
)
@pytest.mark.parametrize("place", ["step", "sweep"])
def test_a_run_says_what_takes_less(
    lora, changed, named, place, tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    model: Any = tiny_llama
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trainer = TRTrainer(
        model, args=TRConfig(**options(tmp_path, **{"max_steps": 3, **changed})),
        train_dataset=pair_rows(8), processing_class=small_tokenizer,
    )  # fmt: skip

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError(FULL)

    if place == "step":
        monkeypatch.setattr(trainer, "compute_loss", fails)
    else:
        monkeypatch.setattr(trainer, "get_batch_samples", fails)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    own, advice = str(caught.value).split("\n")
    assert own == FULL
    assert "4 rows of " in advice
    assert f"tralign-fast plan: {named}" in advice


def test_a_smaller_batch_is_found_all_the_same(tiny_llama, small_tokenizer, tmp_path, monkeypatch):
    """`auto_find_batch_size` tries again where the words are those of torch."""
    args = TRConfig(**options(tmp_path, max_steps=2, auto_find_batch_size=True))
    trainer = TRTrainer(
        tiny_llama, args=args, train_dataset=pair_rows(8), processing_class=small_tokenizer
    )
    compute, sizes = trainer.compute_loss, []

    def fails(model, inputs, *rest, **kwargs):
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError(FULL)
        return compute(model, inputs, *rest, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", fails)
    trainer.train()
    assert max(sizes) == 4
    assert sizes[-1] <= 2
