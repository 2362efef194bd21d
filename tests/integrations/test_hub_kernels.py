"""The Triton kernels through Hugging Face's `kernels` package, from the same files."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("kernels")
KERNELS = Path(__file__).parents[2] / "kernels"
loads_folders = pytest.mark.skipif(
    find_spec("kernels._rust") is None, reason="kernels before 0.17 has another layout"
)

USE = """
import sys, torch
sys.path[:] = [p for p in sys.path if not p.rstrip('/').endswith('kernels')]
class Hide:  # an installed tralign_kernels must not be what the loaded files import
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'tralign_kernels': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path({folder!r}))
ref, theta = torch.zeros(300), torch.arange(300.0)
kernel.ema_update_([ref], [theta], 0.25, rounding='nearest', seed=0)
assert torch.equal(ref, 0.25 * theta), ref
print(kernel.__name__, Path(kernel.__file__).parent, 'tralign_kernels' in sys.modules)
"""


def load(folder: Path) -> list[str]:
    out = subprocess.run(
        [sys.executable, "-c", USE.format(folder=str(folder))],
        capture_output=True, text=True, timeout=120,
        env={"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        cwd="/",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


@loads_folders
def test_get_local_kernel_loads_the_package_itself():
    package = KERNELS / "tralign_kernels"
    assert load(package) == ["_tralign_kernels_v1", str(package), "False"]


@loads_folders
def test_the_hubs_layout_loads_too(tmp_path, monkeypatch):
    """The commands of kernels/README.md, as they are written."""
    try:
        from kernels._rust import Build, Metadata
    except ImportError:  # kernels 0.16, which transformers wants, does not parse build.toml
        from kernels_data import Metadata  # pyright: ignore[reportMissingImports]

        Build = None
    commands = re.search(r"```sh\n(.*?)```", (KERNELS / "README.md").read_text(), re.S)
    assert commands is not None
    (tmp_path / "kernels").symlink_to(KERNELS)
    subprocess.run(["sh", "-ec", commands.group(1)], check=True, cwd=tmp_path)
    hub = tmp_path / "hub"
    if Build is not None:
        Build.open(hub)  # what kernel-builder parses
    metadata = Metadata.read_from_file(hub / "build" / "torch-cuda" / "metadata.json")
    assert (hub / "torch-ext" / metadata.name.python_name / "__init__.py").is_file()
    # a machine without a GPU takes torch-cpu or torch-universal: the same folder by that name
    (hub / "build" / "torch-cuda").rename(hub / "build" / "torch-universal")
    folder = str(hub / "build" / "torch-universal")
    assert load(hub) == ["_tralign_kernels_v1", folder, "False"]


@pytest.mark.xfail(strict=True, reason="transformers 5.24 wants kernels 0.18.2, not released yet")
def test_transformers_accepts_the_pinned_kernels():
    """Else attention and layers from the hub are an ImportError in transformers."""
    from transformers.utils import import_utils

    pins = (KERNELS.parent / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^(kernels|transformers)==([^\s;]+)", pins, re.M))
    if version("transformers") != pinned["transformers"]:
        pytest.skip("this transformers is not the one that is pinned beside kernels")
    low, high = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
    assert Version(low) <= Version(pinned["kernels"]) < Version(high)


def test_the_kernels_import_themselves_by_relative_imports_only():
    for file in (KERNELS / "tralign_kernels").glob("*.py"):
        absolute = re.findall(r"^\s*(?:from|import) tralign_kernels.*", file.read_text(), re.M)
        assert not absolute, (file.name, absolute)
