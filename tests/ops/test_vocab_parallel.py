"""The head cut up over real processes (gloo) against one process with the whole of it."""

from __future__ import annotations

import json

import pytest

from tests.ops.vocab_parallel_run import H, N
from tests.processes import check_ended, launch


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_processes_give_what_one_gives(processes, tmp_path):
    file = tmp_path / "traffic.json"
    check_ended(launch("tests.ops.vocab_parallel_run", processes, str(file)))
    # fp32: three numbers for each token, and its gradient; nothing of the vocabulary's size
    assert json.loads(file.read_text()) == [["all_gather", 3 * N * 4], ["all_reduce", N * H * 4]]
