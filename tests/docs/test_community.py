"""Files for those who take part: they parse, and name what is there."""

from __future__ import annotations

import ast
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)


def test_there_is_one_version():
    import tralign_fast

    assert VERSION is not None
    assert tralign_fast.__version__ == VERSION[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION[1]


@pytest.mark.parametrize("file", sorted(GITHUB.glob("workflows/*.yml")), ids=lambda f: f.name)
def test_workflows_call_targets_that_are_there(file):
    workflow = yaml.safe_load(file.read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert workflow["permissions"]["contents"] == "read"
    for job in workflow["jobs"].values():
        given = [case.get("target") for case in _cases(job)]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert target in targets, target
            if "make ${{ matrix.target }}" in step.get("run", ""):
                assert {*given} <= targets


def _cases(job: dict) -> list[dict]:
    return job.get("strategy", {}).get("matrix", {}).get("include", [])


def _jobs() -> dict:
    return yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text())["jobs"]


def test_the_ends_of_the_range_of_pythons_are_tested():
    suite, wheel = ({c["python"] for c in _cases(_jobs()[job])} for job in ("test", "wheel"))
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert named[0] in wheel  # TRL, which the suite needs, has left it
    assert {named[1], named[-1]} <= suite
    assert f'requires-python = ">={named[0]}"' in text


# pinned for the tests and for the site alone: without a version for the oldest Python
_NOT_OF_USERS = {
    "trl", "hypothesis", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "griffelib"
}  # fmt: skip


@pytest.mark.parametrize(
    ("pins", "target"), [("constraints.txt", "test"), ("constraints-oldest.txt", "test-oldest")]
)
def test_a_pin_is_of_the_pythons_that_it_is_for(pins, target):
    """pip ends with an error where a Python has not the version that is pinned for it."""
    suite = {case["python"] for case in _cases(_jobs()["test"]) if case["target"] == target}
    assert suite
    users = {case["python"] for case in _cases(_jobs()["wheel"])} if target == "test" else set()
    looked_at = 0
    for line in (ROOT / pins).read_text().splitlines():
        if "==" not in (line := line.partition("#")[0]):
            continue
        pin = Requirement(line)
        try:
            about = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if about["Version"] not in pin.specifier:
            continue
        looked_at += 1
        for python in suite if pin.name in _NOT_OF_USERS else suite | users:
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                wanted = about["Requires-Python"] or ""
                assert python in SpecifierSet(wanted), (line, python, wanted)
    assert looked_at


def test_the_oldest_python_is_the_one_that_files_are_checked_for():
    """`make check` refuses newer syntax (ruff) and a newer standard library (pyright); syntax once
    more here, for who runs the tests alone."""
    text = (ROOT / "pyproject.toml").read_text()
    oldest = re.findall(r'^requires-python = ">=(3\.\d+)"', text, re.M)
    assert re.findall(r'^pythonVersion = "(.*)"', text, re.M) == oldest
    assert re.findall(r'^target-version = "py(.*)"', text, re.M) == [oldest[0].replace(".", "")]
    version = tuple(map(int, oldest[0].split(".")))
    files = [f for folder in ("tralign_fast", "kernels", "examples", "benchmarks", "tests", ".ci")
             for f in (ROOT / folder).rglob("*.py")]  # fmt: skip
    assert len(files) > 300
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=version)


@pytest.mark.parametrize(
    "file", sorted(GITHUB.glob("ISSUE_TEMPLATE/[bw]*.yml")), ids=lambda f: f.name
)
def test_forms_have_what_github_wants(file):
    form = yaml.safe_load(file.read_text())
    assert form["name"]
    assert form["description"]
    names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(names) == len({*names}) > 1
    assert all(part["attributes"] for part in form["body"])


def test_the_authors_are_those_of_the_model_card():
    from tralign_fast.training import model_card

    (line,) = re.findall(r"author\s+= \{(.*)\}", Path(model_card.__file__).read_text())
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]["authors"]
    names = [f"{author['given-names']} {author['family-names']}" for author in cited]
    assert " and ".join(names) == line
