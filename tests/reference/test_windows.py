"""Snapshot and offloaded references against a resident one: the same losses at every step."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, kto_rows, pair_rows

ROOT = Path(__file__).parents[2]
STEPS = 12
WINDOWED = {
    "snapshot": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3},
    "offloaded": {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 3},
}


def two_epochs(method, accumulation):
    """Rows and options such that 12 steps are two epochs, windows straddle their border, and the
    last step of an epoch has fewer batches with accumulation 2."""
    rows = (kto_rows if method == "kto" else pair_rows)(11 * accumulation + 11)
    return rows, {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "random",
        "learning_rate": 2e-3,
        "precompute_ref_batch_size": 6,  # three batches' (the forwards are counted below)
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("place", WINDOWED)
def test_losses_equal_those_of_a_resident_reference(
    place, method, accumulation, tiny_llama, small_tokenizer, tmp_path
):
    rows, extra = two_epochs(method, accumulation)
    extra |= WINDOWED[place]
    runs = {}
    for name in ("resident", place):
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / name, method, rows, reference=name, **extra
        )
        assert trainer.reference.name == name
        runs[name] = history(trainer)
        assert trainer.state.epoch > 1
    assert len(runs[place]) == STEPS
    assert runs[place] == pytest.approx(runs["resident"], rel=1e-5)
    assert len(set(runs[place])) > 4


@pytest.mark.parametrize(
    ("batch_size", "forwards"),
    [(6, [3, 3, 3, 3]), (4, [2, 1] * 4), (2, [1] * STEPS), (None, [1] * STEPS)],
)
def test_batches_of_a_window_are_scored_as_one(
    batch_size, forwards, tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    """Four windows of three batches of two pairs each: what a forward of the sweep holds."""
    from tralign_fast.reference import window

    seen, real = [], window.sequence_logps

    def counted(model, batch):
        seen.append(len(batch.rows))
        return real(model, batch)

    monkeypatch.setattr(window, "sequence_logps", counted)
    rows, extra = two_epochs("dpo", 1)
    extra |= {"precompute_ref_batch_size": batch_size, "reference": "snapshot"}
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, rows=rows, **extra, **WINDOWED["snapshot"]
    )
    losses = history(trainer)
    assert [pairs // 2 for pairs in seen] == forwards
    extra |= {"reference": "resident", **WINDOWED["snapshot"]}
    resident = make(tiny_llama, small_tokenizer, tmp_path / "resident", rows=rows, **extra)
    assert losses == pytest.approx(history(resident), rel=1e-5)


@pytest.mark.parametrize("place", WINDOWED)
def test_evaluation_inside_a_window_uses_its_reference(
    place, tiny_llama, small_tokenizer, tmp_path
):
    extra = {
        "max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "log_kl_initial": True,
        "held_out": {"a": pair_rows(6), "b": pair_rows(3)}, **WINDOWED[place],
    }  # fmt: skip
    logs = {}
    for name in ("resident", place):
        trainer = make(tiny_llama, small_tokenizer, tmp_path / name, reference=name, **extra)
        before = trainer.evaluate()  # the policy is the reference
        trainer.train()
        after = trainer.evaluate()  # in mid-window, after the last step
        logs[name] = [before, *trainer.state.log_history, after]
    for mine, theirs in zip(logs[place], logs["resident"], strict=True):
        for key in (k for k in theirs if k.startswith("eval_") and "_per_second" not in k):
            if "runtime" not in key:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("place", WINDOWED)
def test_a_streamed_dataset(place, tiny_llama, small_tokenizer, tmp_path):
    runs = []
    for name in ("resident", place):
        stream = pair_rows(16).to_iterable_dataset().shuffle(seed=1, buffer_size=4)
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / name, rows=stream, reference=name,
            **{"max_steps": 7, **WINDOWED[place]},
        )  # fmt: skip
        runs.append(history(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_a_window_longer_than_an_epoch_of_a_stream_is_refused(
    tiny_llama, small_tokenizer, tmp_path
):
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, rows=pair_rows(8).to_iterable_dataset(),
        reference="snapshot", max_steps=20, ref_model_mixup_alpha=1.0, ref_model_sync_steps=20,
    )  # fmt: skip
    with pytest.raises(ValueError, match="ref_model_sync_steps=20: the window is longer than"):
        trainer.train()


@pytest.mark.parametrize("place", WINDOWED)
def test_resume_in_mid_window(place, tiny_llama, small_tokenizer, tmp_path):
    rows, extra = two_epochs("dpo", 1)
    extra |= {"save_strategy": "steps", "save_steps": 4, "reference": place, **WINDOWED[place]}
    expected = history(make(tiny_llama, small_tokenizer, tmp_path, rows=rows, **extra))
    for step in (4, 8):  # both in mid-window (τ = 3), the second in the second epoch
        again = make(tiny_llama, small_tokenizer, tmp_path, rows=rows, **extra)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
        assert resumed == expected


def test_resume_with_other_data_is_refused(tiny_llama, small_tokenizer, tmp_path):
    extra = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "reference": "snapshot",
        **WINDOWED["snapshot"],
    }  # fmt: skip
    history(make(tiny_llama, small_tokenizer, tmp_path, rows=pair_rows(24), **extra))
    other = make(
        tiny_llama, small_tokenizer, tmp_path,
        rows=pair_rows(24, conversational=True), **{**extra, "max_length": 256},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"other options \(data: .*those that it was"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_batches_that_no_window_saw_are_refused(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, reference="snapshot", max_steps=2,
        **WINDOWED["snapshot"],
    )  # fmt: skip
    trainer.evaluate(pair_rows(3))  # before the first step the policy is the reference
    trainer.train()
    with pytest.raises(ValueError, match=r"was not scored when\s+its window began"):
        trainer.evaluate(pair_rows(3))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from transformers import TrainerCallback
from tests.conftest import make_small_tokenizer, make_tiny_llama
from {module} import {policy}
from tests.reference.test_windows import two_epochs
from tests.conftest import make_tiny_llama
from tests.training.test_trainer import make

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

tokenizer = make_small_tokenizer()
rows, extra = two_epochs("dpo", 1)
policy = {policy}(make_tiny_llama(tokenizer))
trainer = make(policy, tokenizer, {folder!r}, rows=rows, **{{**extra, **{options!r}}})
trainer.add_callback(Kill())
trainer.train()
"""


