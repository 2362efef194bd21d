"""The callback in two real processes (gloo): DDP and FSDP2 against one on the same batches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from tests.integrations.distributed_run import (
    CASES,
    KINDS,
    PROCESSES,
    RESUMED,
    ROWS_EACH,
    STEPS,
    build,
    train,
)
from tests.processes import check_ended, launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(folder):
    return found_by(PROCESSES, folder)


def found_by(processes, folder, *source):
    asked = (str(folder), *map(str, source))
    check_ended(launch("tests.integrations.distributed_run", processes, *asked))
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """With TRL's own head."""
    folder = tmp_path_factory.mktemp("alone")
    return {case: train(case, folder / case, batch=PROCESSES * ROWS_EACH) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_move_the_reference_as_one_does(kind, case, alone, together):
    mine, theirs = together[kind, case], alone[case]
    assert len(mine["losses"]) == STEPS
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert len({round(loss, 5) for loss in mine["losses"]}) > STEPS // 2
    assert mine["syncs"] == 3
    assert mine["sharded"] == (kind == "fsdp2")
    assert mine["reference"].keys() == theirs["reference"].keys()
    for name, weight in mine["reference"].items():
        torch.testing.assert_close(weight, theirs["reference"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", RESUMED)
def test_two_processes_find_their_reference_again(kind, case, together):
    whole, resumed = together[kind, case], together[kind, case]["resumed"]
    assert resumed["losses"] == whole["losses"]
    assert resumed["syncs"] == 2  # of its own: steps 4 and 6
    for name, weight in resumed["reference"].items():
        assert torch.equal(weight, whole["reference"][name])


def test_what_cannot_go_on_is_one_line(together):
    not_sharded, damaged = together["refused"]
    assert "of the policy and" in not_sharded
    assert "__1_0.distcp" in damaged
    assert "\n" not in not_sharded + damaged


def test_shards_are_read_whole_and_whole_weights_as_shards(together, folder, tmp_path):
    trainer = build("plain", tmp_path, batch=PROCESSES * ROWS_EACH)
    checkpoint = folder / "fsdp2" / "plain" / f"checkpoint-{STEPS}"
    trainer.callback_handler.callbacks[-1]._reference.load(checkpoint / "reference")
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, together["fsdp2", "plain"]["reference"][name])
    for name, weight in together["read"].items():
        assert torch.equal(weight, together["ddp", "plain"]["reference"][name])


@pytest.mark.matrix
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    together = found_by(PROCESSES, tmp_path / "2")["fsdp2", "plain"]
    alone = found_by(1, tmp_path / "1", tmp_path / "2")
    assert alone["losses"] == pytest.approx(together["losses"], rel=1e-5)
    for name, weight in alone["reference"].items():
        torch.testing.assert_close(weight, together["reference"][name], rtol=1e-5, atol=1e-6)
