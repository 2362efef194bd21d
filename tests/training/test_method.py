"""Which method the rows mean, where the loss is left open."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser

import tralign_fast
from tests.training.test_trl_parity import history, kto_rows, options, pair_rows
from tralign_fast import (
    TRConfig,
    TRDPOConfig,
    TRDPOTrainer,
    TRKTOConfig,
    TRKTOTrainer,
    TRTrainer,
)


def open_options(tmp_path, **extra):
    extra = {"reference": "resident", "max_steps": 2, **extra}
    return {**options(tmp_path, train_sampling_strategy=None), **extra}


def make(rows, model, tokenizer, tmp_path, trainer=TRTrainer, config=TRConfig, **extra):
    args = config(**open_options(tmp_path, **extra))
    model = copy.deepcopy(model)  # it is trained
    return trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)


def streamed(rows):
    rows = list(rows)
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("form", ["rows", "stream", "stream with features"])
def test_completions_with_a_label_are_kto(form, tiny_llama, small_tokenizer, tmp_path, capsys):
    rows = kto_rows()
    if form == "stream":
        rows = streamed(rows)
        assert rows.column_names is None
    elif form == "stream with features":
        rows = rows.to_iterable_dataset()
    trainer = make(rows, tiny_llama, small_tokenizer, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loss_type:")]
    assert said == [
        "loss_type: the rows have completion and label, so the run is KTO "
        '(loss_type="kto" says it, too)'
    ]
    assert trainer.args.loss_type == ["kto"]
    assert trainer.args.train_sampling_strategy == "sequential"
    explicit = make(kto_rows(), tiny_llama, small_tokenizer, tmp_path / "2", loss_type="kto")
    assert "loss_type" not in capsys.readouterr().err
    assert history(trainer) == history(explicit)


def test_pairs_are_dpo_and_nothing_is_said(tiny_llama, small_tokenizer, tmp_path, capsys):
    trainer = make(pair_rows(8), tiny_llama, small_tokenizer, tmp_path)
    assert "loss_type" not in capsys.readouterr().err
    assert trainer.args.loss_type == ["dpo"]
    assert trainer.args.train_sampling_strategy == "random"
    both = kto_rows(8).add_column("chosen", pair_rows(8)["chosen"])
    both = both.add_column("rejected", pair_rows(8)["rejected"])
    trainer = make(both, tiny_llama, small_tokenizer, tmp_path)
    assert trainer.args.loss_type == ["dpo"]


def test_rows_to_evaluate_alone_say_it_too(tiny_llama, small_tokenizer, tmp_path):
    args = TRConfig(**open_options(tmp_path))
    held_out = {"a": kto_rows(8), "b": kto_rows(4)}
    trainer = TRTrainer(
        tiny_llama, args=args, eval_dataset=held_out, processing_class=small_tokenizer
    )
    assert trainer.args.loss_type == ["kto"]
    assert trainer.evaluate()["eval_b_loss"] > 0


def test_one_config_serves_rows_of_both_kinds(tiny_llama, small_tokenizer, tmp_path):
    args = TRConfig(**open_options(tmp_path))
    assert args.loss_type is None
    assert args.loss_is_open
    for rows, name in ((kto_rows(8), "kto"), (pair_rows(8), "dpo"), (kto_rows(8), "kto")):
        trainer = TRTrainer(
            tiny_llama, args=args, train_dataset=rows, processing_class=small_tokenizer
        )
        assert trainer.args.loss_type == [name]
        sampling = {"kto": "sequential", "dpo": "random"}[name]
        assert trainer.args.train_sampling_strategy == sampling
        trainer.release_model()
    args.loss_type = ["ipo"]
    with pytest.raises(ValueError, match='completion and label are for loss_type="kto"'):
        TRTrainer(
            tiny_llama, args=args, train_dataset=kto_rows(8), processing_class=small_tokenizer
        )


def test_a_chosen_order_stays(tiny_llama, small_tokenizer, tmp_path):
    extra = {"train_sampling_strategy": "random"}
    trainer = make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path, **extra)
    assert trainer.args.train_sampling_strategy == "random"


def test_options_of_kto_wait_for_the_rows(tiny_llama, small_tokenizer, tmp_path):
    extra = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = make(kto_rows(), tiny_llama, small_tokenizer, tmp_path, **extra)
    explicit = make(
        kto_rows(), tiny_llama, small_tokenizer, tmp_path / "2", loss_type="kto", **extra
    )
    assert history(trainer) == history(explicit)
    with pytest.raises(ValueError, match=r'desirable_weight: the loss dpo .*loss_type="kto" takes'):
        make(pair_rows(8), tiny_llama, small_tokenizer, tmp_path / "3", **extra)
    with pytest.raises(ValueError, match="label_smoothing: the loss kto does not take it"):
        make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path / "4", label_smoothing=0.1)
    with pytest.raises(ValueError, match="ld_alpha: kto takes no pairs"):
        make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path / "5", ld_alpha=0.5)


@pytest.mark.parametrize("loss", ["dpo", "ipo", ["sigmoid", "sft"]])
def test_labelled_rows_for_a_loss_of_pairs_name_kto(loss, tiny_llama, small_tokenizer, tmp_path):
    with pytest.raises(ValueError, match='completion and label are for loss_type="kto"') as error:
        make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path, loss_type=loss)
    assert "\n" not in str(error.value)


def test_a_command_line_leaves_it_open_or_lists_losses(tmp_path):
    parser = HfArgumentParser(TRConfig)
    base = ["--output_dir", str(tmp_path), "--use_cpu"]
    (config,) = parser.parse_args_into_dataclasses(base)
    assert config.loss_type is None
    given = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"]
    (config,) = parser.parse_args_into_dataclasses([*base, *given])
    assert config.loss_type == ["sigmoid", "sft"]


# --- names for those who come from TRL ------------------------------------------------------------


def test_aliases_differ_in_defaults_alone(tmp_path):
    for config, loss in ((TRDPOConfig, ["dpo"]), (TRKTOConfig, ["kto"])):
        own = config(str(tmp_path), use_cpu=True)
        assert own.loss_type == loss
        assert not own.loss_is_open
        same = TRConfig(str(tmp_path), use_cpu=True, loss_type=loss)
        assert all(
            getattr(own, f.name) == getattr(same, f.name)
            for f in dataclasses.fields(TRConfig)
            if f.name not in ("logging_dir", "run_name")
        )
    assert TRDPOTrainer.__init__ is TRTrainer.__init__ is TRKTOTrainer.__init__
    assert tralign_fast.TRKTOTrainer is TRKTOTrainer


@pytest.mark.parametrize("config", [TRConfig, TRKTOConfig])
def test_a_kto_trainer_unpairs_pairs(config, tiny_llama, small_tokenizer, tmp_path, capsys):
    of_kto = (TRKTOTrainer, config)
    trainer = make(pair_rows(8), tiny_llama, small_tokenizer, tmp_path, *of_kto)
    assert trainer.args.loss_type == ["kto"]
    assert trainer.train_dataset["label"] == [True] * 8 + [False] * 8
    assert "loss_type" not in capsys.readouterr().err


def test_alias_trainers_refuse_the_other_method(tiny_llama, small_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"expected a loss of completions with a label.*got ipo"):
        make(pair_rows(8), tiny_llama, small_tokenizer, tmp_path, TRKTOTrainer, loss_type="ipo")
    with pytest.raises(ValueError, match=r"expected a loss of pairs.*got kto; TRTrainer trains it"):
        make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path, TRDPOTrainer, TRKTOConfig)
    with pytest.raises(ValueError, match='completion and label are for loss_type="kto"'):
        make(kto_rows(8), tiny_llama, small_tokenizer, tmp_path, TRDPOTrainer)
    trainer = make(
        pair_rows(8), tiny_llama, small_tokenizer, tmp_path, TRDPOTrainer, loss_type="ipo"
    )
    assert trainer.args.loss_type == ["ipo"]


@pytest.mark.parametrize("form", ["pairs", "implicit", "conversational", "stream"])
def test_pairs_are_unpaired_as_trl_does_it(form, tiny_llama, small_tokenizer, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = pair_rows(10, conversational=form == "conversational")
    if form == "implicit":
        rows = Dataset.from_list([
            {key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows
        ])  # fmt: skip
    if form == "stream":
        rows = rows.to_iterable_dataset()
    given = open_options(tmp_path)
    given = {k: v for k, v in given.items() if k not in ("reference", "train_sampling_strategy")}
    theirs = KTOTrainer(
        tiny_llama, tiny_llama.__class__(tiny_llama.config), KTOConfig(**given),
        train_dataset=rows, processing_class=small_tokenizer,
    )  # fmt: skip
    trainer = make(rows, tiny_llama, small_tokenizer, tmp_path, loss_type="kto")
    ours, theirs = list(trainer.train_dataset), list(theirs.train_dataset)
    assert len(ours) == len(theirs) == 20
    for mine, its in zip(ours, theirs, strict=True):
        for column in ("prompt_ids", "completion_ids", "label"):
            assert mine[column] == its[column]
