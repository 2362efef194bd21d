"""Forks end as fresh interpreters and as torchrun's processes do."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
import torch

from tests.processes import check_ended, fork, launch


def test_code_and_streams_are_those_of_the_interpreter():
    run = fork("-c", "import sys; print(sys.argv); sys.exit('no')", "a")
    assert (run.returncode, run.stdout, run.stderr) == (1, "['-c', 'a']\n", "no\n")
    assert fork("-c", "import sys; sys.exit(3)").returncode == 3
    assert fork("-c", "import os, signal; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    run = fork("-c", "import atexit; atexit.register(print, 'left'); raise ValueError('bad')")
    assert (run.returncode, run.stdout) == (1, "left\n")
    assert run.stderr.startswith("Traceback")
    assert run.stderr.endswith("\nValueError: bad\n")
    with pytest.raises(AssertionError, match="ValueError: bad"):
        check_ended(run)


def test_each_has_an_environment_and_one_thread():
    code = "import os; print(os.environ['A'], len(os.listdir('/proc/self/task')))"
    assert fork("-c", code, env={"A": "b"}).stdout == "b 1\n"


def test_what_hangs_is_ended():
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        fork("-c", "import time; time.sleep(1000)", timeout=0.2)
    assert time.monotonic() - started < 900


def test_one_that_fails_ends_the_others():
    run = launch("tests.test_processes", 3, timeout=900)
    assert run.returncode == 1
    assert run.stderr.count("[rank1]: ValueError: mine") == 1
    with pytest.raises(AssertionError, match=r"^\[rank1\]: Traceback"):
        check_ended(run)


def fail_in_one() -> None:
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == 3
    if torch.distributed.get_rank() == 1:
        raise ValueError("mine")
    time.sleep(1000)


if __name__ == "__main__":
    fail_in_one()
