"""`train --num_processes`: two real processes (gloo) through accelerate; what they refuse, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.processes import fork
from tralign_fast import TRConfig, cli
from tralign_fast.command_line import Given
from tralign_fast.commands import launch
from tralign_fast.ops.backend import warn_once
from tralign_fast.training.train_options import PARALLEL, TrainOptions

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.CompletedProcess:
    """The launcher is a fork; the processes that it starts are fresh ones."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return fork("-m", "tralign_fast.cli", *arguments, env=environment)


def test_two_processes_train(recipe, tmp_path):
    out = start("train", "--config", str(recipe), "--num_processes", "2", "--save_steps", "2")
    assert out.returncode == 0, out.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [log["num_tokens"] for log in state["log_history"] if "loss" in log]
    assert len(logged) == 2
    whole = ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "alone")]
    assert cli.main(["train", "--config", str(recipe), "--save_steps", "2", *whole]) == 0
    state = json.loads((tmp_path / "alone" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["num_tokens"] for log in state["log_history"] if "loss" in log] == logged


@pytest.mark.matrix
def test_what_both_refuse_is_said_once(recipe):
    rows = str(recipe.parent / "no.jsonl")
    out = start("train", "--config", str(recipe), "--num_processes", "2", "--dataset", rows)
    assert out.returncode == 2
    assert out.stderr.count("tralign-fast: error:") == 1
    assert "no such file or folder" in out.stderr
    assert "Traceback" not in out.stderr
    assert "ChildFailedError" not in out.stderr


def test_what_one_process_cannot_do_is_said_before_anything_is_loaded(recipe, refused, monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for alone in ([], ["--num_processes", "1"]):
        line = refused("train", "--config", str(recipe), "--parallel", "fsdp2", *alone)
        assert "parallel=fsdp2: expected several processes to shard weights over, got one" in line
    warn_once.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_processes(2, "fsdp2")
    launch.check_processes(None, "fsdp2")
    with pytest.warns(UserWarning, match="num_processes=4 has no effect: a launcher has started 2"):
        launch.check_processes(4, None)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_presets_are_options_of_a_run(parallel, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "find_spec", lambda name: True)
    names = {f.name for f in TRConfig.__dataclass_fields__.values() if f.init}
    options = launch.options_of(parallel)
    assert set(options) <= names
    given = Given("train", [TrainOptions, TRConfig], ["--model", "m", "--dataset", "d"])
    for name, value in options.items():
        given.default(name, value)
    if parallel == "fsdp2":
        assert given.fsdp_config["version"] == 2
    if parallel == "zero3":
        assert given.deepspeed["zero_optimization"]["stage"] == 3
        # DeepSpeed reckons it; "auto" is filled before it knows of other processes, and refused
        assert "train_batch_size" not in given.deepspeed


def test_weights_under_zero3_are_gathered_by_deepspeed(monkeypatch):
    """`deepspeed.zero` is a name of the package and no module that can be imported."""
    from tralign_fast.reference import sharding

    seen = []
    zero = SimpleNamespace(GatheredParameters=lambda weights: seen.append(weights) or "gathered")
    package = ModuleType("deepspeed")
    package.zero = zero  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.ds_tensor = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]
    assert sharding.gathered(weight) == "gathered"
    assert seen == [[weight]]


def test_the_exit_code_is_of_the_process_that_ended_by_itself():
    assert launch.code_of([-15, 2]) == 2
    assert launch.code_of([-9, -15]) == 143


def test_a_launcher_that_is_ended_says_no_more_than_its_code(monkeypatch):
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def ended(args):
        raise SignalException("got signal: 15", sigval=signal.SIGTERM)

    monkeypatch.setattr(accelerate, "multi_gpu_launcher", ended)
    assert launch.launch(2, "ddp", []) == 143


def test_a_process_of_a_launcher_starts_no_others(monkeypatch):
    assert launch.is_asked_for(2, None)
    assert not launch.is_asked_for(None, "fsdp2")
    assert not launch.is_asked_for(1, None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.is_asked_for(2, None)


def test_a_package_that_is_missing(recipe, refused, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    line = refused("train", "--config", str(recipe), "--num_processes", "2", "--parallel", "zero3")
    assert "parallel=zero3: DeepSpeed is not installed: pip install deepspeed" in line
