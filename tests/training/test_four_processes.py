"""Four real processes (gloo) against one on the same global batches: DDP and FSDP2, all places of
the reference, gradient release; each also resumed in the midst of a window."""

from __future__ import annotations

import json

import pytest

from tests.processes import check_ended, launch, torchrun
from tests.training.matrix_run import CASES, PLACES, PROCESSES, RELEASED, ROWS, STEPS, train

# `make test` runs these, and `make test-slow` all
SOME = ("fsdp2:dpo-adapter-adafactor", "fsdp2:traffic-snapshot", "checks")
TRAFFIC = [f"traffic-{place}" for place in PLACES]
WHOLE = [f"fsdp2:{case}" for case in (*CASES, *TRAFFIC)]
WHOLE += [f"ddp:{case}" for case in (*CASES, *TRAFFIC) if case not in RELEASED]
WHOLE.remove("ddp:dpo-adapter-4bit")  # each process has a base of its own: as one process
# a launch each
PARTS = [WHOLE[i::4] for i in range(4)]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME, id="some"),
        *(
            pytest.param(part, id=f"part-{i}", marks=pytest.mark.matrix)
            for i, part in enumerate(PARTS)
        ),
    ],
)
def test_four_processes_train_as_one_does(names, tmp_path):
    run = launch("tests.training.matrix_run", PROCESSES, str(tmp_path), *names)
    check_ended(run)
    found = json.loads((tmp_path / "losses.json").read_text())
    cases = {case for _, case in pairs(names)}
    alone = {case: train(case, tmp_path / case, batch=PROCESSES * ROWS) for case in cases}
    for name in found:
        expected = alone[name.split(":")[1]]
        assert len(expected) == STEPS
        assert max(expected) - min(expected) > 1e-3, name  # it does train
        assert found[name]["losses"] == pytest.approx(expected, rel=1e-5), name
        assert found[name]["resumed"] == found[name]["losses"], name
    assert found.keys() == {f"{kind}:{case}" for kind, case in pairs(names)}


def pairs(names):
    """(kind, case) of those that train to losses."""
    split = [name.split(":") for name in names if ":" in name]
    return [(kind, case) for kind, case in split if not case.startswith("traffic-")]


@pytest.mark.matrix
def test_gradients_are_released_on_shards_by_kernels():
    pytest.importorskip("triton")
    check_ended(torchrun("tests.training.release_checks", PROCESSES, TRITON_INTERPRET="1"))
