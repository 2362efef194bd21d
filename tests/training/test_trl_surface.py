"""What TRL's trainers take, TRTrainer takes: fields, keywords, attributes, TRL's own scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments

from tests.training.test_trl_parity import history, kto_rows, options, pair_rows, run_both
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.ops.backend import warn_once

# fields of TRL's that TRConfig has not, each with its reason
LEFT_OUT: dict[str, str] = {}
# defaults that differ: TRConfig's, and why
OTHER_DEFAULTS = {
    "sync_ref_model": "the reference moves: what this library is for",
    "label_smoothing": "None is TRL's 0, and 1e-3 for exo_pair, which TRL refuses without",
    "train_sampling_strategy": "None is what TRL's trainer of the loss does",
    "loss_type": "dpo is TRL's sigmoid",
    "remove_unused_columns": "batches are made of columns that no forward names",
    "dataloader_pin_memory": "False on a CPU, where torch warns of True",
}


@pytest.fixture
def folder(tiny_llama, small_tokenizer, tmp_path):
    """A checkpoint of the tiny model with its tokenizer, as a name that trainers load."""
    path = tmp_path / "model"
    tiny_llama.save_pretrained(path)
    small_tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["DPOConfig", "KTOConfig"])
def test_every_field_of_trl(name, tmp_path):
    import trl

    kind = getattr(trl, name)
    ours = {f.name for f in dataclasses.fields(TRConfig)}
    theirs = {f.name for f in dataclasses.fields(kind)}
    assert theirs - ours == LEFT_OUT.keys() & theirs
    mine = TRConfig(str(tmp_path), loss_type="kto" if name == "KTOConfig" else "dpo", use_cpu=True)
    other = kind(str(tmp_path), use_cpu=True, bf16=False)
    for field in sorted(theirs & ours - OTHER_DEFAULTS.keys() - {"run_name", "logging_dir"}):
        assert getattr(mine, field) == getattr(other, field), field


@pytest.mark.parametrize(
    "given", [{}, {"pad_token": "<pad>"}, {"loss_type": "kto"}, {"precompute_ref_log_probs": True}]
)
def test_options_survive_what_python_does_with_them(given, tmp_path):
    args = TRConfig(str(tmp_path), use_cpu=True, **given)
    copies = {
        "pickle": pickle.loads(pickle.dumps(args)),
        "replace": dataclasses.replace(args),
        "to_dict": TRConfig(**args.to_dict()),
        "json": TRConfig(**json.loads(args.to_json_string())),
    }
    # transformers masks secrets, and keeps accelerate's configuration as an object
    names = {f.name for f in dataclasses.fields(args) if f.init} - {"hub_token"}
    for how, copied in copies.items():
        for name in names - {"accelerator_config"}:
            assert getattr(copied, name) == getattr(args, name), (how, name)


def test_a_plain_run_does_not_warn(folder, tmp_path):
    args = TRConfig(str(tmp_path / "run"), max_steps=2, ref_model_sync_steps=1, report_to="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        TRTrainer(folder, args=args, train_dataset=pair_rows(4)).train()


def test_arguments_of_other_classes(folder, tmp_path):
    from trl import DPOConfig, KTOConfig

    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "save_steps": 7}
    given = DPOConfig(str(tmp_path / "a"), loss_type=["ipo"], beta=0.3, hub_token="x", **common)
    with pytest.warns(UserWarning, match="DPOConfig was taken over .* is frozen"):
        args = TRTrainer(folder, None, given, train_dataset=pair_rows(4)).args
    assert isinstance(args, TRConfig)
    assert (args.loss_type, args.beta, args.hub_token) == (["ipo"], 0.3, "x")
    assert (args.sync_ref_model, args.save_steps) == (False, 7)
    given = KTOConfig(str(tmp_path / "b"), desirable_weight=1.5, sync_ref_model=True, **common)
    with pytest.warns(UserWarning, match="KTOConfig was taken over .* moves"):
        args = TRTrainer(folder, None, given, train_dataset=kto_rows(4)).args
    assert (args.loss_type, args.desirable_weight) == (["kto"], 1.5)
    assert args.train_sampling_strategy == "sequential"
    plain = TrainingArguments(str(tmp_path / "c"), learning_rate=3e-4, **common)
    with pytest.warns(UserWarning, match="TrainingArguments was taken over"):
        args = TRTrainer(folder, None, plain, train_dataset=pair_rows(4)).args
    assert (args.learning_rate, args.gradient_checkpointing, args.beta) == (3e-4, False, 0.1)


def test_arguments_that_cannot_be_taken_over(folder, tmp_path):
    from trl import GRPOConfig

    with pytest.raises(ValueError, match=r"args: expected a TRConfig, .* got dict"):
        TRTrainer(folder, None, {"beta": 1}, train_dataset=pair_rows(4))  # pyright: ignore[reportArgumentType]
    given = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=4)
    with pytest.raises(ValueError, match=r"args: GRPOConfig sets .*num_generations"):
        TRTrainer(folder, None, given, train_dataset=pair_rows(4))


def test_checkpointing_under_either_name(tmp_path, recwarn):
    new = hasattr(TrainingArguments, "activation_checkpointing")
    assert TRConfig(str(tmp_path)).gradient_checkpointing
    assert not TRConfig(str(tmp_path), gradient_checkpointing=False).gradient_checkpointing
    if new:
        args: Any = TRConfig(str(tmp_path), activation_checkpointing=False)
        assert (args.activation_checkpointing, args.gradient_checkpointing) == (False, False)
        args = TRConfig(str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})
        assert args.activation_checkpointing_kwargs == {"use_reentrant": True}
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_compute_metrics_gets_rewards(method, folder, tmp_path):
    rows = kto_rows(7) if method == "kto" else pair_rows(7)
    seen = []

    def metrics(found):
        seen.append(found)
        return {"mine": 0.5}

    extra = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 3}
    args = TRConfig(**options(tmp_path / "run", loss_type=method, token_budget=60, **extra))
    trainer = TRTrainer(
        folder, None, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )
    assert history(trainer, "eval_mine") == [0.5, 0.5]
    metric = trainer.evaluate()
    rewards, labels = seen[-1].predictions, seen[-1].label_ids
    chosen = rewards[:, 0] if method == "dpo" else rewards[labels == 1]
    rejected = rewards[:, 1] if method == "dpo" else rewards[labels == 0]
    assert len(chosen) + len(rejected) == (14 if method == "dpo" else 7)
    if method == "dpo":  # TRL's metrics are means of the batches' means
        for key, values in (("chosen", chosen), ("rejected", rejected)):
            means = [values[start : start + 3].mean() for start in (0, 3, 6)]
            expected = metric[f"eval_rewards/{key}"]
            assert sum(means) / 3 == pytest.approx(expected, abs=1e-6), key
        assert not labels.any()
    else:
        assert labels.tolist() == [int(label) for label in rows["label"]]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_peft_config_is_trls(method, folder, tmp_path):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    rows = kto_rows() if method == "kto" else pair_rows()
    losses = []
    for config, trainer, extra in (
        (TRConfig, TRTrainer, {"loss_type": method}),
        *([(KTOConfig, KTOTrainer, {})] if method == "kto" else [(DPOConfig, DPOTrainer, {})]),
    ):
        torch.manual_seed(1)  # the adapter's first weights must come from args.seed
        args = config(
            **options(tmp_path / config.__name__, seed=5, **extra) | {"sync_ref_model": False}
        )
        adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        made: Any = trainer(folder, None, args, train_dataset=rows, peft_config=adapter)
        assert made.ref_model is None
        losses.append(history(made))
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0)


def test_a_reference_by_its_name(folder, tiny_llama, tmp_path):
    """Its own name, and the policy's: both are models of their own."""
    losses = []
    for reference in (folder, "".join(folder), None):
        args = TRConfig(
            **options(tmp_path / "run", ref_model_sync_steps=3, overwrite_output_dir=True)
        )
        trainer = TRTrainer(folder, reference, args, train_dataset=pair_rows())
        losses.append(history(trainer))
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-6)
    with pytest.raises(ValueError, match="cannot load model 'no-such/model'"):
        TRTrainer(folder, "no-such/model", TRConfig(str(tmp_path)), train_dataset=pair_rows(4))


