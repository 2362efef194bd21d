"""`tralign-fast train` with TRL's names of adapters, bits, data sets; evaluation; its help."""

from __future__ import annotations

import json
import warnings

import pytest

from tralign_fast import TRConfig, TRTrainer, cli
from tralign_fast.command_line import Given, parse
from tralign_fast.commands.train import load_sets, renamed
from tralign_fast.training.inputs import held_out, tokenized
from tralign_fast.training.train_options import (
    TrainOptions,
    adapter_of,
    columns_given,
    loading_of,
    quantization_of,
)

NEEDED = ["--model", "m", "--dataset", "d", "--use_cpu"]


def options_of(*arguments: str):
    return parse("train", [TrainOptions, TRConfig], [*NEEDED, *arguments])


@pytest.fixture
def trained(recipe, monkeypatch):
    """trained(*arguments) -> the trainer of a run from the recipe."""
    made = []
    start = TRTrainer.__init__

    def noted(self, *args, **kwargs):
        made.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(TRTrainer, "__init__", noted)

    def run(*arguments: str) -> TRTrainer:
        assert cli.main(["train", "--config", str(recipe), *arguments]) == 0
        return made[-1]

    return run


def test_an_adapter_by_trls_names(trained, tmp_path):
    trainer = trained(
        "--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj",
        "v_proj", "--use_rslora",
    )  # fmt: skip
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 8, True)
    assert {*saved["target_modules"]} == {"q_proj", "v_proj"}
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert trainer.reference.name in ("adapter", "snapshot")


def test_a_recipe_takes_trls_names(recipe, trained, tmp_path):
    text = recipe.read_text().replace("model:", "model_name_or_path:")
    text = text.replace("dataset:", "dataset_name:")
    recipe.write_text(text + "use_peft: true\nlora_r: 2\nload_in_4bit: true\n")
    trainer = trained()
    assert trainer.model.peft_config["default"].r == 2
    found = {n.rsplit(".")[-1] for n in trainer.model.peft_config["default"].target_modules}
    assert found >= {"q_proj", "down_proj"}
    assert trainer.model.is_quantized
    recipe.write_text(text + "model: m\n")
    with pytest.raises(ValueError, match="line 11: model: expected once, model is the same"):
        Given("train", [TrainOptions, TRConfig], ["--config", str(recipe)])


