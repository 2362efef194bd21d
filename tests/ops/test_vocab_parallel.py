"""The head cut up over real processes (gloo) against one process with the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.vocab_parallel_run import H, N

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_processes_give_what_one_gives(processes, tmp_path):
    file = tmp_path / "traffic.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(processes), "-m", "tests.ops.vocab_parallel_run", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-4000:]
    # fp32: three numbers for each token, and its gradient; nothing of the vocabulary's size
    assert json.loads(file.read_text()) == [["all_gather", 3 * N * 4], ["all_reduce", N * H * 4]]