@pytest.mark.parametrize(("every", "place"), [(1, "resident"), (2, "offloaded")])
def test_the_reference_model_is_an_attribute(every, place, folder, tmp_path):
    args = TRConfig(**options(tmp_path / "run", ref_model_sync_steps=every))
    trainer = TRTrainer(folder, None, args, train_dataset=pair_rows())
    assert trainer.reference.name == place
    assert trainer.ref_model is not None
    assert trainer.ref_model is not trainer.model
    before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    trainer.train()
    for name, value in before.items():
        moved = trainer.ref_model.get_parameter(name)
        assert not torch.equal(value, moved), name
    tokens = torch.tensor([[3, 4, 5]])
    assert trainer.ref_model(tokens).logits.isfinite().all()
    args = TRConfig(**options(tmp_path / "snapshot", ref_model_mixup_alpha=1.0))
    assert TRTrainer(folder, None, args, train_dataset=pair_rows(4)).ref_model is None


def test_tags_of_the_model(folder, tmp_path):
    from peft import LoraConfig

    for method, adapter in (("dpo", None), ("kto", LoraConfig(target_modules=["q_proj"]))):
        rows = kto_rows(4) if method == "kto" else pair_rows(4)
        args = TRConfig(**options(tmp_path / method, loss_type=method))
        trainer: Any = TRTrainer(folder, None, args, train_dataset=rows, peft_config=adapter)
        assert {"trl", method, "tralign-fast"} <= {*trainer.model.model_tags}


