"""Real processes (gloo) that share a model's layers against one that has them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.tensor_parallel_run import (
    CASES,
    LAYOUTS,
    RESUMED,
    STEPS,
    model_of,
    save_models,
    train,
)
from tralign_fast.distributed.tensor_parallel import check_layers
from tralign_fast.reference import reference_class

ROOT = Path(__file__).parents[2]
# `make test` runs these, and `make test-slow` all
SOME = {"tp2": ("kto-resident", "dpo-snapshot")}
WHOLE = {"tp2": tuple(CASES), "tp2-fsdp2": ("dpo-resident", "dpo-snapshot", "kto-resident")}
PARAMETERS = [
    *[pytest.param((k, cases), id=f"some-{k}") for k, cases in SOME.items()],
    *[pytest.param((k, c), id=k, marks=pytest.mark.matrix) for k, c in WHOLE.items()],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor-parallel")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """case -> what one process finds, made when it is asked for."""
    found = {}

    def find(case):
        if case not in found:
            found[case] = train(case, folder / "alone", model_of(case, folder))
        return found[case]

    return find


@pytest.fixture(scope="module", params=PARAMETERS)
def together(request, folder):
    layout, cases = request.param
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(LAYOUTS[layout][0]), "-m", "tests.training.tensor_parallel_run",
        str(folder), layout, *cases,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / f"{layout}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_layers_train_as_one_does(case, alone, together):
    if case not in together:
        pytest.skip("not among those of this layout")
    ours, one = together[case], alone(case)
    assert len(ours["loss"]) == STEPS
    assert len(set(ours["loss"])) > STEPS // 2
    assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert ours["kl"] == pytest.approx(one["kl"], rel=1e-3, abs=1e-6)
    assert ours["entropy"] == pytest.approx(one["entropy"], rel=1e-5)
    assert ours["num_tokens"] == one["num_tokens"]
    assert ours["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert ours["eval_rows"] == one["eval_rows"]


@pytest.mark.parametrize("case", RESUMED)
def test_they_resume_in_mid_window(case, together):
    if case not in together:
        pytest.skip("not among those of this layout")
    assert together[f"{case}-resumed"]["loss"] == together[case]["loss"]


@pytest.mark.parametrize(
    ("processes", "place", "options", "message"),
    [
        (3, "resident", {}, "4 attention heads cannot be shared by 3 processes"),
        (4, "resident", {}, "2 key-value heads cannot be shared by 4 processes"),
        (2, "resident", {}, "cuts weights that are no DTensors"),
        (2, "adapter", {}, 'reference="adapter" cannot hold weights that tensor parallelism'),
        (2, "resident", {"log_kl_initial": True}, "log_kl_initial is not supported beside"),
        (2, "resident", {"torch_compile": True}, "torch_compile is not supported beside"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_numbers(
    processes, place, options, message, tiny_llama
):
    tiny_llama._tp_size = processes
    args = SimpleNamespace(**{"log_kl_initial": False, "torch_compile": False, **options})
    with pytest.raises(ValueError, match=message) as caught:
        check_layers(tiny_llama, reference_class(place), args)
    assert "\n" not in str(caught.value)
