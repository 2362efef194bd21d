"""What the trainer makes of rows: TRL's losses of odd rows, batches of one, streams, splits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from transformers import TrainerCallback

from tests.conftest import words
from tests.training.test_trl_parity import history, kto_rows, options, pair_rows, run_both
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data import overlap
from tralign_fast.data.sampling import EpochLengthSampler


def train(model, tokenizer, tmp_path, rows, held_out=None, **extra):
    extra = {"reference": "resident", **extra}
    return TRTrainer(
        model,
        args=TRConfig(**options(tmp_path, **extra)),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


def stream_of(rows):
    rows = list(rows)
    return IterableDataset.from_generator(lambda: iter(rows))


def with_empty_prompts(every):
    g = torch.Generator().manual_seed(5)
    rows = list(pair_rows())
    for i in range(0, len(rows), every):
        rows[i] = {**rows[i], "prompt": ""}
    for i in range(1, len(rows), every):  # one token and EOS, or one token alone
        rows[i] = {**rows[i], "chosen": "a", "rejected": words(1, g)[:1].replace("a", "b")}
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("method", "layout"), [("dpo", {}), ("ipo", {}), ("dpo", {"packing": False})]
)
def test_empty_prompts_have_trls_losses(method, layout, tiny_llama, small_tokenizer, tmp_path):
    rows = with_empty_prompts(4)  # at the head of every batch
    assert small_tokenizer("")["input_ids"] == []
    theirs, mine = run_both(method, tiny_llama, small_tokenizer, tmp_path, rows, ours=layout)
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


def test_empty_prompts_of_kto_have_trls_losses(tiny_llama, small_tokenizer, tmp_path):
    rows = kto_rows().map(lambda row, i: {"prompt": row["prompt"] * (i % 4 > 0)}, with_indices=True)
    theirs, mine = run_both("kto", tiny_llama, small_tokenizer, tmp_path, rows)
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


@pytest.mark.parametrize(("streaming", "budget"), [(False, 40), (True, None)])
def test_kto_learns_from_batches_of_one(streaming, budget, tiny_llama, small_tokenizer, tmp_path):
    rows = stream_of(kto_rows()) if streaming else kto_rows()
    extra = {"loss_type": "kto", "per_device_train_batch_size": 1, "token_budget": budget}
    losses = history(train(tiny_llama, small_tokenizer, tmp_path, rows, **extra))
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # the policy is the reference
    assert all(abs(loss - 0.5) > 1e-4 for loss in losses[1:])


def test_a_last_batch_of_one_has_a_loss_of_its_own(tiny_llama, small_tokenizer, tmp_path):
    extra = {"loss_type": "kto", "per_device_eval_batch_size": 4, "num_train_epochs": 1}
    held_out = kto_rows(5)
    trainer = train(tiny_llama, small_tokenizer, tmp_path, kto_rows(), held_out, **extra)
    trainer.train()
    last = trainer.data_collator(list(trainer.eval_dataset)[4:])
    assert last.targets[last.grad_tokens :].tolist() != last.targets[: last.grad_tokens].tolist()
    alone = trainer.evaluate(kto_rows(5).select([4, 3]))
    assert abs(alone["eval_loss"] - 0.5) > 1e-3


def test_resumed_batches_of_one_borrow_the_same(tiny_llama, small_tokenizer, tmp_path):
    import copy

    extra = {
        "loss_type": "kto", "per_device_train_batch_size": 1, "train_sampling_strategy": "random",
        "save_strategy": "steps", "save_steps": 3, "ref_model_sync_steps": 2,
        "num_train_epochs": 2, "max_steps": 10,
    }  # fmt: skip
    model = copy.deepcopy(tiny_llama)
    expected = history(train(tiny_llama, small_tokenizer, tmp_path, kto_rows(7), **extra))
    resumed = train(model, small_tokenizer, tmp_path, kto_rows(7), **extra)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    losses = [log["loss"] for log in resumed.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_a_kto_set_of_one_label_evaluates(label, tiny_llama, small_tokenizer, tmp_path):
    held_out = kto_rows(6).map(lambda row: {"label": label})
    # a key of the name that training has too
    trainer = train(
        tiny_llama, small_tokenizer, tmp_path, kto_rows(), {"train": held_out}, loss_type="kto"
    )
    metrics = trainer.evaluate()
    assert metrics["eval_train_loss"] == pytest.approx(0.5, abs=1e-6)
    other = "rejected" if label else "chosen"
    assert f"eval_train_rewards/{other}" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    with pytest.raises(ValueError, match=f"train: every label is {label}; expected both"):
        train(tiny_llama, small_tokenizer, tmp_path, held_out, loss_type="kto")


def test_a_streamed_evaluation_set_beside_a_table(tiny_llama, small_tokenizer, tmp_path):
    rows, held_out = pair_rows(), pair_rows(7)
    extra = {"per_device_eval_batch_size": 4}
    trainer = train(tiny_llama, small_tokenizer, tmp_path, rows, held_out, **extra)
    expected = trainer.evaluate()
    for given in (stream_of(held_out), {"a": stream_of(held_out), "b": held_out}):
        streamed = train(tiny_llama, small_tokenizer, tmp_path, rows, given, **extra)
        metrics = streamed.evaluate()
        for prefix in ["eval"] if not isinstance(given, dict) else ["eval_a", "eval_b"]:
            for key in ("loss", "rewards/accuracies", "logps/chosen"):
                assert metrics[f"{prefix}_{key}"] == pytest.approx(expected[f"eval_{key}"])
    metrics = trainer.evaluate(stream_of(held_out))
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"])


def test_a_streamed_evaluation_inside_a_window(tiny_llama, small_tokenizer, tmp_path):
    extra = {
        "reference": "snapshot", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4,
        "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    held_out = stream_of(pair_rows(6))
    trainer = train(tiny_llama, small_tokenizer, tmp_path, pair_rows(), held_out, **extra)
    assert len(history(trainer, "eval_loss")) == 4


def test_predict_takes_rows(tiny_llama, small_tokenizer, tmp_path):
    trainer = train(tiny_llama, small_tokenizer, tmp_path, pair_rows())
    held_out = pair_rows(6)
    expected = trainer.evaluate(held_out)
    for rows in (held_out, stream_of(held_out), DatasetDict(test=held_out)):
        output = trainer.predict(rows)
        assert output.metrics["test_loss"] == pytest.approx(expected["eval_loss"])
        assert output.metrics["test_logps/chosen"] == pytest.approx(expected["eval_logps/chosen"])
    with pytest.raises(ValueError, match="test: got a DatasetDict of a, b; expected one dataset"):
        trainer.predict(DatasetDict(a=held_out, b=held_out))


def test_a_dict_of_splits_to_train_on(tiny_llama, small_tokenizer, tmp_path):
    one = DatasetDict(train=pair_rows())
    trainer = train(tiny_llama, small_tokenizer, tmp_path, one)
    assert len(trainer.train_dataset) == len(pair_rows())
    two = DatasetDict(train=pair_rows(), test=pair_rows(4))
    with pytest.raises(ValueError, match=r"DatasetDict of train, test; .* e.g. dataset\['train'\]"):
        train(tiny_llama, small_tokenizer, tmp_path, two)
    with pytest.raises(ValueError, match="train: got a DatasetDict of nothing"):
        train(tiny_llama, small_tokenizer, tmp_path, DatasetDict())
    split = train(tiny_llama, small_tokenizer, tmp_path, pair_rows(), two)
    assert {"eval_train_loss", "eval_test_loss"} <= split.evaluate().keys()


@pytest.mark.parametrize(("method", "column"), [("dpo", "length"), ("kto", "tokens")])
def test_rows_of_like_length_share_batches(method, column, tiny_llama, small_tokenizer, tmp_path):
    rows = kto_rows(32) if method == "kto" else pair_rows(32)
    extra = {
        "loss_type": method, "train_sampling_strategy": "group_by_length",
        "length_column_name": column, "max_steps": -1, "num_train_epochs": 2,
        # a window over the end of an epoch: what is read ahead is what is trained on
        "reference": "snapshot", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 5,
        "eval_strategy": "epoch",
    }  # fmt: skip
    trainer = train(tiny_llama, small_tokenizer, tmp_path, rows, rows.select(range(5)), **extra)
    losses = history(trainer)
    assert len(losses) == 16
    assert all(math.isfinite(loss) for loss in losses)


def test_an_epoch_knows_its_order_of_lengths():
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = torch.randint(1, 99, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = EpochLengthSampler(LengthGroupedSampler(4, lengths=lengths), seed=7)
    seen = {}
    for epoch in (0, 1, 0, 1):
        sampler.set_epoch(epoch)
        torch.rand(3)
        assert seen.setdefault(epoch, list(sampler)) == list(sampler)
        theirs = LengthGroupedSampler(
            4, lengths=lengths, generator=torch.Generator().manual_seed(7 + epoch)
        )
        assert list(theirs) == seen[epoch]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("steps", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_rows_that_make_no_batch_are_refused(steps, tiny_llama, small_tokenizer, tmp_path):
    extra = {"dataloader_drop_last": True, "per_device_train_batch_size": 8, **steps}
    trainer = train(tiny_llama, small_tokenizer, tmp_path, pair_rows(7), **extra)
    with pytest.raises(ValueError, match="no whole batch of per_device_train_batch_size=8 for"):
        trainer.train()
    trainer = train(tiny_llama, small_tokenizer, tmp_path / "more", pair_rows(8), **extra)
    trainer.train()
    assert trainer.state.global_step == abs(steps["max_steps"])


@pytest.mark.parametrize(("count", "passes"), [(7, 3), (4, 2), (0, 1)])
def test_a_stream_without_rows_for_a_step_is_refused(
    count, passes, tiny_llama, small_tokenizer, tmp_path
):
    """transformers reads one that ends inside of a step for ever."""
    extra = {"max_steps": 2, "gradient_accumulation_steps": passes, "on_bad_rows": "drop"}
    rows = [{"prompt": "the", "chosen": " cat", "rejected": " cat"}, *pair_rows(count or 1)]
    rows = stream_of(rows if count else rows[:1])
    trainer = train(tiny_llama, small_tokenizer, tmp_path, rows, **extra)
    expected = (
        f"a step takes {passes} batches, and the streamed dataset has {passes - 1}"
        if count
        else "a pass over the stream has fewer batches than a step takes"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train()


class StopBefore(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_stream_that_somebody_stops_is_not_refused(tiny_llama, small_tokenizer, tmp_path):
    trainer = train(tiny_llama, small_tokenizer, tmp_path, stream_of(pair_rows(8)), max_steps=2)
    trainer.add_callback(StopBefore())
    trainer.train()
    assert trainer.state.global_step == 0


def test_held_out_rows_that_are_trained_on_are_counted(tiny_llama, small_tokenizer, tmp_path):
    """By their tokens, in each of several datasets, and labels do not count."""
    rows = pair_rows(40)
    sets = {
        "new": rows.select(range(20, 30)),
        "some": rows.select([25, 3, 4, 3]).remove_columns("prompt").map(
            lambda row, i: {"prompt": rows[[25, 3, 4, 3][i]]["prompt"]}, with_indices=True
        ),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="trained on") as caught:
        trainer = train(tiny_llama, small_tokenizer, tmp_path, rows.select(range(20)), sets)
    said = [str(w.message) for w in caught if "trained on" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("some: 3 of 4 rows are trained on, too")
    kto = kto_rows(24)
    other = kto.map(lambda row: {"label": not row["label"]}).select(range(14, 24))
    kto = kto.select(range(16))
    with pytest.warns(UserWarning, match="trained on") as caught:
        train(tiny_llama, small_tokenizer, tmp_path, kto, other, loss_type="kto")
    said = [str(w.message) for w in caught if "trained on" in str(w.message)]
    assert [message.split(" rows")[0] for message in said] == ["eval: 2 of 10"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trained on")
        # what is asked for by hand is no news
        trainer.evaluate(rows.select(range(2)))
        train(tiny_llama, small_tokenizer, tmp_path, stream_of(rows), rows)
        train(tiny_llama, small_tokenizer, tmp_path, None, rows)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_shared_rows_are_those_of_the_same_tokens(block, monkeypatch):
    monkeypatch.setattr(overlap, "_BLOCK", block)
    g = torch.Generator().manual_seed(0)

    def ids():
        return torch.randint(0, 2, (int(torch.randint(0, 3, (), generator=g)),), generator=g)

    def made(count):
        names = ("prompt_ids", "completion_ids")
        table = [{name: ids().tolist() for name in names} for _ in range(count)]
        return table, Dataset.from_list(table, Features(dict.fromkeys(names, List(Value("int32")))))

    (rows, trained), (others, held_out) = made(20), made(30)  # of 49 that may be
    shared = [row in rows for row in others]
    assert 5 < sum(shared) < 25
    assert overlap.count_shared(trained, held_out) == sum(shared)
    order = [3, 3, 0, 8, *range(29, 8, -2)]
    assert overlap.count_shared(trained, held_out.select(order)) == sum(shared[i] for i in order)
    assert overlap.count_shared(trained.select([]), held_out) == 0


@pytest.mark.parametrize("place", ["resident", "snapshot"])
def test_batches_of_another_collator_are_refused(place, tiny_llama, small_tokenizer, tmp_path):
    trainer = TRTrainer(
        tiny_llama, args=TRConfig(**options(tmp_path, reference=place, ref_model_mixup_alpha=1.0)),
        train_dataset=pair_rows(8), processing_class=small_tokenizer,
        data_collator=lambda rows: {"rows": rows},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"data_collator: expected .*PackedBatch, got a dict"):
        trainer.train()


def test_datasets_that_are_set_later_are_refused(tiny_llama, small_tokenizer, tmp_path):
    trainer = train(tiny_llama, small_tokenizer, tmp_path, pair_rows(8), pair_rows(4))
    trainer.train_dataset = trainer.eval_dataset = pair_rows(8)
    for use in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="rows with the columns prompt, chosen, rejected are"):
            use()


@pytest.mark.parametrize("place", ["resident", "snapshot"])
def test_a_window_of_rows_that_make_no_batch_is_refused(
    place, tiny_llama, small_tokenizer, tmp_path
):
    """A window would look for its first batch for ever."""
    extra = {"dataloader_drop_last": True, "reference": place, "ref_model_mixup_alpha": 1.0}
    trainer = train(tiny_llama, small_tokenizer, tmp_path, pair_rows(3), **extra)
    with pytest.raises(ValueError, match="no whole batch of per_device_train_batch_size="):
        trainer.train()