def test_rows_are_required(folder, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        TRTrainer(folder, None, TRConfig(str(tmp_path)))
    args = TRConfig(**options(tmp_path))
    assert TRTrainer(folder, None, args, eval_dataset=pair_rows(4)).evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_config": {"r": 4}}, "peft_config: expected a configuration of PEFT .* got dict"),
        ({"quantization_config": object()}, "quantization_config: the model is loaded already"),
    ],
)
def test_keywords_that_do_not_fit(change, message, tiny_llama, small_tokenizer, tmp_path):
    given: dict[str, Any] = {"processing_class": small_tokenizer, "train_dataset": pair_rows(4)}
    with pytest.raises(ValueError, match=message):
        TRTrainer(tiny_llama, None, TRConfig(str(tmp_path)), **given, **change)


def test_an_adapter_upon_an_adapter(tiny_llama, small_tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(target_modules=["q_proj"])
    model: Any = get_peft_model(tiny_llama, adapter)
    with pytest.raises(ValueError, match="peft_config: the model has an adapter already"):
        TRTrainer(
            model, None, TRConfig(str(tmp_path)), processing_class=small_tokenizer,
            train_dataset=pair_rows(4), peft_config=adapter,
        )  # fmt: skip


@pytest.mark.parametrize("layout", [{}, {"prefix_sharing": False}, {"packing": False}])
def test_rows_padded_to_a_multiple(layout, folder, tmp_path):
    losses = []
    for multiple in (None, 32):
        args = TRConfig(**options(tmp_path / str(multiple), pad_to_multiple_of=multiple, **layout))
        trainer: Any = TRTrainer(folder, None, args, train_dataset=pair_rows())
        lengths = {b.input_ids.shape[1] for b in trainer.get_train_dataloader()}
        assert multiple is None or not any(length % multiple for length in lengths)
        losses.append(history(trainer))
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-6, rtol=0)


def test_activations_offloaded(folder, tmp_path, monkeypatch):
    """TRL's manager is entered for every step where there is an accelerator: a stand-in here, which
    copies what is saved, and counts."""
    import trl.models

    from tralign_fast.training import models

    copies = []

    def stand_in(model):
        return saved_tensors_hooks(lambda t: (copies.append(t.numel()), t.clone())[1], lambda t: t)

    monkeypatch.setattr(trl.models, "get_act_offloading_ctx_manager", stand_in, raising=False)
    losses = []
    for pretend in (False, True):
        args = TRConfig(**options(tmp_path / str(pretend), activation_offloading=pretend))
        with monkeypatch.context() as patch:
            if pretend:
                patch.setattr(TRConfig, "device", torch.device("meta"))
            manager = models.activation_offloading(torch.nn.Linear(1, 1), args)
        trainer = TRTrainer(folder, None, args, train_dataset=pair_rows())
        trainer._offloading = manager
        losses.append(history(trainer))
    assert losses[0] == losses[1]
    assert copies
    args = TRConfig(**options(tmp_path, activation_offloading=True))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="activation_offloading does nothing on a CPU"):
        models.activation_offloading(torch.nn.Linear(1, 1), args)


