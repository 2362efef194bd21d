"""Runs that go on: longer ones, in another layout, and a second `train` of a trainer."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.training.test_checkpoints import HARD, PLACES, SAVING, losses_of
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, pair_rows
from tralign_fast.training.manifest import check_manifest

pytestmark = pytest.mark.filterwarnings("ignore:moved aside", "ignore:resumed with another")


@pytest.mark.parametrize("place", PLACES)
def test_a_longer_run_goes_on_to_the_losses_of_one_that_was_as_long(
    place, tiny_llama, small_tokenizer, tmp_path
):
    """The first one's last window ended inside an epoch and was cut short by its end."""
    extra = {**SAVING, **PLACES[place], "train_sampling_strategy": "random"}
    expected = history(
        make(tiny_llama, small_tokenizer, tmp_path / "whole", **{**extra, "max_steps": 11})
    )
    history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    done = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    done.train(resume_from_checkpoint=True)  # nothing is left to do
    assert done.state.global_step == 6
    assert losses_of(done) == pytest.approx(expected[:6], rel=1e-6)
    for step in (4, 6):
        again = make(tiny_llama, small_tokenizer, tmp_path, **{**extra, "max_steps": step + 5})
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(again) == pytest.approx(expected[: step + 5], rel=1e-6)
        if step == 4:  # its branch goes, the first one's comes back
            shutil.move(tmp_path / "previous-1" / "checkpoint-6", tmp_path / "other")
            shutil.rmtree(tmp_path / "checkpoint-6")
            shutil.move(tmp_path / "other", tmp_path / "checkpoint-6")


@pytest.mark.parametrize(
    "layout", [{"pad_to_multiple_of": 8}, {"prefix_sharing": False}, {"packing": False}]
)
def test_a_window_goes_on_in_another_layout(layout, tiny_llama, small_tokenizer, tmp_path):
    """What was scored is known again: no number changes but by rounding."""
    extra = {**SAVING, **PLACES["frozen"]}
    expected = history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    again = make(tiny_llama, small_tokenizer, tmp_path, **extra, **layout)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("extra", [{}, {"save_strategy": "no"}], ids=["saving", "not"])
def test_a_second_train_goes_on_from_the_model_and_the_reference(extra, small_tokenizer, tmp_path):
    runs = {}
    model = make_tiny_llama(small_tokenizer)
    for place in ("resident", "snapshot", "offloaded"):
        schedule = HARD  # the same for all: 6 steps end in mid-window
        trainer = make(
            model, small_tokenizer, tmp_path / place, **{**SAVING, **schedule, **extra},
            reference=place,
        )  # fmt: skip
        first = history(trainer)
        runs[place] = first, history(trainer)
        assert trainer.state.global_step == 6
        assert (tmp_path / place / "previous-1").exists() == (not extra)
    assert runs["resident"][0] != runs["resident"][1]
    for place in ("snapshot", "offloaded"):
        for mine, theirs in zip(runs[place], runs["resident"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def test_another_runs_kept_weights_are_not_written_over(tiny_llama, small_tokenizer, tmp_path):
    """Its checkpoints hold the file by a hard link."""
    extra = {**SAVING, "max_steps": 2, **PLACES["frozen"]}
    history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.mul_(1.1)
    history(make(tiny_llama, small_tokenizer, tmp_path, **extra, overwrite_output_dir=True))
    old = check_manifest(tmp_path / "previous-1" / "checkpoint-2")
    new = check_manifest(tmp_path / "checkpoint-2")
    name = "reference/window-start.safetensors"
    assert old["files"][name] != new["files"][name]


def test_a_second_train_with_gradient_release(tiny_llama, small_tokenizer, tmp_path):
    losses = []
    options: list[dict[str, Any]] = [{"gradient_release": True}, {}]
    for extra in options:
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path, max_steps=2, max_grad_norm=0.0, **extra
        )
        losses.append([history(trainer), history(trainer)])
    assert losses[0][1] == pytest.approx(losses[1][1], rel=2e-6)


@pytest.mark.parametrize("place", ["resident", "snapshot"])
def test_logs_evaluations_and_checkpoints_come_as_the_run_asks_that_goes_on(
    place, tiny_llama, small_tokenizer, tmp_path, recwarn
):
    hard = {
        "reference": place, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4,
        "save_strategy": "steps",
    }  # fmt: skip
    begun = {**hard, "max_steps": 8, "logging_steps": 4, "save_steps": 2}
    make(tiny_llama, small_tokenizer, tmp_path, **begun).train()
    own = {**hard, "logging_steps": 1, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, held_out=pair_rows(4), **own)
    trainer.train(str(tmp_path / "checkpoint-2"))
    logs = trainer.state.log_history
    assert [log["step"] for log in logs if "loss" in log] == [3, 4, 5, 6, 7, 8]
    # a window without weights has scored up to step 4 what the first run was to evaluate: nothing
    evaluated = [log["step"] for log in logs if "eval_loss" in log]
    assert evaluated == ([3, 6, 8] if place == "resident" else [6, 8])
    assert (tmp_path / "checkpoint-6").is_dir()
    assert not (tmp_path / "checkpoint-4").is_dir()
    said = any("eval_steps=3: up to step 4 the reference" in str(w.message) for w in recwarn)
    assert said == (place == "snapshot")
