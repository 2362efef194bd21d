"""TRTrainer on its own: schedules, checkpoints, precision, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import TrainerCallback

from tests.diagonal import diagonal
from tests.model.test_attention import build
from tests.processes import check_ended, fork
from tests.training.test_trl_parity import history, kto_rows, options, pair_rows
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.ops.backend import warn_once
from tralign_fast.training import digest as digest_module
from tralign_fast.training.digest import digest

METHODS = ["dpo", "ipo", "kto"]
SCHEDULES = {
    "frozen": {"sync_ref_model": False},
    "soft": {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1},
    "hard": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2},
    "hybrid": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2},
}


def make(model, tokenizer, output_dir, method="dpo", rows=None, held_out=None, **extra) -> Any:
    rows = rows if rows is not None else (kto_rows() if method == "kto" else pair_rows())
    config = TRConfig(**options(output_dir, loss_type=method, **{"reference": "resident", **extra}))
    return TRTrainer(
        copy.deepcopy(model),
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(("method", "schedule"), diagonal(3, METHODS, SCHEDULES))
def test_the_reference_follows_its_schedule(
    method, schedule, tiny_llama, small_tokenizer, tmp_path
):
    extra = {"max_steps": 4, **SCHEDULES[schedule]}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, method, **extra)
    start = [p.detach().clone() for p in trainer.reference.model.parameters()]
    expected = [p.clone() for p in start]
    region = trainer.args.trust_region
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if region.should_sync(state.global_step):
                thetas = kwargs["model"].parameters()
                for ref, theta in zip(expected, thetas, strict=True):
                    ref.lerp_(theta.detach(), region.alpha)
            seen.append(state.global_step)

    trainer.add_callback(Watch())
    losses = history(trainer)
    assert seen == [1, 2, 3, 4]
    assert len(losses) == 4
    for ref, truth in zip(trainer.reference.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ref.detach(), truth, rtol=1e-6, atol=1e-7)
        assert not ref.requires_grad
    moved = any(not torch.equal(a, b) for a, b in zip(start, expected, strict=True))
    assert moved == (schedule != "frozen")


@pytest.mark.parametrize("method", METHODS)
def test_resume_gives_the_losses_of_an_uninterrupted_run(
    method, tiny_llama, small_tokenizer, tmp_path
):
    extra = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ref_model_sync_steps": 2,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = make(tiny_llama, small_tokenizer, tmp_path, method, **extra)
    expected = history(whole)
    again = make(tiny_llama, small_tokenizer, tmp_path, method, **extra)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert resumed == expected  # the log history comes with the checkpoint
    assert again.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_its_reference_or_of_another_schedule_is_refused(
    tiny_llama, small_tokenizer, tmp_path
):
    extra = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    history(make(tiny_llama, small_tokenizer, tmp_path, ref_model_sync_steps=2, **extra))
    other = make(tiny_llama, small_tokenizer, tmp_path, ref_model_sync_steps=1, **extra)
    with pytest.raises(ValueError, match=r"ref_model_sync_steps: 2 there, 1 here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "reference" / "reference.json").unlink()
    same = make(tiny_llama, small_tokenizer, tmp_path, ref_model_sync_steps=2, **extra)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is damaged: reference/reference.json is missing"
    ):
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_other_data_is_refused_and_the_same_from_another_process_is_not(
    tiny_llama, small_tokenizer, tmp_path
):
    extra = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ref_model_sync_steps": 2}
    rows = pair_rows(50)
    history(make(tiny_llama, small_tokenizer, tmp_path, rows=rows, **extra))
    checkpoint = str(tmp_path / "checkpoint-1")
    changed = rows.to_list()
    changed[20]["rejected"] = changed[20]["rejected"] + " red"
    other = make(tiny_llama, small_tokenizer, tmp_path, rows=Dataset.from_list(changed), **extra)
    with pytest.raises(ValueError, match=r"other options \(data: .*those that it was"):
        other.train(resume_from_checkpoint=checkpoint)
    # as another process may hold it: its indices shuffled and back, of several chunks
    halves = [rows.select(range(25, 50)), rows.select(range(25)).flatten_indices()]
    same = concatenate_datasets(halves).select([*range(25, 50), *range(25)])
    make(tiny_llama, small_tokenizer, tmp_path, rows=same, **extra).train(
        resume_from_checkpoint=checkpoint
    )


def tokenised(count=3000):
    ids = [[i % 7, i % 11, i % 13][: 1 + i % 3] for i in range(count)]
    return {
        "row": list(range(count)),
        "prompt_ids": ids,
        "label": [i % 2 == 0 for i in range(count)],
    }


def test_the_digest_of_data_is_that_of_all_its_rows(tmp_path):
    columns = tokenised()
    expected = digest(Dataset.from_dict(columns))
    assert digest(Dataset.from_dict(columns).with_format("torch")) == expected
    for name, value in (("row", 0), ("prompt_ids", [1]), ("label", None)):
        for row in (0, 499, 500, 1234, 2999):
            changed = copy.deepcopy(columns)
            changed[name][row] = value if columns[name][row] != value else 7
            assert digest(Dataset.from_dict(changed)) != expected, (name, row)
    moved = copy.deepcopy(columns)  # the same tokens in all, cut elsewhere
    moved["prompt_ids"][1:3] = [[1], [1, *columns["prompt_ids"][2]]]
    assert moved["prompt_ids"][1:3] != columns["prompt_ids"][1:3]
    assert digest(Dataset.from_dict(moved)) != expected
    Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    code = (
        "from datasets import load_from_disk; from tralign_fast.training.digest import digest;"
        f"print(digest(load_from_disk({str(tmp_path / 'rows')!r})))"
    )
    other = fork("-c", code)  # whose strings have other hashes
    check_ended(other)
    assert other.stdout.strip() == expected
    assert digest(Dataset.from_dict(columns).to_iterable_dataset()) is None
    assert digest(Dataset.from_dict({"row": []})) is not None


def test_the_digest_of_much_data_reads_a_part_of_it(monkeypatch):
    monkeypatch.setattr(digest_module, "_READ", 1000)
    columns = tokenised()
    expected = digest(Dataset.from_dict(columns))
    seen = []
    for row in range(250, 3000, 500):
        changed = {**columns, "row": [-1 if i == row else i for i in columns["row"]]}
        seen.append(digest(Dataset.from_dict(changed)) != expected)
    assert seen == [True, False, False, True, False, True]  # every third block, and the last
    assert digest(Dataset.from_dict({k: v[:-1] for k, v in columns.items()})) != expected


def test_checkpoints_that_were_cut_short_are_passed_over(tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "ref_model_sync_steps": 2}
    whole = history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # killed before it was written
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # … and while it was
    again = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    with pytest.warns(UserWarning, match=r"checkpoint-\d is damaged: trainer_state.json"):
        again.train(resume_from_checkpoint=True)
    losses = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert losses == whole
    for torn in ("checkpoint-2/trainer_state.json", "checkpoint-4/reference/model.safetensors"):
        file = tmp_path / torn
        file.write_bytes(file.read_bytes()[:50])
        other = make(tiny_llama, small_tokenizer, tmp_path, **extra)
        with pytest.raises(
            ValueError, match=r"safetensors was cut short|_state.json was cut short"
        ):
            other.train(
                resume_from_checkpoint=str(file.parent if "state" in torn else file.parents[1])
            )


def test_evaluation_of_several_datasets_and_the_kl_to_the_start(
    tiny_llama, small_tokenizer, tmp_path
):
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, held_out={"a": pair_rows(5), "b": pair_rows(3)},
        max_steps=3, eval_strategy="steps", eval_steps=3, log_kl_initial=True,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    assert trainer.evaluate()["eval_a_kl/initial"] == pytest.approx(0, abs=1e-5)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_b_loss" in log]
    assert logs[0]["eval_b_kl/initial"] > 1e-5
    assert {"eval_b_rewards/accuracies", "eval_b_rewards/margins"} <= logs[0].keys()
    fresh = trainer.evaluate(pair_rows(4))
    assert fresh["eval_loss"] > 0


def test_bf16_autocast_trains_close_to_fp32(tiny_llama, small_tokenizer, tmp_path):
    extra: dict[str, Any] = {"ref_model_sync_steps": 2}
    full = history(make(tiny_llama, small_tokenizer, tmp_path / "a", **extra))
    half = history(make(tiny_llama, small_tokenizer, tmp_path / "b", bf16=True, **extra))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_bf16_weights_train_and_the_reference_moves(tiny_llama, small_tokenizer, tmp_path):
    model = tiny_llama.bfloat16()
    extra = {"ref_model_mixup_alpha": 0.01, "ref_model_sync_steps": 1, "max_steps": 4}
    trainer = make(model, small_tokenizer, tmp_path, **extra)
    start = torch.cat([p.detach().float().flatten() for p in trainer.reference.model.parameters()])
    losses = history(trainer)
    assert all(torch.isfinite(torch.tensor(losses)))
    ref = torch.cat([p.float().flatten() for p in trainer.reference.model.parameters()])
    assert (ref != start).any()


def test_gradient_checkpointing_changes_nothing(tiny_llama, small_tokenizer, tmp_path):
    plain = history(make(tiny_llama, small_tokenizer, tmp_path / "a", max_steps=3))
    extra: dict[str, Any] = {"max_steps": 3, "gradient_checkpointing": True}
    again = history(make(tiny_llama, small_tokenizer, tmp_path / "b", **extra))
    assert again == pytest.approx(plain, rel=1e-5)


def test_a_streamed_dataset_trains_alike(tiny_llama, small_tokenizer, tmp_path):
    plain = history(make(tiny_llama, small_tokenizer, tmp_path / "a", max_steps=3))
    stream = pair_rows().to_iterable_dataset()
    trainer = make(tiny_llama, small_tokenizer, tmp_path / "b", rows=stream, max_steps=3)
    assert history(trainer) == pytest.approx(plain, rel=1e-6)


def test_a_model_by_its_folder(tiny_llama, small_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    trainer = TRTrainer(
        str(tmp_path / "model"),
        args=TRConfig(**options(tmp_path / "run", max_steps=1)),
        train_dataset=pair_rows(4),
    )
    assert len(history(trainer)) == 1
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_nan_is_not_trained_on(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    before = copy.deepcopy(trainer.model.state_dict())
    message = r"step 1: the policy's log-probs of row 0, 1, 2, 3 are NaN"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_an_output_folder_that_holds_a_run_is_kept(tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    with pytest.raises(ValueError, match=r"holds another run \(checkpoint-1\)"):
        make(tiny_llama, small_tokenizer, tmp_path, **extra).train()
    history(make(tiny_llama, small_tokenizer, tmp_path, overwrite_output_dir=True, **extra))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "hing"}, "loss_type: expected one of dpo, .*did you mean 'hinge'"),
        ({"loss_type": ["sigmoid", "kto"]}, "cannot be added up"),
        ({"loss_type": []}, "loss_type: expected at least one"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing: the loss ipo does not"),
        ({"loss_type": "dpo", "desirable_weight": 2.0}, "desirable_weight: the loss dpo does not"),
        ({"discopop_tau": 0.1}, "discopop_tau: the loss dpo does not take it"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights: expected one weight for each"),
        ({"loss_weights": [math.inf]}, "loss_weights: expected a list of finite numbers or noth"),
        ({"loss_weights": [-1.0]}, "loss_weights: expected numbers ≥ 0 and finite"),
        ({"loss_options": {"gamma": 1.0}}, "gamma: the loss dpo does not take it"),
        ({"loss_type": "kto", "undesirable_weight": math.nan}, "undesirable_weight: expected a"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: expected one of"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef: f_divergence_type='rev"),
        ({"ld_alpha": 1.5}, r"ld_alpha: expected a number in \[0, 1\]"),
        ({"loss_type": "kto", "ld_alpha": 0.5}, "ld_alpha: kto takes no pairs"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting: aot takes no weights"),
        ({"loss_type": "aot", "token_budget": 100}, "token_budget: aot sorts the pairs"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: expected a number of whole"),
        ({"ref_model_sync_steps": -1}, "ref_model_sync_steps: expected a number of whole"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha: expected a number in \[0, 1\]"),
        ({"beta": 0.0}, "beta: expected a number > 0"),
        ({"beta": math.nan}, "beta: expected a finite number, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected a number in \[0, 0.5\)"),
        ({"vocab_filter": 1.0}, r"vocab_filter: expected a number in \[0, 1\)"),
        ({"kept": "nothing"}, "kept: expected one of logits, powers"),
        ({"reference": "cloud"}, "reference: expected one of auto, resident"),
        ({"truncation_mode": "middle"}, "truncation_mode: expected one of keep_start, keep_end"),
        ({"truncation_mode": "keep_end", "loss_type": "kto"}, "truncation_mode: kto cuts compl"),
        ({"max_length": 1}, "max_length: expected a whole number ≥ 2"),
        ({"on_bad_rows": "ignore"}, "on_bad_rows: expected one of drop_overlong, drop"),
        ({"ema_rounding": "up"}, "ema_rounding: expected one of nearest, stochastic"),
    ],
)
def test_options_out_of_range(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TRConfig(str(tmp_path), **change)


def test_trl_defaults_and_ours(tmp_path):
    from trl import DPOConfig

    ours, theirs = (c(str(tmp_path), use_cpu=True) for c in (TRConfig, DPOConfig))
    for name in (
        "learning_rate", "logging_steps", "gradient_checkpointing", "beta", "label_smoothing",
        "ref_model_mixup_alpha", "ref_model_sync_steps", "max_length", "disable_dropout",
        "optim", "weight_decay", "warmup_steps", "per_device_train_batch_size",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sync_ref_model
    assert TRConfig(str(tmp_path), loss_type="sigmoid").loss_type == ["sigmoid"]
    assert json.loads(ours.to_json_string())["loss_type"] is None
    again = TRConfig(**{f: getattr(ours, f) for f in ("output_dir", "beta", "label_smoothing")})
    assert again.objective == ours.objective


def test_models_and_rows_that_cannot_be_used(tiny_llama, small_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="TRTrainer needs a model"):
        TRTrainer(args=TRConfig(str(tmp_path)), train_dataset=pair_rows(2))
    with pytest.raises(ValueError, match="cannot load tokenizer 'no-such/model'"):
        TRTrainer("no-such/model", args=TRConfig(str(tmp_path)), train_dataset=pair_rows(2))
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        TRTrainer(
            tiny_llama, tiny_llama, TRConfig(str(tmp_path)), processing_class=small_tokenizer,
            train_dataset=pair_rows(2),
        )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "the cat", "chosen": " runs", "rejected": " runs"}])
    with pytest.raises(ValueError, match="train row 0"):
        make(tiny_llama, small_tokenizer, tmp_path, rows=rows)
    alike = Dataset.from_list([{"prompt": "a", "completion": " b", "label": True}] * 4)
    with pytest.raises(ValueError, match="label"):
        make(tiny_llama, small_tokenizer, tmp_path, "kto", rows=alike)


def test_a_token_outside_the_models_vocabulary_names_the_row(tiny_llama, small_tokenizer, tmp_path):
    rows = Dataset.from_list(
        [{"row": 5, "prompt_ids": [1], "chosen_ids": [400], "rejected_ids": [3]}]
    )
    trainer = make(tiny_llama, small_tokenizer, tmp_path, rows=rows, max_steps=1)
    with pytest.raises(ValueError, match="row 5: token id 400 is outside the model's vocabulary"):
        trainer.train()


def test_dropout_is_off(small_tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(small_tokenizer), n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5)
    )
    trainer = make(model, small_tokenizer, tmp_path, max_steps=1, learning_rate=0.0)
    assert history(trainer)[0] == pytest.approx(0.693147, rel=1e-5)  # log 2: policy = reference


@pytest.mark.parametrize("method", METHODS)
def test_a_token_budget_changes_no_loss(method, tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 4, "ref_model_sync_steps": 2, "gradient_accumulation_steps": 2}
    rows = (kto_rows if method == "kto" else pair_rows)(32)
    held_out = rows.select(range(8))
    whole = make(tiny_llama, small_tokenizer, tmp_path / "a", method, rows, held_out, **extra)
    extra["token_budget"] = 100
    split = make(tiny_llama, small_tokenizer, tmp_path / "b", method, rows, held_out, **extra)
    assert len(next(iter(split.get_train_dataloader())).parts) > 1
    assert history(split) == pytest.approx(history(whole), rel=1e-5)
    for a, b in zip(split.state.log_history[:4], whole.state.log_history[:4], strict=True):
        for key in a.keys() & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert split.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-5)


def test_powers_that_cannot_be_kept_are_said_at_the_start(tmp_path, tiny_llama, small_tokenizer):
    warn_once.cache_clear()
    args = TRConfig(**options(tmp_path), kept="powers")
    with pytest.warns(UserWarning, match=r'kept="powers" keeps logits here: the torch backend'):
        trainer = TRTrainer(
            tiny_llama, args=args, train_dataset=pair_rows(4), processing_class=small_tokenizer
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="linear_logprobs: kept")
        trainer.train()  # says nothing more


def said_of(make_one):
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make_one()
    return made, [str(w.message) for w in caught if w.category is UserWarning]


GIVEN = {
    "a collator's options": (
        {"data_collator": PreferenceCollator(paired=True)}, {"token_budget": 64, "ld_alpha": 0.5},
        ["token_budget=64 has no effect: the data_col", "ld_alpha=0.5 has no effect: the data_col"],
    ),
    "a collator that has them": (
        {"data_collator": PreferenceCollator(paired=True, ld_alpha=0.5)}, {"ld_alpha": 0.5}, []
    ),
    "dropout of an adapter": (
        {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1)},
        {"reference": "auto"},
        ["lora_dropout has no effect: disable_dropout is True"],
    ),
    "dropout that is wanted": (
        {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1)},
        {"reference": "auto", "disable_dropout": False}, [],
    ),
    "a stream's order": (
        {"train_dataset": pair_rows().to_iterable_dataset()},
        {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True},
        ["train_sampling_strategy='group_by_length' has no effect: a stream's", "drop_last=True"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_options_that_what_is_given_decides_are_said(case, tiny_llama, small_tokenizer, tmp_path):
    given, extra, expected = GIVEN[case]
    given = {"train_dataset": pair_rows(), **given}
    config = TRConfig(**options(tmp_path, **{"reference": "resident", **extra}))
    model = copy.deepcopy(tiny_llama)
    _, said = said_of(
        lambda: TRTrainer(model, args=config, processing_class=small_tokenizer, **given)
    )
    said = [line for line in said if "no effect" in line]
    assert len(said) == len(expected)
    assert all(any(words in line for line in said) for words in expected)


def test_what_a_model_that_is_not_packed_makes_of_options_is_said(small_tokenizer, tmp_path):
    extra = {"token_budget": 64, "cuda_graphs": True}
    make_one = functools.partial(make, build("gpt-oss"), small_tokenizer, tmp_path, **extra)
    trainer, said = said_of(make_one)
    assert trainer.data_collator.layout == "padded"
    for words in ("token_budget=64 counts tokens without", "graphs are of packed rows"):
        assert sum(words in line for line in said) == 1


def test_a_run_that_ends_inside_its_warm_up_says_so(tiny_llama, small_tokenizer, tmp_path):
    for steps, count in ((2, 0), (3, 1)):
        trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=2, warmup_steps=steps)
        _, said = said_of(trainer.train)
        assert sum("warmup_steps=3: the run ends after 2 steps" in line for line in said) == count


@pytest.mark.parametrize("norm", [None, 0.0])
def test_no_norm_is_no_clipping(norm, tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=1, max_grad_norm=norm)
    assert len(history(trainer)) == 1
    assert trainer.args.max_grad_norm == 0


def test_tokens_are_counted_once(tiny_llama, small_tokenizer, tmp_path, caplog):
    extra = {"max_steps": 2, "include_num_input_tokens_seen": True}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    logging.getLogger("transformers").addHandler(caplog.handler)
    counts = history(trainer, "num_input_tokens_seen")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert counts[:2] == [log["num_tokens"] for log in trainer.state.log_history[:2]]
    assert "number of tokens seen" not in caplog.text


def test_a_run_that_is_resumed_at_its_end_says_so(tiny_llama, small_tokenizer, tmp_path, capsys):
    extra = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    trainer.train()
    assert "nothing was left to train" not in capsys.readouterr().err
    make(tiny_llama, small_tokenizer, tmp_path, **extra).train(resume_from_checkpoint=True)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("checkpoint-2 is the end of its run: nothing was left to train")
