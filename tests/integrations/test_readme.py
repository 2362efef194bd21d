"""The blocks of the README and of docs/drop-in.md run as they stand there, with nothing given but
`model`, `rows` and `tokenizer`; docs/losses.md is the table of `LOSSES`; what the documents link to
and name is there."""

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

from tests.conftest import make_tiny_llama
from tralign_fast import LOSSES, TRConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LOSS_PAGE = ROOT / "docs" / "losses.md"
COMMUNITY = [
    ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")
]
DOCUMENTS = [*COMMUNITY, *(ROOT / "docs").rglob("*.md")]
# as pyproject.toml has it; the package index shows the README, and wants whole links
REPOSITORY = "https://github.com/tralign-fast/tralign-fast"
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
# what shows in a block which one it is
README_BLOCKS = {
    "script": "trainer.save_model()",
    "trl": "use_fast_logprobs(trainer)",
    "any_trainer": "class PairTrainer",
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


# --- README: blocks -------------------------------------------------------------------------------


def test_the_script_runs_as_it_is(tmp_path, monkeypatch, small_tokenizer):
    """Unchanged: a tiny model lies in a folder of the name that the script gives."""
    monkeypatch.chdir(tmp_path)
    (model,) = re.findall(r'TRTrainer\("(.*?)"', block("script"))
    make_tiny_llama(small_tokenizer).save_pretrained(model)
    small_tokenizer.save_pretrained(model)
    assert len(block("script").splitlines()) == 10
    scope: dict[str, Any] = {}
    exec(block("script"), scope)
    assert scope["trainer"].state.global_step == 8
    losses = [log["loss"] for log in scope["trainer"].state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[3] < losses[0]
    assert scope["trainer"].state.log_history[-2]["tr/syncs"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_trl(reader):
    exec(block("trl"), reader)
    assert reader["trainer"].state.global_step == 2
    from tralign_fast.integrations.trl import use_fast_logprobs

    with pytest.raises(ValueError, match="in use already"):
        use_fast_logprobs(reader["model"])
    reader["undo"]()
    use_fast_logprobs(reader["model"])()


def test_any_trainer(reader, monkeypatch):
    """Its loss is DPO against the reference, which the callback moves."""
    import transformers

    small = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "num_train_epochs": 1}
    small |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "no"}
    arguments = functools.partial(transformers.TrainingArguments, **small)
    monkeypatch.setattr(transformers, "TrainingArguments", arguments)
    text = block("any_trainer").replace("(0.6, 512,", "(0.6, 2,")
    assert text != block("any_trainer")
    start = copy.deepcopy(reader["model"])
    exec(text, reader)
    trainer, reference = reader["trainer"], reader["reference"]
    assert trainer.state.global_step == 4
    moved = [
        not torch.equal(now, first)
        for now, first in zip(reference.parameters(), start.parameters(), strict=True)
    ]
    assert all(moved)
    pair = [[row["prompt"] + row[key] for row in reader["rows"]] for key in ("chosen", "rejected")]
    with torch.no_grad():
        ours = [reader["logps"](start, texts) for texts in pair]
        ids = reader["tokenizer"](pair[0][0], return_tensors="pt")["input_ids"]
        rows = start(ids).logits[0].log_softmax(-1)
        whole = sum(rows[t - 1, ids[0, t]] for t in range(1, ids.shape[1]))
    torch.testing.assert_close(ours[0][0], whole)
    with torch.no_grad():
        loss = trainer.compute_loss(reference, reader["rows"].to_list())
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_a_loop_of_ones_own(reader):
    """The reference moves after the last step; the log-prob of an answer is PyTorch's."""
    start = copy.deepcopy(reader["model"])
    reader["rows"] = [reader["rows"][i % 8] for i in range(64)]
    exec(block("loop"), reader)
    assert reader["step"] == 64
    for moved, theta, first in zip(
        reader["reference"].parameters(),
        reader["model"].parameters(),
        start.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(moved, 0.6 * theta + 0.4 * first)
        assert not torch.equal(theta, first)
    row = reader["rows"][0]
    prompt, whole = (
        reader["tokenizer"](text, return_tensors="pt")["input_ids"]
        for text in (row["prompt"], row["prompt"] + row["chosen"])
    )
    rows = start(whole).logits[0].log_softmax(-1)
    expected = sum(rows[t - 1, whole[0, t]] for t in range(prompt.shape[1], whole.shape[1]))
    torch.testing.assert_close(reader["logps"](start, row["prompt"], row["chosen"])[0], expected)


def test_liger_gives_the_same(reader, monkeypatch):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # wants a C++ compiler
    exec(block("liger"), reader)
    assert reader["model"].lm_head.weight.grad is not None
    call = block("liger").split("loss, metrics = ")[1].splitlines()[0]
    theirs = eval(call, {**reader, "FusedLinearDPOLoss": liger.LigerFusedLinearDPOLoss})
    torch.testing.assert_close((reader["loss"], reader["metrics"]), theirs)  # and every metric


def test_the_commands_are_understood(tmp_path, monkeypatch):
    """The command with the options of each row of the table, and of each row what is planned."""
    from tralign_fast.command_line import parse
    from tralign_fast.training.train_options import TrainOptions

    text = README.read_text()
    (command,) = re.findall(r"^tralign-fast train (.*)$", text, re.M)
    rows = re.findall(r"^\| (\d+) GB \| (.*) \| (.*) \| ([\d.]+) GiB \|$", text, re.M)
    assert len(rows) == 5
    monkeypatch.chdir(tmp_path)
    model = None
    for memory, name, options, planned in rows:
        model = model if name == "the same" else name.strip("`")
        options = options.strip("`") if options.startswith("`--") else ""
        line = command.replace("MODEL", model).replace("OPTIONS", options)
        arguments = [*shlex.split(line), "--use_cpu", "true", "--bf16", "false"]
        train, config = parse("train", [TrainOptions, TRConfig], arguments)
        assert train.model == model
        assert config.gradient_release == ("release" in options)
        assert float(planned) + 1 <= int(memory)
    (migrate,) = re.findall(r"`tralign-fast migrate (\S+)`", text)
    assert migrate == "dpo.py"


# --- the losses ---------------------------------------------------------------------------------


def loss_table() -> dict[str, list[str]]:
    """A loss's name -> the other cells of its row."""
    text = LOSS_PAGE.read_text().split("| `loss_type` |")[1].split("\n\n")[0]
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
    (call,) = re.findall(r'`(TRConfig\("out", loss_type=\[.*?\))`', LOSS_PAGE.read_text())
    config = eval(call, {"TRConfig": functools.partial(TRConfig, use_cpu=True, bf16=False)})
    assert config.objective.names == ("sigmoid", "bco_pair", "sft")
    assert config.objective.weights == (0.8, 0.2, 1.0)


# --- docs/drop-in.md ------------------------------------------------------------------------------


def test_every_diff_has_at_most_eight_lines_of_either_kind():
    for name in DROP_IN_BLOCKS:
        for mark in "-+":
            assert len(side(name, mark).splitlines()) <= 8, name


@pytest.mark.parametrize("mark", ["-", "+"])
def test_trl_before_and_after(mark, reader):
    exec(side("trl_user", mark), reader)
    assert reader["trainer"].state.global_step == 2


def test_peft(reader):
    peft = pytest.importorskip("peft")
    import trl

    import tralign_fast

    reader |= {k: getattr(trl, k) for k in ("DPOConfig", "DPOTrainer")}
    reader |= {k: getattr(tralign_fast, k) for k in ("TRConfig", "TRTrainer")}
    reader |= {k: getattr(peft, k) for k in ("LoraConfig", "get_peft_model")}
    with pytest.raises(NotImplementedError):
        exec(side("peft", "-"), {**reader, "model": copy.deepcopy(reader["model"])})
    exec(side("peft", "+"), reader)
    assert reader["trainer"].state.global_step == 2
    peft.PeftModel.from_pretrained(make_tiny_llama(reader["tokenizer"]), "out/adapter")


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
        folder = file.parent
        for start in (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/", RAW):
            if link.startswith(start):
                link, folder = link.removeprefix(start), ROOT
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_has_whole_links_to_the_repository():
    assert f'Homepage = "{REPOSITORY}"' in (ROOT / "pyproject.toml").read_text()
    assert f"repo_url: {REPOSITORY}" in (ROOT / "mkdocs.yml").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    assert len(links) > 12
    assert [link for link in links if not link.startswith("https://")] == []


def test_files_that_the_documents_name_are_there():
    roots = r"(?:tralign_fast|kernels|tests|benchmarks|recipes)"
    for file in DOCUMENTS:
        if file.name == "comparison.md":  # which names TRL's tests
            continue
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
