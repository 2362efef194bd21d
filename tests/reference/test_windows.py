"""Snapshot and offloaded references against a resident one: the same losses at every step."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tiny_llama
from tests.diagonal import diagonal
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, kto_rows, pair_rows
from tralign_fast.ops.backend import warn_once

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


@pytest.mark.parametrize(
    ("place", "method", "accumulation"), diagonal(2, WINDOWED, ["dpo", "ipo", "kto"], [1, 2])
)
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


def test_short_batches_fill_a_forward_of_their_windows_tokens(
    tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    """As on a GPU, up to four times the longest so far; the same scores."""
    from tralign_fast.reference import window
    from tralign_fast.training.config import TRConfig

    def ids(row, size):
        return [5 + (row * 7 + i * 3) % 60 for i in range(size)]

    sizes = [20, 20, 2, 2, 3, 3, 20, 2, 2, 2, 2, 3]
    rows = Dataset.from_list(
        [
            {"prompt_ids": ids(i, n), "chosen_ids": ids(i + 1, n), "rejected_ids": ids(i + 2, n)}
            for i, n in enumerate(sizes)
        ]
    )
    seen, real = [], window.sequence_logps

    def counted(model, batch):
        seen.append(batch.num_tokens)
        return real(model, batch)

    monkeypatch.setattr(window, "sequence_logps", counted)
    scores = []
    for merged in (4, 1):
        with monkeypatch.context() as patch:
            patch.setattr(TRConfig, "merged_batches", merged)
            trainer = make(
                tiny_llama, small_tokenizer, tmp_path / str(merged), rows=rows,
                reference="snapshot", max_steps=12, per_device_train_batch_size=1,
                train_sampling_strategy="sequential", sync_ref_model=False, learning_rate=0.0,
            )  # fmt: skip
            trainer.train()
        scores.append(trainer.reference._scores)
        largest = 3 * max(sizes)
        if merged == 4:
            assert seen == [3 * sum(sizes[:11]), 3 * sum(sizes[11:])]
            assert max(seen) <= 4 * largest
            seen.clear()
    assert len(seen) == len(sizes)
    assert scores[0].keys() == scores[1].keys()
    for key, value in scores[0].items():
        torch.testing.assert_close(value, scores[1][key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", WINDOWED)
def test_a_sweep_drops_nothing_out_and_training_does(place, small_tokenizer, tmp_path, monkeypatch):
    from tralign_fast.reference import window

    modes, real = [], window.sequence_logps

    def watched(model, batch):
        modes.append({module.training for module in model.modules()})
        return real(model, batch)

    monkeypatch.setattr(window, "sequence_logps", watched)
    model = make_tiny_llama(small_tokenizer, attention_dropout=0.5)
    trainer = make(
        model, small_tokenizer, tmp_path, reference=place, max_steps=4, disable_dropout=False,
        **WINDOWED[place],
    )  # fmt: skip
    trainer.train()
    assert modes
    assert all(mode == {False} for mode in modes)
    assert all(module.training for module in trainer.model.modules())


def test_a_batch_that_comes_again_in_a_window_is_scored_once(
    tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    """A frozen reference over three epochs of four batches in one order."""
    from tralign_fast.reference import window

    seen, real = [], window.sequence_logps

    def counted(model, batch):
        seen.append(batch.rows)
        return real(model, batch)

    monkeypatch.setattr(window, "sequence_logps", counted)
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, rows=pair_rows(16), reference="snapshot",
        max_steps=12, sync_ref_model=False, precompute_ref_batch_size=1,
    )  # fmt: skip
    trainer.train()
    assert seen == [tuple(range(i, i + 4)) for i in range(0, 16, 4)]


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


@pytest.mark.parametrize("held_out", ["one", "several", "none"])
@pytest.mark.parametrize("greater", [False, True])  # one of the two takes an earlier model
def test_evaluation_after_the_best_model_was_loaded(
    greater, held_out, tiny_llama, small_tokenizer, tmp_path
):
    """The run ends on an update: the policy of its end is the reference, the best one is not."""
    sets = {"one": pair_rows(6), "several": {"a": pair_rows(6), "b": pair_rows(3)}, "none": None}
    evaluates = held_out != "none"
    extra = {
        "max_steps": 6, "learning_rate": 2e-2, "held_out": sets[held_out],
        "save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": evaluates,
        "eval_strategy": "steps" if evaluates else "no", "eval_steps": 3,
        "greater_is_better": greater, **WINDOWED["snapshot"],
        "metric_for_best_model": "eval_a_loss" if held_out == "several" else "eval_loss",
    }  # fmt: skip
    after = {}
    for name in ("resident", "snapshot"):
        trainer = make(tiny_llama, small_tokenizer, tmp_path / name, reference=name, **extra)
        trainer.train()
        if not evaluates:  # by hand, as load_best_model_at_end does it
            trainer.state.best_model_checkpoint = str(tmp_path / name / "checkpoint-3")
            trainer._load_best_model()
            if name == "snapshot":
                with pytest.raises(ValueError, match=r"was not scored when"):
                    trainer.evaluate(pair_rows(4))
            continue
        found = trainer.evaluate()
        after[name] = {k: v for k, v in found.items() if k.endswith(("loss", "margins", "chosen"))}
        assert len(after[name]) >= 3
    if evaluates:
        assert after["snapshot"] == pytest.approx(after["resident"], rel=1e-5)
    if trainer.state.best_model_checkpoint.endswith("-3") and evaluates:
        assert abs(next(iter(after["snapshot"].values())) - math.log(2)) > 1e-4


@pytest.mark.parametrize("place", WINDOWED)
def test_a_share_of_the_run_is_the_steps_that_it_has(place, tiny_llama, small_tokenizer, tmp_path):
    """τ = 0.25 of 12 steps, rounded up."""
    extra = {"max_steps": 12, "reference": place, "save_strategy": "steps", "save_steps": 5}
    share = {**WINDOWED[place], "ref_model_sync_steps": 0.24}
    losses = []
    for folder, schedule in (("steps", WINDOWED[place]), ("share", share)):
        trainer = make(tiny_llama, small_tokenizer, tmp_path / folder, **extra, **schedule)
        losses.append(history(trainer))
        assert trainer.reference.schedule.every == 3
    assert losses[1] == losses[0]
    checkpoint = str(tmp_path / "share" / "checkpoint-5")
    for steps in (24, 12):
        again = make(
            tiny_llama, small_tokenizer, tmp_path / "share",
            **{**extra, "max_steps": steps}, **share,
        )  # fmt: skip
        if steps == 24:
            with pytest.raises(ValueError, match=r"moved every 3 steps, this run of 24 .*every 6"):
                again.train(resume_from_checkpoint=checkpoint)
            continue
        again.train(resume_from_checkpoint=checkpoint)
        assert [log["loss"] for log in again.state.log_history if "loss" in log] == losses[0]


@pytest.mark.parametrize(("every", "warns"), [(512, True), (4, True), (3, False), (0, False)])
def test_a_reference_that_never_moves_is_said(every, warns, tiny_llama, small_tokenizer, tmp_path):
    extra = {"ref_model_sync_steps": every} if every else {"sync_ref_model": False}
    warn_once.cache_clear()
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=4, **extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "the reference never moves" in str(w.message)]
    assert len(said) == warns
    assert not warns or f"the run has 4 steps and every is {every}" in said[0]


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


class Averaging(torch.optim.SGD):
    """Shows other weights to evaluations than it trains, as schedule-free optimizers do."""

    shown = 1.0

    def _scale(self, to):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(to / self.shown)
        self.shown = to

    def eval(self):
        self._scale(1.25)

    def train(self):
        self._scale(1.0)


def test_an_evaluation_changes_no_loss_of_an_optimizer_that_averages(
    tiny_llama, small_tokenizer, tmp_path
):
    def losses(folder, **extra):
        hard = {"reference": "snapshot", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
        held_out = pair_rows(4) if extra else None
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / folder, held_out=held_out, **hard, **extra
        )
        trainer.optimizer = Averaging(trainer.model.parameters(), lr=0.05)
        return history(trainer)

    evaluating = {"eval_strategy": "steps", "eval_steps": 2}
    assert losses("with", **evaluating) == pytest.approx(losses("without"), abs=1e-5)


def test_a_smaller_batch_is_found_by_a_run_without_reference_weights(
    tiny_llama, small_tokenizer, tmp_path
):
    hard = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2, "max_steps": 4}
    small = make(
        tiny_llama, small_tokenizer, tmp_path / "small", reference="snapshot",
        per_device_train_batch_size=7, **hard,
    )  # fmt: skip
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path / "found", reference="snapshot",
        per_device_train_batch_size=8, auto_find_batch_size=True, **hard,
    )  # fmt: skip
    step, failed = trainer.training_step, []

    def training_step(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    assert history(trainer) == pytest.approx(history(small), abs=1e-6)
