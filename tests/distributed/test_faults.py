"""Processes that die, start again, differ from each other, or are slow."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_tiny_llama
from tests.distributed.fault_run import train
from tests.processes import launch, torchrun
from tests.training.test_checkpoints import SAVING, losses_of, run_until
from tests.training.test_trainer import make
from tralign_fast.distributed import elastic
from tralign_fast.distributed.pace import Pace
from tralign_fast.training.checkpoints import check_manifest, newest_checkpoint
from tralign_fast.training.runs import RUN_FILE, locked

pytestmark = pytest.mark.filterwarnings("ignore:moved aside", "ignore:resumed with another")


def started(folder: Path, fault: str, restarts: int) -> subprocess.CompletedProcess[str]:
    return torchrun("tests.distributed.fault_run", 2, str(folder), fault, restarts=restarts)


@pytest.mark.matrix
def test_a_process_that_dies_ends_the_others_and_leaves_no_lock(tmp_path):
    run = started(tmp_path, "dies", 0)
    ended = time.time()
    assert run.returncode != 0
    assert "exitcode  : -9" in run.stderr
    died = max(p.stat().st_mtime for p in tmp_path.rglob("*") if p.is_file())  # checkpoint-3
    assert ended - died < 60
    with locked(tmp_path):
        pass
    assert newest_checkpoint(str(tmp_path)).name == "checkpoint-3"
    check_manifest(tmp_path / "checkpoint-3")


@pytest.mark.matrix
def test_a_restart_of_torchrun_goes_on_by_itself(tmp_path):
    run = started(tmp_path / "run", "dies", 1)
    assert run.returncode == 0, run.stderr[-3000:]
    losses = json.loads((tmp_path / "run" / "losses.json").read_text())
    assert losses == pytest.approx(train(tmp_path / "whole", 4), rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("version", r"process 1 has transformers \S+\+other, process 0 has \S+: install the same"),
        ("rows", r"process 1 trains on other rows than process 0 \(20 rows there, 24 rows here\)"),
        ("file", r"process 1: .*no rows"),
    ],
)
def test_what_differs_ends_all_with_one_message(fault, message, tmp_path):
    run = launch("tests.distributed.fault_run", 2, str(tmp_path), fault)
    assert run.returncode != 0
    said = re.findall(r"ValueError: .*", run.stderr)
    assert len(said) == 2  # a script of one's own: the command line says it once
    assert len({*said}) == 1
    assert re.search(message, said[0]), said
    assert not (tmp_path / RUN_FILE).exists()


# --- going on by oneself


@pytest.fixture
def killed(tmp_path, small_tokenizer, tiny_llama):
    """The folder of a run that torchrun's first attempt began and a kill ended after step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "job")
        run_until(3, tiny_llama, small_tokenizer, tmp_path / "run", **SAVING)
    return tmp_path / "run"


def start(folder: Path, small_tokenizer, resume: Any = None) -> Any:
    trainer = make(make_tiny_llama(small_tokenizer), small_tokenizer, folder, **SAVING)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_auto_starts_or_goes_on(tmp_path, small_tokenizer, tiny_llama):
    whole = losses_of(start(tmp_path / "whole", small_tokenizer, "auto"))
    assert len(whole) == 6
    run_until(1, tiny_llama, small_tokenizer, tmp_path / "run", **SAVING)  # before a checkpoint
    run_until(3, tiny_llama, small_tokenizer, tmp_path / "run", **SAVING)
    began = json.loads((tmp_path / "run" / RUN_FILE).read_text())["run"]
    assert losses_of(start(tmp_path / "run", small_tokenizer, "auto")) == whole
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["run"] == began


@pytest.mark.parametrize("asked", ["nothing", "the checkpoint of another folder"])
def test_a_restart_goes_on_whatever_it_was_asked(asked, killed, small_tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="holds another run"):
        start(killed, small_tokenizer)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    resume = None if asked == "nothing" else str(killed.parent / "elsewhere" / "checkpoint-1")
    trainer = start(killed, small_tokenizer, resume)
    assert trainer._run.checkpoint == str(killed / "checkpoint-2")
    assert len(losses_of(trainer)) == 6


def test_a_restart_leaves_the_run_of_another_job_alone(killed, small_tokenizer, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="holds another run"):
        start(killed, small_tokenizer)


def test_a_job_that_goes_on_owns_the_run(killed, small_tokenizer, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    before = json.loads((killed / RUN_FILE).read_text())
    start(killed, small_tokenizer, True)
    after = json.loads((killed / RUN_FILE).read_text())
    assert before["launch"] == "job@"
    assert after["launch"] == elastic.launch() == "second@"
    assert {k: before[k] for k in ("run", "started")} == {k: after[k] for k in ("run", "started")}


# --- a process that is slow

FAST = [0.01, 0.19]


def pace(processes: int) -> Pace:
    accelerator: Any = type("Accelerator", (), {"num_processes": processes})()
    found = Pace(accelerator)
    found._hosts = [f"node{i // 2}" for i in range(processes)]
    return found


def test_a_slow_process_is_named_after_several_logs():
    four = pace(4)
    slow = [FAST, FAST, FAST, [0.2, 0.2]]
    assert four.lines(slow) == []
    assert four.lines([FAST] * 4) == []  # it was once
    assert four.lines(slow) == []
    assert four.lines(slow) == []
    assert four.lines(slow) == [
        "process 3 on node1 keeps the others waiting: 0.400 s of a step are its own (batches "
        "0.200, forward 0.200), the median of 4 is 0.200"
    ]
    assert four.lines(slow) == []  # said once


def test_of_two_processes_the_slower_one_is_named_and_no_one_for_milliseconds():
    two = pace(2)
    assert [two.lines([[0.0, 0.4], FAST]) for _ in range(3)][-1] != []
    assert [two.lines([[0.0, 0.008], [0.0, 0.001]]) for _ in range(3)][-1] == []


@pytest.mark.matrix
def test_a_slow_process_is_named_in_a_run(tmp_path):
    run = launch("tests.distributed.fault_run", 2, str(tmp_path), "slow")
    assert run.returncode == 0, run.stderr[-3000:]
    said = re.findall(r"process (\d) on \S+ keeps the others waiting: .*", run.stderr)
    assert said == ["1"]
