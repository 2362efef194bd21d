"""Imported once in the process whose forks are the arms; what it leaves out a fork imports."""

from __future__ import annotations

import contextlib
from importlib import import_module
from importlib.util import find_spec

_names = ["datasets", "transformers.models.llama.modeling_llama"]
# peft imports bitsandbytes where it is installed, which sets CUDA up: forks could not use it
if find_spec("bitsandbytes") is None or find_spec("peft") is None:
    _names += ["peft", "trl.trainer.dpo_trainer", "tralign_fast.memory",
               "tralign_fast.training.trainer"]  # fmt: skip
for _name in _names:
    with contextlib.suppress(ImportError):
        import_module(_name)