WRONG = {
    "lora_r: expected use_peft true beside it": ["--lora_r", "8"],
    "load_in_4bit: quantised weights cannot be trained": ["--load_in_4bit"],
    "use_peft: expected it or the table peft_config": ["--use_peft", "--peft_config", "{}"],
    "load_in_4bit: expected it or load_in_8bit": [
        "--use_peft", "--load_in_4bit", "--load_in_8bit"
    ],
    "bnb_4bit_quant_type: expected load_in_4bit": ["--bnb_4bit_quant_type", "nf4"],
    "dtype: expected it or dtype in model_init_kwargs": [
        "--dtype", "float32", "--model_init_kwargs", '{"dtype": "bfloat16"}'
    ],
    "columns: expected a table such as": ["--columns", "prompt"],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_go_together(message):
    options, config = options_of(*WRONG[message])

    def check():
        adapter_of(options)
        quantization_of(options)
        loading_of(options, config)
        columns_given(options.columns)

    with pytest.raises(ValueError, match=message):
        check()


def test_quantised_weights_are_loaded_as_qlora_has_them():
    options, config = options_of("--use_peft", "--load_in_4bit")
    bits = quantization_of(options)
    assert (bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant) == ("nf4", True)
    assert loading_of(options, config) == {"dtype": "bfloat16"}
    options, config = options_of("--model_revision", "v2", "--attn_implementation", "sdpa")
    assert loading_of(options, config) == {"revision": "v2", "attn_implementation": "sdpa"}


def test_columns_under_other_names(recipe, trained, tmp_path, refused):
    rows = [{"q": "the cat", "good": " sings", "rejected": " sleeps", "prompt": "no"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    trainer = trained("--columns", "prompt=q,chosen=good", "--max_steps", "1")
    ids = trainer.train_dataset[0]
    decoded = trainer.processing_class.decode(ids["prompt_ids"])
    assert "the cat" in decoded
    line = refused("train", "--config", str(recipe), "--columns", "prompt=nothing",
                   "--overwrite_output_dir")  # fmt: skip
    assert "has no column 'nothing'; found q, good, rejected, prompt" in line


def test_columns_may_change_places():
    from datasets import Dataset

    rows = Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    swapped = renamed(rows, {"chosen": "rejected", "rejected": "chosen"}, "rows")
    assert swapped[0] == {"chosen": "b", "rejected": "a"}


def test_an_evaluation_set_is_evaluated_on(trained, tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    trainer = trained("--eval_dataset", rows, "--eval_split", "train", "--max_steps", "2")
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated == [1, 2]
    trainer = trained(
        "--eval_split", "train[:4]", "--eval_strategy", "no", "--overwrite_output_dir"
    )
    assert not [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(trainer.eval_dataset) == 4


def test_an_evaluation_on_the_rows_of_the_training_is_said(tmp_path, recwarn, small_tokenizer):
    """A file is one split, whatever its name: `--eval_split test` alone reads all of it again."""
    rows = tmp_path / "rows.jsonl"
    line = '{{"chosen": "{0} a", "rejected": "{0} b"}}\n'
    rows.write_text("".join(line.format(i) for i in range(10)))
    folder = tmp_path / "folder"
    folder.mkdir()

    def warned(source: object, *arguments: str) -> int:
        recwarn.clear()
        warnings.simplefilter("always")
        given = ["--model", "m", "--dataset", str(source)]
        if "--eval_dataset" not in arguments:
            given += ["--eval_dataset", str(source)]
        train, test = load_sets(parse("train", [TrainOptions], [*given, *arguments])[0])
        held_out(
            test, tokenized(train, small_tokenizer, args, "train", True), small_tokenizer, args
        )
        said = [str(w.message) for w in recwarn if "trained on" in str(w.message)]
        assert all(f"of {len(test)} rows" in message for message in said)
        return sum(int(message.split()[1]) for message in said)

    args = TRConfig(str(tmp_path / "out"), use_cpu=True, report_to=[])

    assert warned(rows, "--eval_split", "test") == 10
    assert warned(rows, "--eval_split", "tset", "--dataset_split", "train") == 10
    assert warned(rows, "--eval_split", "train[:4]", "--dataset_split", "train[4:]") == 0
    # a slice of what is trained on whole, and the whole of what is trained on in part
    assert warned(rows, "--eval_split", "train[90%:]") == 1
    assert warned(rows, "--eval_split", "test[90%:]") == 1
    assert warned(rows, "--dataset_split", "train[:90%]") == 9
    # slices that overlap
    overlapping = ("--dataset_split", "train[:90%]", "--eval_split", "train[60%:]")
    assert warned(rows, *overlapping) == 3
    # the same file by another path
    other = tmp_path / "." / "folder" / ".." / "rows.jsonl"
    assert warned(rows, "--eval_dataset", str(other)) == 10
    (folder / "train.jsonl").write_text(rows.read_text())
    (folder / "test.jsonl").write_text("".join(line.format(i) for i in range(8, 28)))
    assert warned(folder) == 2  # which another file may have, too
    assert warned(folder, "--eval_split", "train") == 10
    assert warned(folder, "--eval_split", "train[:4]") == 4
    assert warned(folder, "--eval_split", "test[2:]") == 0


def test_a_configuration_is_of_the_hub(recipe, refused):
    line = refused("train", "--config", str(recipe), "--dataset_config", "en")
    assert "datasets of the hub have configurations, got 'en'" in line


def test_help_has_its_own_options_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "--help-all"])
    whole = capsys.readouterr().out
    places = [short.index(f"\n{title}:") for title in (
        "what is trained on what", "adapters and few bits", "the loss", "the reference", "the rows",
        "of the training loop, as in transformers' TrainingArguments", "about",
    )]  # fmt: skip
    assert places == sorted(places)
    assert len(short.splitlines()) < 230
    assert "--config" in short
    assert "--hub_model_id" not in short
    assert "--hub_model_id" in whole
    missing = [n for c in (TrainOptions, TRConfig) for n, f in c.__dataclass_fields__.items()
               if f.init and n[0] != "_" and f"--{n}" not in whole]  # fmt: skip
    assert missing == []
