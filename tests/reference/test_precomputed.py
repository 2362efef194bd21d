"""A frozen reference whose log-probs are computed once: for a run, and for those that follow."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from typing import Any

import datasets
import pytest
import torch
from datasets import config
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_llama
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, kto_rows, options, pair_rows, trl_classes
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.ops.backend import warn_once
from tralign_fast.reference import TrustRegion, choose_reference, window
from tralign_fast.reference.score_cache import FOLDER

PRE = {"reference": "auto", "sync_ref_model": None, "precompute_ref_log_probs": True}
FROZEN = {"reference": "resident", "sync_ref_model": False}
LD = {"ld_alpha": 0.3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache, empty."""
    folder = tmp_path / "datasets"
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(folder))
    return folder / FOLDER


@pytest.fixture
def forwards(monkeypatch):
    """Keys of the sequences of every forward of a reference."""
    seen, real = [], window.sequence_logps

    def counted(model, batch):
        seen.append(batch.keys)
        return real(model, batch)

    monkeypatch.setattr(window, "sequence_logps", counted)
    return seen


def rows_of(method, count=32):
    return kto_rows(count) if method == "kto" else pair_rows(count)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_losses_are_trls_with_precomputed_log_probs(method, tiny_llama, small_tokenizer, tmp_path):
    config_class, trainer = trl_classes(method)
    name = {"dpo": "sigmoid"}.get(method, method)
    extra = {"loss_type": name, "sync_ref_model": False, "precompute_ref_log_probs": True}
    theirs = trainer(
        copy.deepcopy(tiny_llama), args=config_class(**options(tmp_path / "trl", **extra)),
        train_dataset=rows_of(method), processing_class=small_tokenizer,
    )  # fmt: skip
    expected = history(theirs)
    mine = make(tiny_llama, small_tokenizer, tmp_path / "ours", method, rows_of(method), **PRE)
    losses = history(mine)
    assert mine.reference.name == "precomputed"
    assert len(losses) == 8
    assert len(set(losses)) > 4
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)


EXTRAS = ({}, LD, {"packing": False}, {"token_budget": 60})
WHOLE = [
    *itertools.product(
        ("dpo", "ipo", "kto", "apo_zero_unpaired"), ("sequential", "random"), range(4)
    )
]
# each method, order and extra once or twice
SAMPLE = {(m, o, e) for k, (m, o, e) in enumerate(WHOLE) if k % 5 == 0}


@pytest.mark.parametrize(
    ("method", "order", "extra"),
    [
        pytest.param(m, o, EXTRAS[e], marks=[] if (m, o, e) in SAMPLE else pytest.mark.matrix)
        for m, o, e in WHOLE
    ],
)
def test_losses_are_those_of_a_second_model(
    method, order, extra, tiny_llama, small_tokenizer, tmp_path
):
    if extra is LD and method not in ("dpo", "ipo"):
        pytest.skip("of pairs")
    unpaired = method in ("kto", "apo_zero_unpaired")
    rows, held_out = (rows_of("kto" if unpaired else "dpo", n) for n in (11, 5))
    extra = {
        "max_steps": 8, "per_device_train_batch_size": 3, "train_sampling_strategy": order,
        "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": 4, "held_out": held_out,
        "dataloader_drop_last": order == "random", **extra,
    }  # fmt: skip
    keys = ("loss", "eval_loss", "eval_rewards/chosen")
    runs = []
    for place in (FROZEN, PRE):
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / str(len(runs)), method, rows, **place, **extra
        )
        trainer.train()
        assert trainer.state.epoch > 2
        runs.append([log[k] for log in trainer.state.log_history for k in keys if k in log])
    assert len(runs[0]) >= 8 + 2
    assert runs[1] == pytest.approx(runs[0], rel=1e-6, abs=1e-7)


def test_no_model_is_shown_for_a_reference_that_is_not_kept(tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 2, **PRE}
    trainer = make(tiny_llama, small_tokenizer, tmp_path / "own", rows=rows_of("dpo", 8), **extra)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.ref_model is None
    first = copy.deepcopy(tiny_llama)
    trainer = TRTrainer(
        tiny_llama, first, TRConfig(**options(tmp_path / "other", **extra)),
        train_dataset=rows_of("dpo", 8), processing_class=small_tokenizer,
    )  # fmt: skip
    assert trainer.ref_model is first
    trainer.train()
    assert trainer.ref_model is None


