"""The blocks of the README and of docs/drop-in.md run as they stand there; its table of losses is
that of `LOSSES`, and what the documents link to and name is there."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_tiny_llama, words
from tralign_fast import LOSSES, TRConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
# what shows in a block which one it is
README_BLOCKS = {
    "script": "trainer.save_model()",
    "trl": "use_fast_logprobs(trainer)",
    "any_trainer": "ref_model=trainer.ref_model",
    "loop": "should_sync",
    "liger": "FusedLinearDPOLoss",
}
DROP_IN_BLOCKS = {
    "trl_user": "import TRConfig",
    "peft": "get_peft_model",
    "ops": "log_softmax",
    "hub": "get_local_kernel",
    "axolotl": "plugins:",
    "llama_factory": "MovingReference",
}


def block(name: str) -> str:
    file, language, names = (
        (README, "python", README_BLOCKS)
        if name in README_BLOCKS
        else (ROOT / "docs" / "drop-in.md", "diff", DROP_IN_BLOCKS)
    )
    blocks = re.findall(rf"```{language}\n(.*?)```", file.read_text(), re.S)
    assert len(blocks) == len(names)
    (found,) = [text for text in blocks if names[name] in text]
    return found


def side(name: str, mark: str) -> str:
    """The block before (-) or after (+)."""
    lines = block(name).splitlines()
    return "\n".join(line[1:] for line in lines if line[:1] in (mark, " "))


@pytest.fixture
def names(tmp_path, monkeypatch, small_tokenizer):
    """What a reader has who pastes a block: a model, rows, a tokenizer. Runs take no time here."""
    trl = pytest.importorskip("trl")
    import tralign_fast

    monkeypatch.chdir(tmp_path)
    small = {
        "use_cpu": True, "max_steps": 2, "report_to": [], "per_device_train_batch_size": 2,
        "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    for module, config in ((trl, "DPOConfig"), (tralign_fast, "TRConfig")):
        monkeypatch.setattr(module, config, functools.partial(getattr(module, config), **small))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {key: words(n, generator) for key, n in (("prompt", 6), ("chosen", 5), ("rejected", 5))}
        for _ in range(8)
    ]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    make_tiny_llama(small_tokenizer).save_pretrained("start")  # TRL loads its reference from there
    model = AutoModelForCausalLM.from_pretrained("start")
    return {"model": model, "rows": Dataset.from_list(rows), "tokenizer": small_tokenizer}


# --- README: blocks -------------------------------------------------------------------------------


def test_the_script_runs_as_it_is(tmp_path, monkeypatch, small_tokenizer):
    """Unchanged: a tiny model lies in a folder of the name that the script gives."""
    monkeypatch.chdir(tmp_path)
    (model,) = re.findall(r'model = "(.*?)"', block("script"))
    make_tiny_llama(small_tokenizer).save_pretrained(model)
    small_tokenizer.save_pretrained(model)
    scope: dict[str, Any] = {}
    exec(block("script"), scope)
    assert scope["trainer"].state.global_step == 8
    losses = [log["loss"] for log in scope["trainer"].state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[3] < losses[0]
    assert scope["trainer"].state.log_history[-2]["tr/syncs"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_trl(names):
    exec(block("trl"), names)
    assert names["trainer"].state.global_step == 2
    from tralign_fast.integrations.trl import use_fast_logprobs

    with pytest.raises(ValueError, match="in use already"):
        use_fast_logprobs(names["model"])
    names["undo"]()
    use_fast_logprobs(names["model"])()


def test_any_trainer(names, tmp_path):
    from transformers import TrainingArguments

    from tests.integrations.test_any_trainer import ROWS, PairTrainer
    from tralign_fast.model.scoring import enable_logprobs

    enable_logprobs(names["model"])
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1, report_to=[],
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = PairTrainer(
        names["model"], args, data_collator=lambda rows: rows[0], train_dataset=ROWS
    )
    trainer.ref_model = copy.deepcopy(names["model"])
    exec(block("any_trainer"), {"trainer": trainer})
    assert trainer.state.global_step == 2


def test_a_loop_of_ones_own(names):
    """The reference moves after the last step; the log-prob of an answer is PyTorch's."""
    start = copy.deepcopy(names["model"])
    names["rows"] = [names["rows"][i % 8] for i in range(64)]
    exec(block("loop"), names)
    assert names["step"] == 64
    for moved, theta, first in zip(
        names["reference"].parameters(),
        names["model"].parameters(),
        start.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(moved, 0.6 * theta + 0.4 * first)
        assert not torch.equal(theta, first)
    row = names["rows"][0]
    prompt, whole = (
        names["tokenizer"](text, return_tensors="pt")["input_ids"]
        for text in (row["prompt"], row["prompt"] + row["chosen"])
    )
    rows = start(whole).logits[0].log_softmax(-1)
    expected = sum(rows[t - 1, whole[0, t]] for t in range(prompt.shape[1], whole.shape[1]))
    torch.testing.assert_close(names["logps"](start, row["prompt"], row["chosen"])[0], expected)


def test_liger_gives_the_same(monkeypatch):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # wants a C++ compiler
    torch.manual_seed(0)
    given = {
        "weight": torch.randn(50, 8), "hidden": torch.randn(4, 6, 8),
        "target": torch.randint(0, 50, (4, 6)), "ref_weight": torch.randn(50, 8),
        "ref_hidden": torch.randn(4, 6, 8),
    }  # fmt: skip
    scope = {key: value.clone() for key, value in given.items()}
    exec(block("liger"), scope)
    call = block("liger").split("loss, metrics = ")[1]
    scope_of_liger = {"FusedLinearDPOLoss": liger.LigerFusedLinearDPOLoss, **given}
    theirs = eval(call, scope_of_liger)
    torch.testing.assert_close((scope["loss"], scope["metrics"]), theirs)  # and every metric


def test_the_commands_are_understood():
    from tralign_fast.cli import _parse
    from tralign_fast.memory.plan import PlanOptions
    from tralign_fast.migrate.command import migration_options
    from tralign_fast.training.train_options import TrainOptions

    classes = {"train": [TrainOptions, TRConfig], "plan": [PlanOptions]}
    commands = re.findall(r"^tralign-fast (\w+) (.*)$", README.read_text(), re.M)
    assert [verb for verb, _ in commands] == ["train", "train", "plan", "migrate"]
    for verb, rest in commands:
        arguments = shlex.split(rest.replace("recipes/", f"{ROOT}/recipes/"), comments=True)
        if verb == "migrate":
            assert migration_options(arguments).file == "dpo.py"
            continue
        if "--config" in arguments:  # bf16 is asked for there
            arguments += ["--bf16", "false", "--use_cpu", "true"]
        assert _parse(verb, classes[verb], arguments)


# --- README: the losses ---------------------------------------------------------------------------


def loss_table() -> dict[str, list[str]]:
    """A loss's name -> the other cells of its row."""
    text = README.read_text().split("| `loss_type` |")[1].split("\n\n")[0]
    table = {}
    for line in text.splitlines()[2:]:
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        table |= dict.fromkeys(re.findall(r"`(\w+)`", first), cells)
    return table


def accepts(loss: str, **options: Any) -> bool:
    """Whether a run with that loss takes the option."""
    try:
        TRConfig("out", loss_type=loss, use_cpu=True, bf16=False, report_to=[], **options)
    except ValueError as error:
        if next(iter(options)) not in str(error):
            raise
        return False
    return True


def test_the_table_of_losses_is_the_registry():
    table = loss_table()
    assert sorted(table) == sorted(LOSSES)
    yes = {True: "yes", False: "–"}
    for name, spec in LOSSES.items():
        own = [
            f"`{o.name}` {str(o.range).removesuffix(' and finite')}"
            for o in spec.options
            if o.name != "beta"
        ]
        assert table[name] == [
            "pairs" if spec.paired else "labels",
            ", ".join(own) or "–",
            yes[accepts(name, f_divergence_type="forward_kl")],
            yes[accepts(name, ld_alpha=0.5)],
            yes[accepts(name, use_weighting=True)],
            yes[spec.kernel],
        ], name


def test_the_sum_of_losses_is_taken():
    (call,) = re.findall(r'`(TRConfig\("out", loss_type=\[.*?\))`', README.read_text())
    config = eval(call, {"TRConfig": functools.partial(TRConfig, use_cpu=True, bf16=False)})
    assert config.objective.names == ("sigmoid", "bco_pair", "sft")
    assert config.objective.weights == (0.8, 0.2, 1.0)


# --- docs/drop-in.md ------------------------------------------------------------------------------


def test_every_diff_has_at_most_eight_lines_of_either_kind():
    for name in DROP_IN_BLOCKS:
        for mark in "-+":
            assert len(side(name, mark).splitlines()) <= 8, name


@pytest.mark.parametrize("mark", ["-", "+"])
def test_trl_before_and_after(mark, names):
    exec(side("trl_user", mark), names)
    assert names["trainer"].state.global_step == 2


def test_peft(names):
    peft = pytest.importorskip("peft")
    import trl

    import tralign_fast

    names |= {k: getattr(trl, k) for k in ("DPOConfig", "DPOTrainer")}
    names |= {k: getattr(tralign_fast, k) for k in ("TRConfig", "TRTrainer")}
    names |= {k: getattr(peft, k) for k in ("LoraConfig", "get_peft_model")}
    with pytest.raises(NotImplementedError):
        exec(side("peft", "-"), {**names, "model": copy.deepcopy(names["model"])})
    exec(side("peft", "+"), names)
    assert names["trainer"].state.global_step == 2
    peft.PeftModel.from_pretrained(make_tiny_llama(names["tokenizer"]), "out/adapter")


def test_ops_before_and_after_are_equal():
    torch.manual_seed(0)
    names = {
        "F": F, "hidden": torch.randn(20, 8), "weight": torch.randn(50, 8), "length": 5,
        "targets": torch.randint(0, 50, (20,)), "ref_chosen": torch.zeros(2),
        "ref_rejected": torch.ones(2),
    }  # fmt: skip
    losses = []
    for mark in "-+":
        scope = dict(names)
        exec(side("ops", mark), scope)
        losses.append(scope["loss"])
    torch.testing.assert_close(*losses)


def test_the_folder_that_the_hub_block_names_is_there():
    folder = re.findall(r'Path\("(.*?)"\)', block("hub"))
    assert (ROOT / folder[0] / "__init__.py").is_file()
    compile(
        side("hub", "+"), "drop-in.md", "exec"
    )  # tests/integrations/test_hub_kernels.py runs it


def test_what_other_packages_are_given_exists():
    import yaml

    settings = yaml.safe_load(side("axolotl", "+"))
    module, _, plugin = settings.pop("plugins")[0].rpartition(".")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert f"class {plugin}(" in source.read_text()  # importing it wants axolotl
    page = (ROOT / "docs/axolotl.md").read_text()
    assert all(f"{key}: {value}" in page for key, value in settings.items())
    page = (ROOT / "docs/llama-factory.md").read_text()
    for line in side("llama_factory", "+").splitlines():
        assert line.split("  #")[0] in page


# --- all documents --------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_no_link_is_broken(file):
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text())
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_files_that_the_documents_name_are_there():
    roots = r"(?:tralign_fast|kernels|tests|benchmarks|recipes)"
    for file in (README, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "decisions.md"):
        for path in re.findall(rf"\b{roots}/[\w/.-]+\.(?:py|md|yaml|csv)\b", file.read_text()):
            assert (ROOT / path).is_file(), (file.name, path)


def test_files_of_the_house_are_there():
    """The tree in CONTRIBUTING: two spaces a folder, then names of files."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## The house")[1]
    folders: list[str] = []
    found = 0
    for line in text.split("```")[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"[\w/]+(?:\.py|/)(?=\s|,|$)", line):
            if name.endswith("/"):
                folders = [*folders[:depth], name]
                assert (ROOT / "".join(folders)).is_dir(), line
                depth += 1
            else:
                path = "".join(folders[:depth]) + name
                assert (ROOT / path).is_file(), path
                found += 1
    assert found > 60


def test_the_readme_is_short_and_names_how_to_run_it():
    text = README.read_text()
    assert 120 <= len(text.splitlines()) <= 150
    assert "make demo" in text
    assert "make test" in text
