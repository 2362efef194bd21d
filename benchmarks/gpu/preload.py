"""Imported once in the process whose forks are the arms; what it cannot import a fork will."""

from __future__ import annotations

import contextlib
from importlib import import_module

for _name in (
    "datasets",
    "transformers.models.llama.modeling_llama",
    "peft",
    "trl.trainer.dpo_trainer",
    "tralign_fast.memory",
    "tralign_fast.training.trainer",
    "benchmarks.gpu.arm",
):
    with contextlib.suppress(ImportError):
        import_module(_name)
