"""merge, generate, eval, recipes, env: on a run of a tiny model, and what each refuses."""

from __future__ import annotations

import json
import re
import resource
import shutil
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tralign_fast import cli
from tralign_fast.commands import recipes
from tralign_fast.commands.generate import side_by_side
from tralign_fast.commands.models import dtype_of, load_model
from tralign_fast.commands.samples import complete, prompt_ids_of


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    """Folder of a run with LoRA, from the same model as `run`."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    model, rows = run.parent / "model", run.parent / "rows.jsonl"
    assert cli.main([
        "train", "--model", str(model), "--dataset", str(rows), "--output_dir", str(folder),
        "--max_steps", "4", "--ref_model_sync_steps", "2", "--use_cpu", "--report_to", "none",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_peft",
        "--lora_r", "4",
    ]) == 0  # fmt: skip
    return folder


def test_a_full_disk_leaves_no_half_of_a_merged_model(adapter, tmp_path, refused):
    output = tmp_path / "merged"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        line = refused("merge", str(adapter), "--output", str(output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"--output {output} cannot be written (Error while serializing" in line
    assert not output.exists()
    assert cli.main(["merge", str(adapter), "--output", str(output)]) == 0


def test_a_merged_model_computes_what_base_and_adapter_do(adapter, run, tmp_path, refused, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "merged"
    assert cli.main(["merge", str(adapter), "--output", str(output)]) == 0
    ids = torch.arange(3, 19)[None]
    merged = load_model(str(output))
    base = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    before = base(input_ids=ids).logits
    with_adapter = PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, with_adapter(input_ids=ids).logits)
    assert (merged(input_ids=ids).logits - before).abs().max() > 1e-3
    assert not (output / "adapter_config.json").exists()
    assert (output / "tokenizer.json").is_file()
    assert "holds files; expected a new" in refused("merge", str(adapter), "--output", str(output))
    line = refused("merge", str(run), "--output", str(tmp_path / "x"))
    assert "no adapter: expected adapter_config.json" in line


def test_completions_side_by_side(adapter, capsys):
    arguments = ["--prompt", "the cat", "--prompt", "a dog", "--max_new_tokens", "4"]
    assert cli.main(["generate", str(adapter), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("▸ ") == 2
    assert out.count("│") >= 6
    rows = str(adapter.parent / "rows.jsonl")
    with open(rows, "w") as file:
        file.write('{"prompt": "the cat"}\n')
    more = ["--prompts", rows, "--temperature", "1", "--max_new_tokens", "2", "--raw"]
    assert cli.main(["generate", str(adapter), str(adapter), *more]) == 0
    text = side_by_side("p", ["a", "b" * 90], ["one two", ""])
    assert "(nothing)" in text
    assert len({line.index("│") for line in text.splitlines() if "│" in line}) == 1


def test_completions_do_not_depend_on_the_batch():
    tokenizer = make_small_tokenizer()
    model = make_tiny_llama(tokenizer)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    together = complete(model, tokenizer, prompts, 6)
    alone = [complete(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert together == alone
    assert model.training is False or model.training  # kept as it was
    rows = [{"prompt_ids": [i // 2]} for i in range(10)]
    assert prompt_ids_of(rows, 3) == [[0], [1], [3]]
    assert len(prompt_ids_of(rows, 50)) == 5


def test_an_evaluation_is_the_trainers(run, tmp_path, capsys):
    rows = run.parent / "rows.jsonl"
    (tmp_path / "judge.py").write_text("def score(prompt, completion):\n    return 1\n")
    output = tmp_path / "figures.json"
    assert cli.main([
        "eval", str(run), "--dataset", str(rows), "--split", "train[:4]", "--output", str(output),
        "--judge", f"{tmp_path}/judge.py:score", "--judge_prompts", "2", "--max_new_tokens", "2",
    ]) == 0  # fmt: skip
    out = capsys.readouterr().out
    figures = json.loads(output.read_text())
    logged = [
        log for log in json.loads((run / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in log
    ][-1]  # fmt: skip
    assert figures["logps/chosen"] == pytest.approx(logged["eval_logps/chosen"], rel=1e-4)
    assert figures["kl/initial"] == pytest.approx(logged["eval_kl/initial"], rel=1e-2)
    assert figures["rewards/margins"] > 0
    assert figures["judge"] == {"model": 1, "reference": 1, "win_rate": 0.5, "prompts": 2}
    assert re.search(r"rewards/accuracies +1\.0000", out)


def test_an_adapter_is_evaluated_against_its_base(adapter, run, capsys):
    rows = str(run.parent / "rows.jsonl")
    assert cli.main(["eval", str(adapter), "--dataset", rows, "--json", "--limit", "4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == 4
    assert figures["reference"] == str(run.parent / "model")
    assert figures["rewards/margins"] > 0.01


def test_a_model_that_was_not_trained_equals_its_start_of_another_dtype(tmp_path, run, capsys):
    model = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    model.bfloat16().save_pretrained(tmp_path / "start")
    model.float().save_pretrained(tmp_path / "run")  # as `train` loads and saves it
    for folder in (tmp_path / "start", tmp_path / "run"):
        for file in run.parent.glob("model/*token*"):
            shutil.copy(file, folder)
    rows = str(run.parent / "rows.jsonl")
    for recorded in (None, "dtype: null\nmodel: START\n"):
        if recorded:
            text = recorded.replace("START", str(tmp_path / "start"))
            (tmp_path / "run" / "config.yaml").write_text(text)
        start = [] if recorded else ["--reference", str(tmp_path / "start")]
        assert cli.main(["eval", str(tmp_path / "run"), "--dataset", rows, "--json", *start]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["rewards/chosen"] == figures["rewards/margins"] == 0.0
        assert figures["rewards/accuracies"] == 0.0


def test_an_adapter_is_evaluated_on_the_base_that_it_was_trained_on(tmp_path):
    """Merged into bf16, most of a small step is rounded away."""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert dtype_of(str(tmp_path)) == "auto"
    for config, dtype in (
        ("dtype: null", "float32"), ("dtype: bfloat16", "bfloat16"),
        ("dtype: null\nload_in_4bit: true", "bfloat16"),
    ):  # fmt: skip
        (tmp_path / "config.yaml").write_text(config)
        assert dtype_of(str(tmp_path)) == dtype
        assert dtype_of(str(tmp_path / "checkpoint-2")) == dtype


def test_two_models_read_their_own_tokens(run, tmp_path, capsys):
    def said(*models):
        words = [*map(str, models), "--prompt", "the cat", "--max_new_tokens", "6"]
        assert cli.main(["generate", *words]) == 0
        lines = capsys.readouterr().out.splitlines()[4:]
        return [[cell.strip() for cell in line.split(" │ ")] for line in lines if line]

    first, other = run.parent / "model", tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(first)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}"
    tokenizer.save_pretrained(other)
    alone = [" ".join(cell for line in said(model) for cell in line) for model in (first, other)]
    assert alone[0] != alone[1]
    beside = zip(*said(first, other), strict=True)
    assert [" ".join(cells).strip() for cells in beside] == alone


JUDGES = {
    "nan": ("def f(prompt, completion): return float('nan')", "expected a finite number of each"),
    "nothing": ("def f(prompt, completion): pass", "expected a finite number of each completion"),
    "one argument": ("def f(completion): return 1", "expected a function of (prompt, completion)"),
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_gives_numbers(judge, run, tmp_path, refused):
    text, message = JUDGES[judge]
    (tmp_path / "judge.py").write_text(text)
    words = ["--judge", f"{tmp_path}/judge.py:f", "--judge_prompts", "1", "--max_new_tokens", "1"]
    rows = str(run.parent / "rows.jsonl")
    assert message in refused("eval", str(run), "--dataset", rows, *words)


REFUSED = {
    "--judge_prompts: expected a whole number ≥ 1, got 0": [
        "eval",
        "RUN",
        "--dataset",
        "d",
        "--judge_prompts",
        "0",
    ],
    "--limit: expected a whole number ≥ 1, got 0": ["eval", "RUN", "--dataset", "d", "--limit=0"],
    "expected prompts of a token or more": ["generate", "RUN", "--raw", "--prompt", ""],
    "no such folder": ["generate", "./none", "--prompt", "a"],
    'expected --prompt "TEXT"': ["generate", "RUN"],
    "expected one or two models, got 3": ["generate", "a", "b", "c"],
    "names no start; expected --reference": ["eval", "RUN/../model", "--dataset", "d"],
    "expected FILE.py:FUNCTION": ["eval", "RUN", "--dataset", "d", "--judge", "none.py:f"],
    "required: --dataset": ["eval", "RUN"],
    "required: --output": ["merge", "RUN"],
    "holds no model": ["merge", "TMP", "--output", "o"],
    "did you mean smollm2-135m-tr-dpo?": ["recipes", "cp", "smollm2-135m-tr-dp"],
    "recipes cp: expected a name": ["recipes", "cp"],
    "invalid choice: 'list'": ["recipes", "list"],
    "none.yaml: No such file": ["recipes", "check", "none.yaml"],
    "--verbos: no such option": ["env", "--verbos"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message, run, tmp_path, refused):
    words = [w.replace("RUN", str(run)).replace("TMP", str(tmp_path)) for w in REFUSED[message]]
    err = refused(*words)
    assert message in err
    assert "Traceback" not in err
    assert err.count("tralign-fast: error:") == 1


def test_env_says_where_it_runs(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(version('torch'))}$", out, re.MULTILINE)
    assert "kernels" in out


def test_a_reader_who_has_enough_is_told_nothing(monkeypatch, capsys):
    def closed(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_run", closed)
    assert cli.main(["env"]) == 141
    assert capsys.readouterr().err == ""


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_listed_copied_and_checked(tmp_path, monkeypatch, capsys):
    assert cli.main(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    found = recipes.shipped()
    assert 12 <= len(found) <= 15
    assert all(recipe.name in out for recipe in found)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "cp", "smollm2-135m-tr-dpo"]) == 0
    assert cli.main(["recipes", "check", "smollm2-135m-tr-dpo.yaml"]) == 0
    out = capsys.readouterr().out
    assert "TR-DPO of HuggingFaceTB/SmolLM2-135M-Instruct on" in out
    assert cli.main(["recipes", "cp", "smollm2-135m-tr-dpo"]) == 2
    (tmp_path / "bad.yaml").write_text("model: m\ndataset: d\nlora_r: 4\n")
    assert cli.main(["recipes", "check", "bad.yaml"]) == 2
    assert "expected use_peft true" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", recipes.shipped(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_one_that_train_takes(recipe):
    assert recipes.check(recipe.name)
    assert recipe.gib + 1 <= recipe.card


def planned(name: str) -> float:
    from tralign_fast.command_line import SHIPPED, parse
    from tralign_fast.memory.plan import make_plan
    from tralign_fast.memory.plan_answer import GIB
    from tralign_fast.memory.plan_options import PlanOptions
    from tralign_fast.memory.plan_recipe import plan_arguments

    words, more = plan_arguments(["--config", str(SHIPPED / f"{name}.yaml"), "--no_alternatives"])
    (options,) = parse("plan", [PlanOptions], words)
    options.more = more
    return make_plan(options).asked.report.peak / GIB


def matrix_but(name: str) -> list:
    marks = {True: [], False: [pytest.mark.matrix]}
    return [pytest.param(r, id=r.name, marks=marks[r.name == name]) for r in recipes.shipped()]


@pytest.mark.parametrize("recipe", matrix_but("llama-3.2-1b-tr-dpo"))
def test_a_recipe_needs_what_it_says(recipe):
    assert planned(recipe.name) == pytest.approx(recipe.gib, rel=0.02, abs=0.06)


def test_a_recipe_that_ships_is_found_by_its_name(tmp_path, refused):
    line = refused("train", "--config", "smollm2-135m-tr-dpo", "--dataset", "./none.jsonl",
                   "--output_dir", str(tmp_path / "o"))  # fmt: skip
    assert "./none.jsonl: no such file" in line
