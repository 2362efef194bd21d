"""The pages of the site: snippets run, recipes and commands are understood, every page is in the
navigation. tests/integrations/test_readme.py has the README and docs/drop-in.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# What stands before a block that is compiled, not run; the text says what is wanted.
NEEDS = re.compile(r"<!-- needs (.+) -->\n$")


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    """The fenced blocks of all pages in one of the languages, without their indentation."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.M | re.S):
            if match[2] not in languages:
                continue
            needs = NEEDS.search(text[: match.start()])
            code = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
            line = text.count("\n", 0, match.start()) + 1
            name = page.relative_to(DOCS).as_posix()
            found.append(Snippet(name, line, match[2], code, needs and needs[1]))
    return found


PYTHON = snippets("python")


def test_most_snippets_are_run():
    run = [s for s in PYTHON if s.needs is None]
    assert len(run) >= 8
    assert len([s for s in PYTHON if s.needs]) <= 4


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_a_snippet_runs(snippet, reader, monkeypatch):
    """With nothing but `model`, `rows` and `tokenizer`; compiled where it needs more."""
    code = compile(snippet.code, str(snippet), "exec")
    if snippet.needs:
        return
    if "trl" in snippet.code:
        pytest.importorskip("trl")
    exec(code, {"__name__": "pasted", **reader})


@pytest.mark.parametrize("snippet", snippets("json"), ids=str)
def test_rows_are_rows(snippet, small_tokenizer):
    import json

    from datasets import Dataset

    from tralign_fast.data import tokenize_pairs, tokenize_unpaired

    for line in snippet.code.splitlines():
        row = Dataset.from_list([json.loads(line)])
        if "completion" in row.column_names:
            rows = tokenize_unpaired(row, small_tokenizer, max_length=200, one_label=True)
        else:
            rows = tokenize_pairs(row, small_tokenizer, max_length=200)
        assert len(rows) == 1


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_a_recipe_is_understood(snippet, tmp_path):
    import yaml

    recipe = yaml.safe_load(snippet.code)
    if "dataset" not in recipe:  # of another trainer
        return
    (tmp_path / "recipe.yaml").write_text(snippet.code)
    parsed("train", ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true"])


def parsed(verb: str, arguments: list[str]) -> None:
    from tralign_fast import TRConfig
    from tralign_fast.command_line import parse
    from tralign_fast.memory.plan_options import PlanOptions
    from tralign_fast.memory.plan_recipe import plan_arguments
    from tralign_fast.migrate.command import migration_options
    from tralign_fast.training.train_options import TrainOptions

    if verb == "migrate":
        migration_options(arguments)
    elif verb == "plan":
        parse(verb, [PlanOptions], plan_arguments(arguments)[0])
    elif verb == "train":
        parse(verb, [TrainOptions, TRConfig], arguments)


def commands() -> list[tuple[str, str]]:
    """(page:line, command) of every call of the command line in a shell block."""
    found = []
    for snippet in snippets("sh"):
        code = snippet.code.replace("\\\n", " ")
        for command in re.findall(r"^(?:.* )?tralign-fast ([a-z].*)$", code, re.M):
            found.append((str(snippet), command.partition("&&")[0].partition("#")[0]))
    return found


def test_every_shell_block_is_looked_at():
    """`commands` reads blocks of "sh" alone."""
    assert not snippets("bash", "shell", "console")


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value[:40])
def test_a_command_is_understood(where, command, tmp_path, monkeypatch):
    verb, *arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml",):
        Path(name).write_text("model: m\ndataset: rows.jsonl\noutput_dir: out\n")
    parsed(verb, [*arguments, "--use_cpu", "true"] if verb == "train" else arguments)


# --- the site -------------------------------------------------------------------------------------


def navigation() -> set[str]:
    """The files that mkdocs.yml names."""
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return set(re.findall(r": ([\w/.-]+\.md)$", text, re.M))


def test_every_page_is_in_the_navigation_and_there():
    made = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
    made["changelog.md"] = "CHANGELOG.md"
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert navigation() - {*made} == pages
    assert all((ROOT / file).is_file() for file in made.values())


def test_the_drawings_are_those_of_the_script(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("draw", DOCS / "drawings" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, function in draw.DRAWINGS.items():
        assert (DOCS / "drawings" / f"{name}.svg").read_text() == function().svg(), name


def test_every_public_name_is_in_the_api_pages():
    import tralign_fast

    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = {*re.findall(r"^::: [\w.]+\.(\w+)$", text, re.M)}
    assert {*tralign_fast.__all__} - shown == {
        "LOSSES", "TRDPOConfig", "TRDPOTrainer", "TRFrozenDPOConfig", "TRFrozenKTOConfig",
        "TRKTOConfig", "TRKTOTrainer",
    }  # fmt: skip
    assert "tralign_fast.training.aliases" in text  # which has the others
    assert "LOSSES" in (DOCS / "losses.md").read_text()


@pytest.mark.matrix
def test_the_site_is_built_without_a_warning(tmp_path):
    """`make docs`; strict, so that a broken link or anchor is an error."""
    import subprocess
    import sys

    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-4000:]
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
    assert "linear_logprobs" in (tmp_path / "site" / "api" / "ops" / "index.html").read_text()


def test_the_notebook_runs(monkeypatch, tmp_path, tiny_llama, small_tokenizer):
    """On a tiny model, for sixteen steps; what begins with % is the notebook's own."""
    import json

    plt = pytest.importorskip("matplotlib.pyplot")
    from tralign_fast.demo import smollm2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (tiny_llama, small_tokenizer))
    plt.switch_backend("Agg")
    notebook = json.loads((DOCS / "notebooks" / "demo.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shorter = {"max_steps=32": "max_steps=16", "max_length=256": "max_length=512"}
    scope: dict = {}
    for text in code:
        if text.startswith("%"):
            continue
        for old, new in shorter.items():
            text = text.replace(old, new)
        exec(compile(text, "demo.ipynb", "exec"), scope)
    assert len(scope["after"]) == len(scope["before"]) == 3
    history = scope["trainer"].state.log_history
    assert [log["tr/syncs"] for log in history if "tr/syncs" in log][-1] == 2