def test_every_row_is_scored_once_and_found_again(
    tiny_llama, small_tokenizer, tmp_path, forwards, cache
):
    extra = {
        "max_steps": 12, "per_device_train_batch_size": 2, "train_sampling_strategy": "random",
        "precompute_ref_batch_size": 6, "held_out": rows_of("dpo", 20).select(range(16, 20)), **PRE,
    }  # fmt: skip
    rows = rows_of("dpo", 16)
    first = make(tiny_llama, small_tokenizer, tmp_path / "first", rows=rows, **extra)
    losses = history(first)
    assert first.state.epoch > 1
    scored = [key for keys in forwards for key in keys]
    assert len(scored) == len(set(scored)) == 2 * 20
    assert [len(keys) // 2 for keys in forwards] == [6, 6, 4, 4]
    forwards.clear()
    again = make(tiny_llama, small_tokenizer, tmp_path / "again", rows=rows, **extra)
    assert history(again) == losses
    assert not forwards
    # another loss, order and batch size, and two rows that are new
    rows = rows_of("dpo", 18).select(range(4, 18))
    other = {**extra, "seed": 5, "per_device_train_batch_size": 1, "held_out": None}
    history(make(tiny_llama, small_tokenizer, tmp_path / "other", "ipo", rows, **other))
    assert not forwards  # those two were held out before
    rows = rows_of("dpo", 22).select(range(10, 22))
    history(make(tiny_llama, small_tokenizer, tmp_path / "more", rows=rows, **other))
    assert [len(keys) // 2 for keys in forwards] == [6]  # the batch with what is new, as a whole
    (file,) = cache.iterdir()
    assert len(load_file(file)["keys"]) == 2 * 22


def test_other_weights_or_precision_are_another_reference(
    tiny_llama, small_tokenizer, tmp_path, cache
):
    rows = rows_of("dpo", 8)
    make(tiny_llama, small_tokenizer, tmp_path / "a", rows=rows, max_steps=1, **PRE).train()
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4
    make(tiny_llama, small_tokenizer, tmp_path / "b", rows=rows, max_steps=1, **PRE).train()
    assert len(list(cache.iterdir())) == 2
    extra = {**PRE, "bf16": True, "max_steps": 1}
    make(tiny_llama, small_tokenizer, tmp_path / "c", rows=rows, **extra).train()
    assert len(list(cache.iterdir())) == 3
    tiny_llama.config._name_or_path = "elsewhere"
    make(tiny_llama, small_tokenizer, tmp_path / "d", rows=rows, max_steps=1, **PRE).train()
    assert len(list(cache.iterdir())) == 3


def _cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def _flipped(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)


def _of_another(file):
    save_file(load_file(file), file, metadata={"of": "another", "checksum": "0"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_cut, "cannot be used"), (_flipped, "checksum"), (_of_another, "of another reference")],
)
def test_a_file_that_is_damaged_or_foreign_is_computed_anew(
    damage, said, tiny_llama, small_tokenizer, tmp_path, forwards, cache
):
    extra = {"rows": rows_of("dpo", 8), "max_steps": 3, **PRE}
    losses = history(make(tiny_llama, small_tokenizer, tmp_path / "a", **extra))
    (file,) = cache.iterdir()
    damage(file)
    forwards.clear()
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert history(make(tiny_llama, small_tokenizer, tmp_path / "b", **extra)) == losses
    told = [str(w.message) for w in caught if "computed anew" in str(w.message)]
    assert len(told) == 1
    assert said in told[0]
    assert forwards
    forwards.clear()
    assert history(make(tiny_llama, small_tokenizer, tmp_path / "c", **extra)) == losses
    assert not forwards


def test_a_folder_that_cannot_be_written_is_said_once(tiny_llama, small_tokenizer, tmp_path, cache):
    cache.parent.write_text("a file")
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="cannot be written"):
        losses = history(
            make(tiny_llama, small_tokenizer, tmp_path / "a", rows=rows_of("dpo"), **PRE)
        )
    assert len(losses) == 8


