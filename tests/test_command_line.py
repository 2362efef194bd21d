"""The command line: one line and exit code 2 for what a user can cause, a traceback for bugs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings

import pytest

from tralign_fast import cli
from tralign_fast.training.train_options import TrainOptions


def last(text):
    """The one line of ours."""
    (line,) = [line for line in text.splitlines() if line.startswith("tralign-fast: error: ")]
    assert "Traceback" not in text
    assert "usage:" not in text
    return line


def test_a_warning_of_a_command_is_one_line(monkeypatch):
    """Without this package's file and line of code; those of others keep theirs."""
    from tralign_fast import __main__

    seen, usual = [], warnings.formatwarning

    def run(arguments):
        for file in (cli.__file__, os.__file__):
            seen.append(warnings.formatwarning("it is\nso", UserWarning, file, 1))
        return 0

    monkeypatch.setattr(cli, "main", run)
    assert __main__.main(["env"]) == 0
    assert seen[0] == "tralign-fast: warning: it is so\n"
    assert seen[1] == usual("it is\nso", UserWarning, os.__file__, 1)
    assert warnings.formatwarning is usual


BEFORE_LOADING = {
    "no command": ([], "expected a command, demo or train or plan"),
    "a misspelt command": (["trian"], "did you mean train?"),
    "nothing to train": (["train"], "required: --model, --dataset"),
    "a recipe by itself": (["train", "r.yaml"], "r.yaml: expected --option value; a recipe is"),
    "a word too many": (["train", "TRAIN", "--seed", "1", "x"], "x: expected --option value"),
    "an option": (["train", "TRAIN", "--bta", "2"], "--bta: no such option; did you mean --beta?"),
    "its beginning": (["train", "TRAIN", "--label_smooth", "2"], "did you mean --label_smoothing?"),
    "of a loss that is not there": (
        ["train", "TRAIN", "--gamma", "2"], "--gamma: no such option; tralign-fast train --help"
    ),
    "twice": (["train", "TRAIN", "--beta", "1", "--beta=2"], "--beta: expected once, got it twice"),
    "twice, spelled otherwise": (
        ["train", "TRAIN", "--packing", "no", "--no_packing"], "--packing and --no_packing: exp"
    ),
    "a word for a number": (
        ["train", "TRAIN", "--beta", "abc"], "--beta: expected a finite number, got 'abc'"
    ),
    "no number": (["train", "TRAIN", "--weight_decay", "nan"], "weight_decay: expected a number"),
    "no answer": (["train", "TRAIN", "--packing", "maybe"], "--packing: expected true or false"),
    "nothing": (["train", "TRAIN", "--beta"], "--beta: expected one argument"),
    "a choice": (
        ["train", "TRAIN", "--lr_scheduler_type", "cosin"], "got 'cosin'; did you mean 'cosine'?"
    ),
    "a tracker": (["train", "TRAIN", "--report_to", "wandbb"], "did you mean 'wandb'?"),
    "a file for a folder": (
        ["train", "TRAIN", "--output_dir", "TMP/rows.jsonl/run"], "rows.jsonl/run cannot be written"
    ),
    "an unset variable": (
        ["train", "TRAIN", "--resume_from_checkpoint", ""], "expected a word that is not empty"
    ),
    "no checkpoint": (
        ["train", "TRAIN", "--resume_from_checkpoint", "TMP/no"], "expected true, auto or a"
    ),
    "two answers": (
        ["train", "TRAIN", "--resume", "--resume_from_checkpoint", "false"], "resume: expected one"
    ),
    "evaluations of nothing": (
        ["train", "TRAIN", "--eval_strategy", "steps"], 'eval_strategy="steps": expected an eval_d'
    ),
    "no rows": (["train", "TRAIN", "--dataset", "TMP/no.jsonl"], "no.jsonl: no such file"),
    "no recipe": (["train", "--config", "TMP/no.yaml"], "no.yaml: No such file or directory"),
    "plan, no number": (
        ["plan", "--model", "llama-3.2-1b", "--logits_budget_mb", "nan"], "logits_budget_mb: exp"
    ),
    "demo, an option": (["demo", "--max_step", "2"], "did you mean --max_steps?"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_what_is_seen_before_anything_is_loaded(case, recipe, tmp_path, refused):
    given, message = BEFORE_LOADING[case]
    arguments = []
    for word in given:
        arguments += ["--config", str(recipe)] if word == "TRAIN" else [
            word.replace("TMP", str(tmp_path))
        ]  # fmt: skip
    assert message in last(refused(*arguments))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(recipe, refused, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"]
    )
    line = last(refused("train", "--config", str(recipe), "--report_to", "wandb"))
    assert "report_to: wandb is not installed; expected none, or trackers that are (mlflow)" in line


RECIPES = {
    "beta: 0.1\nmax_steps: [\n": "line 3: expected the node content",
    "model: a: b\n": "line 1: mapping values are not allowed here",
    "beta: 0.1\n\nbeta: 2\n": "line 3: the option beta stands there twice",
    "seed: 1\nbetta: 1\n": "line 2: betta: no such option; did you mean beta?",
    "\tseed: 1\n": "line 1: found character",
    "- a\n- b\n": "expected lines of `option: value`, got ['a', 'b']",
    "beta: [1]\n": "line 1: beta: expected a finite number, got [1]",
    "beta: no\n": "line 1: beta: expected a finite number, got False",
    "eval_strategy: no\n": "eval_strategy: expected one of no, steps, epoch, got False (YAML reads",
    "learning_rate: 1e-6\nreference: off\n": "line 2: reference: expected one of auto",
    "learning_rate: 1e-6x\n": "line 1: learning_rate: expected a number ≥ 0, got '1e-6x'",
    "x: !!python/object/apply:os.system [ls]\n": "line 1: could not determine a constructor",
    "? [a]\n: 1\n": "line 1: expected an option's name before the colon",
    "[" * 1200: "maximum recursion depth exceeded",
    "yes: 1\n": "line 1: True: no such option",
    "beta:\n": "line 1: beta: expected a finite number, got None",
    "num_train_epochs: {a: 1}\n": "num_train_epochs: expected a number > 0, got {'a': 1}",
    "output_dir: 5\n": "line 1: output_dir: expected a word that is not empty or nothing, got 5",
    "model: off\n": "line 1: model: expected a word",
    "beta: 2024-01-01\n": "line 1: beta: expected a finite number, got datetime.date",
    "beta: .nan\n": "line 1: beta: expected a finite number, got nan",
    "config: x\n": "line 1: config: no such option",
    "gamma: 1\n": "line 1: gamma: no such option",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a]\nbeta: [*b,*b,*b,*b,*b]\n": "no such option",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipes(text, tmp_path, refused):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    line = last(refused("train", "--config", str(file)))
    assert line.startswith(f"tralign-fast: error: --config {file}: ")
    assert RECIPES[text] in line
    assert len(line) < 400 + len(str(file))


def test_a_recipe_that_is_no_text(tmp_path, refused):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"seed: 1\nrun_name: caf\xe9\n")
    assert "line 2: not UTF-8" in last(refused("train", "--config", str(file)))
    assert "Is a directory" in last(refused("train", "--config", str(tmp_path)))


def test_what_a_recipe_says_is_read(recipe):
    from tralign_fast import TRConfig

    recipe.write_text(recipe.read_text() + "beta: 1e-2\npacking: off\nloss_type: [dpo, sft]\n")
    arguments = ["--config", str(recipe), "--max_steps", "7", "--no_prefix_sharing"]
    config = cli._parse("train", [TrainOptions, TRConfig], arguments)[1]
    assert (config.beta, config.packing, config.loss_type) == (0.01, False, ["dpo", "sft"])
    assert (config.max_steps, config.prefix_sharing) == (7, False)


# --- what loading and training find ---------------------------------------------------------------


def break_weights(folder):
    (folder / "model" / "model.safetensors").write_bytes(b"\x00" * 64)


def cut_weights(folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_config(folder):
    (folder / "model" / "config.json").write_text("{")


def other_architecture(folder):
    (folder / "model" / "config.json").write_text('{"model_type": "nosuch"}')


def break_tokenizer(folder):
    (folder / "model" / "tokenizer.json").write_text("{")


def other_columns(folder):
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')


def unknown_keyword(folder):
    file = folder / "recipe.yaml"
    file.write_text(file.read_text() + "model_init_kwargs: {dtyp: float32}\n")


def unknown_schedule(folder):
    file = folder / "recipe.yaml"
    file.write_text(file.read_text() + "lr_scheduler_kwargs: {num_cycle: 1}\n")


def unknown_accelerator(folder):
    file = folder / "recipe.yaml"
    file.write_text(file.read_text() + "accelerator_config: {split: true}\n")


def best_of_what(folder):
    file = folder / "recipe.yaml"
    file.write_text(
        file.read_text() + "eval_strategy: steps\neval_steps: 1\nsave_strategy: best\n"
        f"metric_for_best_model: eval_bleu\neval_dataset: {folder}/rows.jsonl\neval_split: train\n"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "cannot load model"), (cut_weights, "cannot load model"),
        (break_config, "cannot load tokenizer"), (other_architecture, "cannot load model"),
        (break_tokenizer, "cannot load tokenizer"), (unknown_keyword, "cannot load model"),
        (other_columns, "question"), (best_of_what, "metric_for_best_model"),
        (unknown_schedule, "num_cycle"), (unknown_accelerator, "'split'"),
    ],
)  # fmt: skip
def test_what_loading_finds(damage, message, recipe, tmp_path, refused):
    damage(tmp_path)
    line = last(refused("train", "--config", str(recipe)))
    assert message in line
    assert len(line) < 700


