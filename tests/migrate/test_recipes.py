"""YAML of axolotl and LLaMA-Factory as recipes of `tralign-fast train`."""

from __future__ import annotations

import json

import pytest
import yaml

from tralign_fast import TRConfig, cli
from tralign_fast.training.train_options import TrainOptions

AXOLOTL = """\
# of axolotl's examples
base_model: MODEL
model_type: LlamaForCausalLM
load_in_4bit: false
chat_template: llama3

rl: dpo
datasets:
  - path: DATA
    ds_type: json
    split: train
val_set_size: 0.25  # for evaluations
output_dir: ./out
sequence_len: 64  # tokens
sample_packing: false
adapter: lora
lora_model_dir:
lora_r: 4
lora_alpha: 8
lora_target_linear: true
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: constant
learning_rate: 2e-3
bf16: false
gradient_checkpointing: true
logging_steps: 1
evals_per_epoch: 2
saves_per_epoch: 1
warmup_steps: 1
weight_decay: 0.0
flash_optimum: true
"""
FACTORY = """\
### model
model_name_or_path: MODEL

### method
stage: dpo
do_train: true
finetuning_type: full
pref_beta: 0.2
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]
pref_ftx: 0.5

### dataset
dataset: mine
dataset_dir: FOLDER
template: qwen3
cutoff_len: 64
max_samples: 6

### output
output_dir: out
logging_steps: 1
save_steps: 500
plot_loss: true
report_to: none  # choices: [none, wandb]

### train
per_device_train_batch_size: 2
learning_rate: 1.0e-3
num_train_epochs: 1.0
warmup_ratio: 0.1
"""


def migrated(text, tmp_path, capsys, *arguments):
    """The recipe, and what is said of it."""
    file, out = tmp_path / "given.yaml", tmp_path / "recipe-of-it.yaml"
    file.write_text(text)
    out.unlink(missing_ok=True)
    capsys.readouterr()
    assert cli.main(["migrate", str(file), "--output", str(out), *arguments]) == 0
    return out, capsys.readouterr().err


def options(file):
    return cli._parse("train", [TrainOptions, TRConfig], ["--config", str(file)])


