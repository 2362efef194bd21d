"""Every example runs as it stands, on a tiny model, and is short."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
APART = ("two_processes", "ray_train")
NEEDS = {
    "lora": ("peft", "bitsandbytes"),
    "trl_drop_in": ("trl",),
    "liger_drop_in": ("liger_kernel",),
}


@pytest.fixture
def arguments(recipe, tmp_path, monkeypatch):
    """model, rows and folder; unpaired rows for KTO."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def of(name: str) -> list[str]:
        rows = tmp_path / "rows.jsonl"
        pairs = [json.loads(line) for line in rows.read_text().splitlines()]
        if name == "kto":
            for i, row in enumerate(pairs):
                row["label"] = i % 2 == 0
                row["completion"] = row.pop("chosen" if row["label"] else "rejected")
                row.pop("rejected" if row["label"] else "chosen")
        rows.write_text("".join(json.dumps(row) + "\n" for row in pairs * 8))
        return [str(tmp_path / "model"), str(rows), str(tmp_path / "out")]

    return of


@pytest.mark.parametrize("name", [e.stem for e in EXAMPLES if e.stem not in APART])
def test_an_example_runs(name, arguments, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(name, ()):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", [name, *arguments(name)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss'?:? '?([0-9.]+)", out)]
    assert len(losses) >= 2
    if name == "lora":
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(w.any() for n, w in saved.items() if "lora_B" in n)  # which starts as zeros
    elif name in ("dpo", "kto"):
        after = load_file(tmp_path / "out" / "model.safetensors")
        before = load_file(tmp_path / "model" / "model.safetensors")
        assert any((after[n] != w).any() for n, w in before.items())
    else:
        assert len(set(losses)) > 1


@pytest.mark.matrix  # tests/commands/test_launch.py starts two for `make test`
def test_two_processes(arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(ROOT / "examples" / "two_processes.py"), *arguments("two_processes"),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("2 processes") == 1


@pytest.mark.matrix
def test_two_workers_of_ray(arguments, tmp_path):
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "examples" / "ray_train.py"), *arguments("ray_train")]
    out = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert {*re.findall(r"worker (\d) of 2: ", out.stdout + out.stderr)} == {"0", "1"}
    assert (tmp_path / "out" / "checkpoint-4" / "manifest.json").exists()


def test_the_batch_script_of_slurm_starts_a_torchrun_on_each_machine(tmp_path, monkeypatch):
    """With an srun that prints what it would run."""
    for name, body in {
        "scontrol": "echo node7; echo node8",
        "srun": 'while [[ $1 == --* ]]; do shift; done; printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "42", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash", str(ROOT / "examples" / "slurm.sbatch"), "recipe.yaml", "--max_steps", "3"]
    out = subprocess.run(command, env=job, capture_output=True, text=True, check=True)
    program, *words = out.stdout.splitlines()
    assert program == "torchrun"
    args = get_args_parser().parse_args(words)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id) == ("2", "8", "42")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node7:29500")
    assert args.module
    assert args.training_script == "tralign_fast"
    assert args.training_script_args == [
        "train", "--config", "recipe.yaml", "--resume_from_checkpoint", "auto", "--max_steps", "3",
    ]  # fmt: skip


def test_examples_are_short_and_say_how_they_are_called():
    names = {example.stem for example in EXAMPLES}
    assert {"dpo", "kto", "lora", "hand_written_loop", "trl_drop_in", "liger_drop_in",
            *APART} == names  # fmt: skip
    for example in [*EXAMPLES, ROOT / "examples" / "slurm.sbatch"]:
        text = example.read_text()
        assert len(text.splitlines()) <= 40, example.name
        assert f"examples/{example.name}" in text