def check_a_killed_run(policy, tokenizer, folder, **options):
    """A process that is killed after step 6 resumes from step 4 to the losses of a whole run.

    Args:
        policy: function of a tiny Llama, which the process imports by its name.
    """
    options |= {"save_strategy": "steps", "save_steps": 2}
    code = KILLED.format(
        root=str(ROOT), module=policy.__module__, policy=policy.__name__,
        folder=str(folder / "run"), options=options,
    )  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    rows, extra = two_epochs("dpo", 1)
    extra |= options
    model = policy(make_tiny_llama(tokenizer))
    again = make(model, tokenizer, folder / "run", rows=rows, **extra)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
    whole = make(model, tokenizer, folder / "whole", rows=rows, **extra)
    assert resumed == pytest.approx(history(whole), rel=1e-6)


def itself(model):
    return model


def test_a_killed_run_resumes_to_the_same_losses(small_tokenizer, tmp_path):
    options = {"reference": "offloaded", **WINDOWED["offloaded"]}
    check_a_killed_run(itself, small_tokenizer, tmp_path, **options)


def test_no_second_set_of_weights(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, reference="snapshot", max_steps=2,
        **WINDOWED["snapshot"],
    )  # fmt: skip
    held = [v for v in vars(trainer.reference).values() if isinstance(v, torch.nn.Module)]
    assert all(model is trainer.model for model in held)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"ref_model_mixup_alpha": 1.0}, "snapshot"),
        ({"sync_ref_model": False}, "snapshot"),
        ({"ref_model_mixup_alpha": 0.6}, "offloaded"),
        ({"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1}, "resident"),
    ],
)
def test_auto_picks_the_cheapest_and_says_why(
    schedule, expected, tiny_llama, small_tokenizer, tmp_path, capsys
):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, reference="auto", **schedule)
    assert trainer.reference.name == expected
    assert f"reference: {expected} (" in capsys.readouterr().err


def test_snapshot_refuses_what_it_cannot_do(tiny_llama, small_tokenizer, tmp_path):
    import copy

    from tests.training.test_trl_parity import options
    from tralign_fast import TRConfig, TRTrainer

    with pytest.raises(ValueError, match=r"needs ref_model_mixup_alpha=1 .* got 0.6"):
        make(tiny_llama, small_tokenizer, tmp_path, reference="snapshot")
    with pytest.raises(ValueError, match="leave ref_model out"):
        TRTrainer(
            tiny_llama,
            copy.deepcopy(tiny_llama),
            TRConfig(**options(tmp_path, reference="snapshot", ref_model_mixup_alpha=1.0)),
            train_dataset=pair_rows(4),
            processing_class=small_tokenizer,
        )