def test_code_of_a_model_is_asked_for(folder, tmp_path):
    config = Path(folder, "config.json")
    entries = json.loads(config.read_text())
    entries |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    config.write_text(json.dumps(entries))
    Path(folder, "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Own\n"
    )
    with pytest.raises(ValueError, match="custom code"):
        TRTrainer(folder, None, TRConfig(**options(tmp_path)), train_dataset=pair_rows(4))
    args = TRConfig(**options(tmp_path / "run", trust_remote_code=True))
    trainer = TRTrainer(folder, None, args, train_dataset=pair_rows(4))
    assert type(trainer.model).__name__ == "Model"


def script_of_trl(name: str, folder: Path) -> Path:
    """TRL's script with the two class names changed to ours, and nothing else."""
    import trl.scripts

    text = Path(trl.scripts.__path__[0], f"{name.lower()}.py").read_text()
    for theirs, ours in ((f"{name}Trainer", "TRTrainer"), (f"{name}Config", "TRConfig")):
        text = re.sub(rf"(from trl import.*?)\b{theirs}, |, {theirs}\b(?=.*import)", r"\1", text)
        text = text.replace(theirs, ours)
        imports = f"    from tralign_fast import {ours}\n"
        text = re.sub(r"(def (?:main|make_parser)\(.*\n)", rf"\1{imports}", text)
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DPO", ["--eval_strategy", "steps", "--eval_steps", "2"]),
        ("DPO", ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]),
        ("DPO", ["--dataset_streaming", "--sync_ref_model", "false"]),
        ("DPO", ["--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear"]),
        ("DPO", ["--precompute_ref_log_probs", "--sync_ref_model", "false"]),
        ("KTO", ["--eval_strategy", "steps", "--eval_steps", "2"]),
        ("KTO", ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]),
        ("KTO", ["--dataset_streaming"]),
        ("KTO", ["--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear"]),
        ("KTO", ["--precompute_ref_log_probs", "--sync_ref_model", "false"]),
    ],
)
def test_scripts_of_trl(name, arguments, folder, tmp_path, monkeypatch):
    rows: Dataset = kto_rows(16) if name == "KTO" else pair_rows(16)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows.to_json(data / f"{split}.jsonl")
    argv = [
        "--model_name_or_path", folder, "--dataset_name", str(data), "--max_steps", "3",
        "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu", "--dtype",
        "float32", "--per_device_train_batch_size", "4", "--ref_model_sync_steps", "2",
        "--learning_rate", "1e-3", "--logging_steps", "1", "--max_length", "64",
    ]  # fmt: skip
    script = script_of_trl(name, tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *argv, *arguments])
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        runpy.run_path(str(script), run_name="__main__")
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert len(losses) == 3
    assert all(0 < loss < 2 for loss in losses)
    assert ("--eval_strategy" in arguments) == any(
        "eval_loss" in log for log in state["log_history"]
    )


@pytest.mark.parametrize("size", [3, 8])
def test_kto_evaluates_as_trl_in_batches_of_any_size(size, tiny_llama, small_tokenizer, tmp_path):
    """Its KL term lends completions in groups of the training batch, whatever the evaluation's."""
    theirs, mine = run_both(
        "kto", tiny_llama, small_tokenizer, tmp_path, kto_rows(16), held_out=kto_rows(10),
        max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=size,
    )  # fmt: skip
    for trainer in (theirs, mine):
        trainer.train()
    for key in ("eval_loss", "eval_kl"):
        ours, trls = (
            [log[key] for log in t.state.log_history if key in log] for t in (mine, theirs)
        )
        assert len(ours) == 2
        assert ours == pytest.approx(trls, abs=1e-5), key