def filled(text, tmp_path):
    names = {"MODEL": "model", "DATA": "rows.jsonl", "FOLDER": ""}
    for word, name in names.items():
        text = text.replace(word, str(tmp_path / name))
    info = {"mine": {"file_name": "rows.jsonl", "ranking": True}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return f"{text}use_cpu: true\n"


def test_axolotl(recipe, tmp_path, capsys, monkeypatch):
    out, said = migrated(filled(AXOLOTL, tmp_path), tmp_path, capsys)
    found = yaml.safe_load(out.read_text())
    assert found["peft_config"] == {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
    assert (found["dataset_split"], found["eval_split"]) == ("train[:75%]", "train[75%:]")
    assert (found["eval_steps"], found["save_strategy"]) == (0.5, "epoch")
    assert "quantization_config" not in found
    assert "max_length: 64  # tokens\n" in out.read_text()
    assert out.read_text().startswith("# of axolotl's examples\nmodel: ")
    for line in (
        "sync_ref_model: True by default here; the reference stays frozen",
        "evaluation: the last 0.25 of the rows",
        "not kept: line 5: chat_template=llama3: the tokenizer's own template is taken",
        "not kept: line 33: flash_optimum=True: it has no counterpart",
    ):
        assert line in said
    given, config = options(out)
    assert (given.model, config.max_length, config.learning_rate) == (found["model"], 64, 2e-3)
    assert config.trust_region.is_frozen
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", str(out)]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)


def test_llama_factory(recipe, tmp_path, capsys, monkeypatch):
    out, said = migrated(filled(FACTORY, tmp_path), tmp_path, capsys)
    found = yaml.safe_load(out.read_text())
    assert found["loss_type"] == ["sigmoid", "sft"]
    assert found["loss_weights"] == [1.0, 0.5]
    assert found["dataset"] == str(tmp_path / "rows.jsonl")
    assert (found["dataset_split"], found["beta"]) == ("train[:6]", 0.2)
    assert (found["warmup_steps"], found["max_length"]) == (0.1, 64)
    assert "report_to: none  # choices: [none, wandb]\n" in out.read_text()
    assert "template=qwen3: the tokenizer's own chat template" in said
    assert "pref_ftx: the SFT term is a mean over the tokens" in said
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", str(out)]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


LEAST = "base_model: m\ndatasets: [{path: d}]\noutput_dir: o\nrl: dpo\n"
LEAST_FACTORY = "model_name_or_path: m\ndataset: d\noutput_dir: o\nstage: dpo\n"
# lines beside the least of a YAML -> options of the recipe
MEANS = {
    (LEAST, "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\n"): {
        "loss_type": "kto", "beta": 0.5, "desirable_weight": 0.2
    },
    (LEAST, "rl: ipo\n"): {"loss_type": "ipo", "max_length": 512, "lr_scheduler_type": "cosine"},
    (LEAST, "rpo_alpha: 2.0\n"): {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]},
    (LEAST, "trust_region_alpha: 1.0\ntrust_region_every: 9\n"): {
        "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 9
    },
    (LEAST, "load_in_4bit: true\nadapter: qlora\nlora_target_modules: [q_proj]\n"): {
        "peft_config": {"target_modules": ["q_proj"]},
        "quantization_config": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    },
    (LEAST, "special_tokens: {pad_token: '<p>'}\nwandb_project: w\nwandb_name: n\n"): {
        "pad_token": "<p>", "report_to": "wandb", "run_name": "n"
    },
    (LEAST, "test_datasets: [{path: t, split: test}]\nmicro_batch_size: 3\neval_steps: 5\n"): {
        "eval_dataset": "t", "eval_split": "test", "per_device_eval_batch_size": 3,
        "eval_strategy": "steps", "eval_steps": 5,
    },
    (LEAST, "val_set_size: 100\n"): {
        "dataset_split": "train[:-100]", "eval_split": "train[-100:]", "eval_strategy": "epoch"
    },
    (LEAST, "bf16: auto\nsdp_attention: true\nrevision_of_model: r\n"): {
        "model_init_kwargs": {"dtype": "bfloat16", "revision": "r", "attn_implementation": "sdpa"}
    },
    (LEAST, "gradient_checkpointing: offload\nhub_model_id: a/b\n"): {
        "gradient_checkpointing": True, "activation_offloading": True, "push_to_hub": True
    },
    (LEAST_FACTORY, ""): {
        "peft_config": {
            "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"
        },
        "learning_rate": 5e-5, "max_length": 2048,
    },
    (LEAST_FACTORY, "stage: kto\nkto_chosen_weight: 2\n"): {
        "loss_type": "kto", "desirable_weight": 2, "train_sampling_strategy": "random"
    },
    (LEAST_FACTORY, "pref_loss: ipo\nflash_attn: fa2\nbf16: true\nlora_target: q_proj,v_proj\n"): {
        "loss_type": "ipo",
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
    },
    (LEAST_FACTORY, "quantization_bit: 8\nval_size: 0.1\n"): {
        "quantization_config": {"load_in_8bit": True}, "eval_split": "train[90%:]"
    },
}  # fmt: skip


def with_lines(least, lines):
    """The lines take the place of those of the same option."""
    names = {line.split(":")[0] for line in lines.splitlines()}
    return "".join(k for k in least.splitlines(True) if k.split(":")[0] not in names) + lines


@pytest.mark.parametrize(("least", "lines"), MEANS)
def test_what_lines_mean(least, lines, tmp_path, capsys):
    out, _ = migrated(with_lines(least, lines), tmp_path, capsys)
    found = yaml.safe_load(out.read_text())
    assert {name: found.get(name) for name in MEANS[least, lines]} == MEANS[least, lines]
    assert found["sync_ref_model"] is ("trust_region_every" in lines)
    if "wandb" not in lines and "bf16: true" not in lines:  # which this machine may not have
        assert options(out)[0].model == "m"
    assert cli.main(["migrate", str(out)]) == 0
    assert "one of this library already" in capsys.readouterr().err
    moving, said = migrated(with_lines(least, lines), tmp_path, capsys, "--moving")
    assert yaml.safe_load(moving.read_text()).get("sync_ref_model", True) is True
    assert "sync_ref_model: the reference moves" in said or "trust_region_every" in lines


LOST = {
    (LEAST_FACTORY, "stage: kto\npref_ftx: 0.1\n"): "line 4: pref_ftx: sft is a loss of pairs",
    (LEAST_FACTORY, "ref_model: r\n"): "line 5: ref_model=r: a script: TRTrainer(model, ref_model=",
    (LEAST_FACTORY, "dataset: a,b\n"): "line 4: dataset: the first of 2 is taken",
    (LEAST_FACTORY, "finetuning_type: oft\n"): "finetuning_type=oft: peft_config is a table",
    (LEAST_FACTORY, "galore_rank: 4\n"): "line 5: galore_rank=4: it has no counterpart",
    (LEAST, "trl: {beta: 0.2, use_vllm: true}\n"): "line 5: trl: use_vllm: it has no counterpart",
    (LEAST, "datasets: [{path: d, type: chatml.intel}]\n"): "line 4: datasets: type, field_*: rows",
    (LEAST, "beta: 0.1\nlabel_smoothing: 0.7\n"): "refused: label_smoothing: expected",
    (LEAST, "plugins: [a.B]\n"): "line 5: plugins: a.B: it has no counterpart",
    (LEAST, "max_steps: 5\nevals_per_epoch: 2\nval_set_size: 1\n"): "write eval_steps beside",
}  # fmt: skip


@pytest.mark.parametrize(("least", "lines"), LOST)
def test_what_is_lost(least, lines, tmp_path, capsys):
    _, said = migrated(with_lines(least, lines), tmp_path, capsys)
    (line,) = [line for line in said.splitlines() if LOST[least, lines] in line]
    assert line.startswith("not kept: ")
    assert LOST[least, lines] not in migrated(least, tmp_path, capsys)[1]


REFUSED = {
    "base_model: m\n": "rl: expected dpo, ipo or kto (other trainings have no reference), got None",
    "base_model: m\nrl: orpo\n": "rl: expected dpo, ipo or kto, got 'orpo'",
    "model_name_or_path: m\nstage: sft\n": "stage: expected dpo or kto (other stages have no refe",
    "model_name_or_path: m\nstage: dpo\npref_loss: simpo\n": "pref_loss: expected sigmoid, hinge o",
    "a: 1\n": "expected a YAML of axolotl (base_model, rl), of LLaMA-Factory",
    "- a\n": "expected lines of `option: value`, got ['a']",
    "": "expected lines of `option: value`, got None",
    "a: [\n": "line 2: expected the node content",
    "a: 1\na: 2\n": "line 2: expected an option's name that stands there once, got 'a'",
    "? [a]\n: 1\n": "unhashable",
    "x: !!python/object/apply:os.system [ls]\n": "could not determine a constructor",
    "[" * 1200: "recursion",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text, tmp_path, refused):
    file = tmp_path / "given.yaml"
    file.write_text(text)
    (line,) = refused("migrate", str(file)).splitlines()
    assert REFUSED[text] in line
    assert len(line) < 400 + len(str(file))


TABLES = {
    "peft_config": {
        '{"rr": 4}': "peft_config: LoraConfig has no 'rr'",
        "[4]": "peft_config: expected a table such as",
        "{r": "peft_config: expected JSON such as",
    },
    "quantization_config": {
        '{"load_in_4bits": true}': "has no 'load_in_4bits'; did you mean load_in_4bit?",
        '{"load_in_4bit": "yes"}': "quantization_config: load_in_4bit must be a boolean",
    },
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in TABLES for t in TABLES[n]])
def test_tables_of_the_command_line(name, text, recipe, refused):
    assert TABLES[name][text] in refused("train", "--config", str(recipe), f"--{name}", text)


def test_4_bits_and_an_adapter_by_the_command_line(recipe, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    recipe.write_text(recipe.read_text() + "quantization_config: {load_in_4bit: true}\n")
    adapter = '{"r": 4, "target_modules": ["q_proj"]}'
    assert cli.main(["train", "--config", str(recipe), "--peft_config", adapter]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
