"""What a user meets before training: imports, the command line, the folder called kernels."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import fork

ROOT = Path(__file__).parents[1]


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env},
    )  # fmt: skip


def test_importing_the_package_stays_light_and_patches_nothing():
    out = python(
        "import sys, torch; before = set(sys.modules); import tralign_fast\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'transformers', 'datasets', 'accelerate', 'triton', 'trl', 'peft'}))\n"
        "print(tralign_fast.TrustRegion().every)"
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["[]", "512"]


# What users import. A name may join these lists; none leaves them without a new major version.
PUBLIC = {
    "tralign_fast": [
        "LOSSES", "PreferenceLoss", "TRConfig", "TRDPOConfig", "TRDPOTrainer", "TRKTOConfig",
        "TRKTOTrainer", "TRTrainer", "TrustRegion", "dpo_loss",
        "ema_update_", "ipo_loss", "kto_loss", "linear_logprobs", "linear_preference_loss",
        "logprobs_from_logits", "lora_merge_", "preference_loss",
    ],
    "tralign_fast.integrations.callback": ["TrustRegionCallback"],
    "tralign_fast.integrations.trl": ["TrustRegionCallback", "use_fast_logprobs"],
    "tralign_fast.integrations.liger": ["FusedLinearDPOLoss", "FusedLinearKTOLoss"],
    "tralign_fast.reference": ["REFERENCES", "TrustRegion"],
    "tralign_fast.memory": ["LiveTensors", "MemoryReport", "Workload", "measure", "trace"],
    "tralign_fast.data": ["load_rows", "tokenize_pairs", "tokenize_unpaired"],
    "tralign_fast.cli": ["main"],
    "tralign_kernels": ["ema_update_", "linear_logprob_forward_", "lora_merge_"],
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_no_public_name_is_lost(module):
    if module.endswith("liger"):
        pytest.importorskip("liger_kernel")
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


def test_the_package_lists_its_names_and_no_others():
    import tralign_fast

    assert set(PUBLIC["tralign_fast"]) <= {*tralign_fast.__all__}
    assert {*tralign_fast.__all__} <= {*dir(tralign_fast)}  # completion in a shell reads this
    assert all(getattr(tralign_fast, name) is not None for name in tralign_fast.__all__)
    assert tralign_fast.__all__ == sorted(tralign_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tralign_fast.nothing


def test_what_the_documents_import_is_there():
    pattern = re.compile(r"from (tralign_[\w.]+) import ([\w ,]+)")
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    imports = [found for file in documents for found in pattern.findall(file.read_text())]
    assert len(imports) >= 5
    for module, names in imports:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.split()[0]), (module, name)


def test_axolotl_finds_its_plugin_where_the_documents_say():
    """axolotl is not installed here: the file is read."""
    tree = ast.parse((ROOT / "tralign_fast" / "integrations" / "axolotl.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {"TrustRegionPlugin", "TrustRegionArgs"} <= names
    named = "tralign_fast.integrations.axolotl.TrustRegionPlugin"
    assert named in (ROOT / "docs" / "axolotl.md").read_text()


def test_both_packages_ship_their_types():
    """A wheel holds the folders of `packages` whole, but for what git ignores."""
    text = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"\[tool.hatch.build.targets.wheel\]\npackages = \[(.*)\]", text)
    assert packages is not None
    assert "exclude = [" not in text.split("[tool.hatch.build")[1].split("[tool.ruff")[0]
    folders = [name.strip(' "') for name in packages[1].split(",")]
    assert len(folders) == 2
    ignored = (ROOT / ".gitignore").read_text() if (ROOT / ".gitignore").exists() else ""
    assert "typed" not in ignored
    for folder in folders:
        assert (ROOT / folder / "py.typed").is_file()


def test_works_without_triton_and_says_so_once():
    """macOS and Windows have no Triton: a finder that hides it stands for them."""
    out = python(
        "import sys, warnings, torch\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n == 'triton' else real(n, p)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from tralign_fast import linear_logprobs, ema_update_\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        lp = linear_logprobs(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 1]))\n"
        "    ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)\n"
        "assert torch.isfinite(lp).all() and 'triton' not in sys.modules\n"
        "print([str(w.message) for w in caught])\n"
        "x, w, y = torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 1])\n"
        "try: linear_logprobs(x, w, y, backend='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("Triton is not installed: tralign-fast runs its PyTorch backend") == 1
    assert "needs the triton package" in out.stdout


def test_triton_on_a_cpu_is_refused_in_one_line(monkeypatch):
    from tralign_fast import linear_logprobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='backend="triton" runs on a GPU'):
        linear_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="triton")


def test_the_folder_kernels_does_not_shadow_hugging_faces_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("kernels") is not None
    out = python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import kernels, tralign_kernels\n"
        "print(kernels.get_kernel.__module__.split('.')[0], 'site-packages' in kernels.__file__)\n"
        "print('tralign_kernels' in tralign_kernels.__file__)"
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["kernels", "True", "True"]


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    return fork("-m", "tralign_fast.cli", *arguments)


def test_train_from_a_recipe(recipe, tmp_path, refused):
    from transformers import AutoModelForCausalLM

    out = run_cli("train", "--config", str(recipe), "--max_steps", "3", "--save_steps", "2")
    assert out.returncode == 0, out.stderr
    assert [line.split()[-1] for line in out.stdout.splitlines()[1:4]] == ["1", "2", "3"]  # moves
    assert (tmp_path / "run" / "checkpoint-2" / "reference" / "reference.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    error = refused("train", "--config", str(recipe))
    assert "holds another run" in error.splitlines()[-1]
    assert "Traceback" not in error
    resumed = run_cli("train", "--config", str(recipe), "--max_steps", "4", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    rows = [line.split() for line in resumed.stdout.splitlines()[1:-1]]
    assert [(row[0], row[-1]) for row in rows] == [("4", "4")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "no.yaml"], "--config no.yaml: "),
        (
            ["train", "--config", "RECIPE", "--ref_model_sync_steps", "0"],
            "ref_model_sync_steps: expected",
        ),
        (
            ["train", "--config", "RECIPE", "--ref_model_mixup_alpha", "2"],
            "ref_model_mixup_alpha: expected",
        ),
        (["train", "--config", "RECIPE", "--dataset", "no.jsonl"], "no.jsonl"),
        (
            ["train", "--config", "RECIPE", "--model", "no/model"],
            "cannot load tokenizer 'no/model'",
        ),
        (["train", "--config", "RECIPE", "--loss_type", "hing"], "did you mean 'hinge'"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_code_2(
    arguments, message, recipe, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    arguments = [str(recipe) if a == "RECIPE" else a for a in arguments]
    last = refused(*arguments).strip().splitlines()[-1]
    assert last.startswith("tralign-fast: error: ")
    assert message in last
    assert not (tmp_path / "run").exists()


def test_unknown_options_of_a_recipe_are_named(recipe, refused):
    recipe.write_text(recipe.read_text() + "ref_sync: 3\n")
    assert "ref_sync: no such option" in refused("train", "--config", str(recipe))
    assert "nothing" in refused("nothing")


def test_defaults_are_the_same_everywhere(tmp_path):
    """What a function and the config both have: α, τ, rounding; the order of rows is TRL's."""
    import inspect

    from trl import DPOConfig, KTOConfig

    from tralign_fast import TRConfig, TrustRegion, ema_update_, lora_merge_

    config = TRConfig(str(tmp_path), use_cpu=True)
    assert TrustRegion() == config.trust_region
    for op in (ema_update_, lora_merge_):
        assert inspect.signature(op).parameters["rounding"].default == config.ema_rounding
    for loss, theirs in (("dpo", DPOConfig), ("kto", KTOConfig), ("apo_zero_unpaired", KTOConfig)):
        order = TRConfig(str(tmp_path), use_cpu=True, loss_type=loss).train_sampling_strategy
        assert order == theirs(str(tmp_path), use_cpu=True).train_sampling_strategy, loss
