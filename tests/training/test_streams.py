"""Streamed datasets that a run goes through more than once: nobody knows their length."""

from __future__ import annotations

import json

import pytest

from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, pair_rows

HARD = {
    "ref_model_mixup_alpha": 1.0,
    "ref_model_sync_steps": 2,
    "train_sampling_strategy": "random",
}


def stream(rows=12):
    """Another order in every epoch."""
    return pair_rows(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=rows)


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("place", "accumulation"), [("resident", 1), ("snapshot", 1), ("resident", 2)]
)
def test_a_run_goes_on_in_the_epoch_where_it_was(
    place, accumulation, tiny_llama, small_tokenizer, tmp_path
):
    saving = {
        "reference": place, "max_steps": 8, "save_strategy": "steps", "save_steps": 5, **HARD,
        "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2,
    }  # fmt: skip
    rows = 6 * accumulation  # three steps an epoch
    whole = make(tiny_llama, small_tokenizer, tmp_path, rows=stream(rows), **saving)
    expected = history(whole)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, rows=stream(rows), **saving)
    trainer.train(str(tmp_path / "checkpoint-5"))
    assert losses(trainer) == expected


def test_a_window_begins_with_an_epoch(tiny_llama, small_tokenizer, tmp_path):
    longer = {**HARD, "ref_model_sync_steps": 4, "max_steps": 14}  # of three steps
    expected, found = (
        history(make(tiny_llama, small_tokenizer, tmp_path / place, rows=stream(), **options))
        for place in ("resident", "snapshot")
        for options in [{"reference": place, **longer}]
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_batches_that_make_no_step_are_left_out_and_said(
    tiny_llama, small_tokenizer, tmp_path, recwarn
):
    # five batches an epoch, of which the last one is half of a step
    still = {"learning_rate": 0.0, "max_steps": 4, "gradient_accumulation_steps": 2}
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, rows=pair_rows(20).to_iterable_dataset(), **still
    )
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "loss" in log]
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)  # the epoch's first step again
    assert losses(trainer) == pytest.approx([0.693147] * 4, abs=1e-5)
    assert any(
        "last 1 batches of the streamed dataset make no step" in str(w.message) for w in recwarn
    )


def test_a_stream_without_a_step_is_refused(tiny_llama, small_tokenizer, tmp_path):
    rows = pair_rows(4).to_iterable_dataset()
    trainer = make(tiny_llama, small_tokenizer, tmp_path, rows=rows, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="a step takes 2 batches, and the streamed dataset has 1"):
        trainer.train()
    assert json.loads((tmp_path / "run.json").read_text())["run"]