def test_a_bug_keeps_its_traceback(recipe, monkeypatch):
    def bug(*_, **__):
        return int("x")  # a ValueError, too

    monkeypatch.setattr("tralign_fast.TRTrainer.train", bug)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train", "--config", str(recipe)])
    monkeypatch.setattr("tralign_fast.TRTrainer.train", lambda *_, **__: {}["a"])
    with pytest.raises(KeyError):
        cli.main(["train", "--config", str(recipe), "--overwrite_output_dir"])


def test_out_of_memory_names_the_plan(recipe, refused, monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")

    monkeypatch.setattr("tralign_fast.TRTrainer.train", full)
    line = last(refused("train", "--config", str(recipe)))
    assert line.endswith("Tried to allocate 2 GiB. (tralign-fast plan says what fits)")


def test_version_and_help(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tralign-fast {version('tralign-fast')}\n"
    assert cli.main(["--help"]) == 0
    assert "train     align a model of yours" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Expected: one of auto, resident, snapshot, offloaded, adapter, precomputed." in out


def steps_of(folder):
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"))
    return [json.loads(file.read_text())["global_step"] for file in states]


@pytest.mark.parametrize("named", ["true", "folder", "recipe"])
def test_resume_from_checkpoint_goes_on(named, recipe, tmp_path, monkeypatch):
    """`train` gets what was asked for, and the run goes on at the checkpoint's step."""
    from tralign_fast import TRTrainer

    base = ["train", "--config", str(recipe), "--save_steps", "1", "--learning_rate", "1e-3"]
    assert cli.main([*base, "--max_steps", "2"]) == 0
    first = steps_of(tmp_path / "run")
    assert first == [1, 2]
    done = []
    step = TRTrainer.training_step

    def counted(self, *args, **kwargs):
        done.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TRTrainer, "training_step", counted)
    which = {"true": "true", "folder": str(tmp_path / "run" / "checkpoint-1")}.get(named)
    if which is None:
        recipe.write_text(recipe.read_text() + "resume_from_checkpoint: true\n")
    extra = [] if which is None else ["--resume_from_checkpoint", which]
    assert cli.main([*base, "--max_steps", "3", *extra]) == 0
    assert done == ([1, 2] if named == "folder" else [2])


def as_process(rank, folder):
    """stderr and exit code of one of two processes, as torchrun starts them."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.environ |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        tempfile.tempdir = str(folder)
        sys.stderr = os.fdopen(writing, "w")
        code = cli.main(["nothing"])
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    return child, os.fdopen(reading)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_say_it_once(tmp_path):
    """The one that comes first waits for the one that speaks; both end with 2."""
    started = [as_process(rank, tmp_path) for rank in ("1", "0")]
    texts = [pipe.read() for _, pipe in started]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in started]
    assert codes == [2, 2]
    assert texts[0] == ""
    assert "got 'nothing'" in last(texts[1])


def test_what_one_process_alone_finds_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert cli.main(["nothing"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("(process 3)")