@pytest.mark.parametrize("width", [32, 48])
def test_a_reference_of_its_own_is_let_go_of(width, tiny_llama, small_tokenizer, tmp_path):
    def other():
        torch.manual_seed(1)
        model = make_tiny_llama(small_tokenizer, hidden_size=width, head_dim=8)
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight), alpha=0.1)
        return model

    losses = []
    for place in (FROZEN, PRE):
        reference = other()
        trainer = TRTrainer(
            copy.deepcopy(tiny_llama), reference,
            TRConfig(**options(tmp_path / str(len(losses)), loss_type="dpo", **place)),
            train_dataset=rows_of("dpo"), processing_class=small_tokenizer,
        )  # fmt: skip
        alive = weakref.ref(reference)
        del reference
        losses.append(history(trainer))
        gc.collect()
        assert (alive() is None) == (place is PRE)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    own = make(tiny_llama, small_tokenizer, tmp_path / "own", rows=rows_of("dpo"), **PRE)
    assert history(own) != pytest.approx(losses[0], rel=1e-4)


def test_no_second_model_is_made(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, rows=rows_of("dpo"), **PRE)
    trainer.train()
    size = tiny_llama.model.embed_tokens.weight.shape
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.shape == size]
    mine = {id(p) for m in (trainer.model, tiny_llama) for p in m.parameters()}
    assert not [p for p in held if id(p) not in mine]
    assert not trainer.reference._host


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_resumes_without_the_cache(method, tiny_llama, small_tokenizer, tmp_path, cache):
    extra = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 3, "rows": rows_of(method, 12), "held_out": rows_of(method, 4), **PRE,
        "train_sampling_strategy": "random", "per_device_train_batch_size": 3,
    }  # fmt: skip
    whole = make(tiny_llama, small_tokenizer, tmp_path / "run", method, **extra)
    expected = history(whole)
    for file in cache.iterdir():
        file.unlink()
    again = make(tiny_llama, small_tokenizer, tmp_path / "run", method, **extra)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == expected
    assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    weights = zip(again.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    other = make(
        tiny_llama, small_tokenizer, tmp_path / "run", method,
        **{**extra, "precompute_ref_log_probs": False, **FROZEN},
    )  # fmt: skip
    with pytest.raises(ValueError, match="'precomputed' there"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_rows_that_come_after_the_start_are_refused(tiny_llama, small_tokenizer, tmp_path, cache):
    new = pair_rows(40).select(range(34, 40))
    extra = {"rows": rows_of("dpo"), "held_out": {"a": pair_rows(34).select([32, 33])}, **PRE}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=2, **extra)
    resident = make(
        tiny_llama, small_tokenizer, tmp_path / "r", max_steps=2, **{**extra, **FROZEN,
        "precompute_ref_log_probs": False},
    )  # fmt: skip
    expected = resident.evaluate(eval_dataset=new)["eval_loss"]
    assert trainer.evaluate(eval_dataset=new)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate()["eval_a_loss"] == resident.evaluate()["eval_a_loss"]
    for run in (trainer, resident):
        run.train()
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(
        resident.evaluate()["eval_a_loss"], rel=1e-6
    )
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset"):
        trainer.evaluate(eval_dataset=new)
    seen = rows_of("dpo").select(range(3))  # trained on, and so known
    assert trainer.evaluate(seen)["eval_loss"] == pytest.approx(
        resident.evaluate(seen)["eval_loss"], rel=1e-6
    )
    trainer.train()  # a second training goes on with the same reference
    model = trainer.release_model()
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[-1] == len(small_tokenizer)


def test_kto_in_a_random_order_has_the_epochs_that_it_began_with(
    tiny_llama, small_tokenizer, tmp_path
):
    extra = {
        "rows": rows_of("kto", 12), "train_sampling_strategy": "random", "max_steps": 3,
        "per_device_train_batch_size": 4, **PRE,
    }  # fmt: skip
    trainer = make(tiny_llama, small_tokenizer, tmp_path, "kto", **extra)
    trainer.train()
    trainer.train()
    trainer.args.max_steps = 9
    with pytest.raises(ValueError, match="borrow other completions in epochs"):
        trainer.train()


def test_an_adapter_can_score_rows_that_come_later(small_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    torch.manual_seed(3)
    policy = peft.get_peft_model(make_tiny_llama(small_tokenizer), lora)
    new = pair_rows(40).select(range(34, 40))
    found = []
    for place in (FROZEN, PRE):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 2e-2}
        folder = tmp_path / str(len(found))
        trainer = make(policy, small_tokenizer, folder, rows=rows_of("dpo"), **place, **saving)
        losses = history(trainer)
        later = trainer.evaluate(new)["eval_rewards/chosen"]
        trained = [p.clone() for p in trainer.model.parameters()]
        again = make(policy, small_tokenizer, folder, rows=rows_of("dpo"), **place, **saving)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        resumed = again.evaluate(new)["eval_rewards/chosen"]
        assert all(
            torch.equal(a, b) for a, b in zip(trained, again.model.parameters(), strict=True)
        )
        found.append([*losses, later, resumed])
    assert abs(found[0][-1]) > 1e-3
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("as_", ["train", "eval", "dict", "IterableDatasetDict", "evaluate"])
@pytest.mark.parametrize("sync", [None, True])
def test_streams_are_refused(sync, as_, tiny_llama, small_tokenizer, tmp_path):
    stream = rows_of("dpo").to_iterable_dataset()
    held_out = {
        "eval": stream, "dict": {"a": stream},
        "IterableDatasetDict": datasets.IterableDatasetDict({"a": stream}),
    }.get(as_)  # fmt: skip
    rows = stream if as_ == "train" else rows_of("dpo")
    extra = {"rows": rows, "held_out": held_out, "max_steps": 1, **PRE, "sync_ref_model": sync}
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with Iterable"):
        make(tiny_llama, small_tokenizer, tmp_path, **extra).evaluate(stream)


def test_a_moving_reference_has_its_windows(tiny_llama, small_tokenizer, tmp_path, capsys):
    extra = {"sync_ref_model": True, "reference": "auto", "ref_model_sync_steps": 3}
    losses = []
    for precompute in (False, True):
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / str(precompute),
            precompute_ref_log_probs=precompute, **extra,
        )  # fmt: skip
        assert trainer.reference.name == "offloaded"
        losses.append(history(trainer))
    assert losses[0] == losses[1]
    assert "nothing to compute ahead" not in capsys.readouterr().err
    extra["ref_model_sync_steps"] = 1
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path / "one", precompute_ref_log_probs=True, **extra
    )
    assert trainer.reference.name == "resident"
    assert "nothing to compute ahead" in capsys.readouterr().err


def test_what_the_option_stands_for(tmp_path):
    assert TRConfig(str(tmp_path)).sync_ref_model is True
    cases: list[dict[str, Any]]
    cases = [{"precompute_ref_log_probs": True}, {"reference": "precomputed"}]
    for given in cases:
        args = TRConfig(str(tmp_path), **given)
        assert args.sync_ref_model is False
        assert args.precompute_ref_log_probs is True
    frozen, moving = TrustRegion(0.0, 0), TrustRegion(0.6, 4)
    asked = {"own_start": False, "lora": False, "precompute": True}
    assert choose_reference("auto", frozen, **asked)[0] == "precomputed"
    assert choose_reference("precomputed", frozen, **asked)[0] == "precomputed"
    assert choose_reference("auto", moving, **asked)[0] == "offloaded"
    with pytest.raises(ValueError, match='leave reference out, got reference="resident"'):
        choose_reference("resident", frozen, **asked)


def test_a_moving_one_cannot_be_precomputed(tiny_llama, small_tokenizer, tmp_path):
    with pytest.raises(ValueError, match='reference="precomputed" stands still'):
        make(tiny_llama, small_tokenizer, tmp_path, reference="precomputed", sync_ref_model=True)
