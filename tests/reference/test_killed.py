"""A process that is killed in the midst of a window goes on to the losses of a whole run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama
from tests.processes import fork
from tests.reference.test_adapter import SCHEDULES, lora
from tests.reference.test_windows import WINDOWED, two_epochs
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from transformers import TrainerCallback
from tests.conftest import make_small_tokenizer, make_tiny_llama
from {module} import {policy}
from tests.reference.test_windows import two_epochs
from tests.conftest import make_tiny_llama
from tests.training.test_trainer import make

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

tokenizer = make_small_tokenizer()
rows, extra = two_epochs("dpo", 1)
policy = {policy}(make_tiny_llama(tokenizer))
trainer = make(policy, tokenizer, {folder!r}, rows=rows, **{{**extra, **{options!r}}})
trainer.add_callback(Kill())
trainer.train()
"""


def check_a_killed_run(policy, tokenizer, folder, **options):
    """A process that is killed after step 6 resumes from step 4 to the losses of a whole run.

    Args:
        policy: function of a tiny Llama, which the process imports by its name.
    """
    options |= {"save_strategy": "steps", "save_steps": 2}
    code = KILLED.format(
        root=str(ROOT), module=policy.__module__, policy=policy.__name__,
        folder=str(folder / "run"), options=options,
    )  # fmt: skip
    killed = fork("-c", code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    rows, extra = two_epochs("dpo", 1)
    extra |= options
    model = policy(make_tiny_llama(tokenizer))
    again = make(model, tokenizer, folder / "run", rows=rows, **extra)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
    whole = make(model, tokenizer, folder / "whole", rows=rows, **extra)
    assert resumed == pytest.approx(history(whole), rel=1e-6)


def itself(model):
    return model


def test_a_window_of_weights(small_tokenizer, tmp_path):
    options = {"reference": "offloaded", **WINDOWED["offloaded"]}
    check_a_killed_run(itself, small_tokenizer, tmp_path, **options)


def test_past_adapters(small_tokenizer, tmp_path):
    check_a_killed_run(lora, small_tokenizer, tmp_path, reference="adapter", **SCHEDULES["hybrid"])
