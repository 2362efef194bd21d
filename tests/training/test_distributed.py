"""Two real processes (gloo) against one on the same global batches: DDP, FSDP2, ZeRO-3."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.processes import check_ended, launch
from tests.training.distributed_run import (
    CASES,
    KINDS,
    PROCESSES,
    REFUSED,
    RESUMED,
    ROWS,
    STEPS,
    train,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """case -> what one process finds, made when it is asked for."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def find(case):
        if case not in found:
            found[case] = train(case, folder / case, batch=PROCESSES * ROWS)
        return found[case]

    return find


# `make test` runs these, and `make test-slow` all
SOME = {
    "ddp": ("dpo-snapshot", "dpo-offloaded", "kto-resident", "dpo-split", "dpo-precomputed"),
    "fsdp2": ("dpo-snapshot", "dpo-lora", "kto-resident", "dpo-first-layer"),
}
WITHOUT_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
WHOLE = [
    pytest.param(
        (kind, CASES), id=kind, marks=pytest.mark.matrix if kind in SOME else WITHOUT_DEEPSPEED
    )
    for kind in KINDS
]
PART = [pytest.param((kind, cases), id=f"some-{kind}") for kind, cases in SOME.items()]


@pytest.fixture(scope="module", params=[*WHOLE, *PART])
def together(request, tmp_path_factory):
    kind, cases = request.param
    folder = tmp_path_factory.mktemp(kind)
    check_ended(
        launch(
            "tests.training.distributed_run", PROCESSES, str(folder), kind, *cases,
            # DeepSpeed builds there, and waits for ever for a build that was killed
            DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
        )
    )  # fmt: skip
    found = json.loads((folder / "losses.json").read_text())
    assert set(cases) - set(found) == set(REFUSED.get(kind, ()))
    return {**found, "kind": kind, "folder": folder}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case, alone, together):
    if case not in together:
        pytest.skip("refused there, in one line, or not among some")
    two, one = together[case], alone(case)
    assert len(two["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert len(set(two["losses"])) > STEPS // 2
    assert two["evaluated"] == pytest.approx(one["evaluated"], rel=1e-3)
    if case.startswith("kto"):
        assert two["kl"] == pytest.approx(one["kl"], rel=1e-3, abs=1e-6)
        assert max(two["kl"]) > 0


@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_resume_in_mid_window(case, together):
    if case not in together:
        pytest.skip("refused there, in one line, or not among some")
    assert together[f"{case}-resumed"]["losses"] == together[case]["losses"]


@pytest.mark.filterwarnings("ignore:a step of")
@pytest.mark.parametrize("case", RESUMED)
def test_one_process_goes_on_from_the_checkpoint_of_two(case, together, tmp_path):
    if case not in together:
        pytest.skip("refused there, in one line, or not among some")
    checkpoint = str(together["folder"] / case / "checkpoint-3")
    resume = {"batch": PROCESSES * ROWS, "resume_from": checkpoint}
    if together["kind"] == "zero3":
        with pytest.raises(ValueError, match="processes whose shards DeepSpeed wrote: 2 there"):
            train(case, tmp_path, **resume)
        return
    alone = train(case, tmp_path, **resume)
    assert alone["losses"] == pytest.approx(together[case]["losses"], rel=1e-5)
