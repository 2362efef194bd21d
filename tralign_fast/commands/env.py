"""`tralign-fast env`: what a report of a bug should hold."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from tralign_fast.command_line import PositionalParser

_PACKAGES = (
    "tralign-fast", "torch", "triton", "transformers", "accelerate", "datasets", "peft",
    "bitsandbytes", "trl", "liger-kernel", "flash-attn", "kernels", "deepspeed", "rich",
    "matplotlib",
)  # fmt: skip


def run_env(arguments: list[str]) -> int:
    """Prints versions, GPUs and the paths that the library takes here."""
    parser = PositionalParser(prog="tralign-fast env", description=run_env.__doc__)
    parser.parse_args(arguments)
    print("\n".join(f"{name:<16}{value}" for name, value in facts().items()))
    return 0


def facts() -> dict[str, str]:
    from tralign_fast.ops.backend import pick_backend

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CPUs"] = f"{os.cpu_count()}, {torch.get_num_threads()} threads of torch"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found[f"GPU {index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    else:
        found["GPU"] = "none"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found["kernels"] = pick_backend("auto", device)
    return found
