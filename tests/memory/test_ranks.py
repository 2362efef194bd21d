"""Memory of one of several GPUs: the trace of a rank against real processes, and what plan says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState

from tests.memory.ranks_run import CASES, HARD, RELEASE, tiny, work
from tests.processes import check_ended, launch
from tralign_fast.cli import main
from tralign_fast.memory import LiveTensors, MemoryReport, Workload, trace
from tralign_fast.memory import sharding as rank
from tralign_fast.memory.changes import changes
from tralign_fast.memory.layers import trace_deep
from tralign_fast.memory.plan_answer import GIB
from tralign_fast.memory.sharding import per_gpu, trace_rank

NEAR = 0.01  # of a rank's peak; 0.0011 is the most that was seen
PARTS = [f.name for f in dataclasses.fields(MemoryReport) if f.name != "peak"]


def of(ranks: int, own: Workload) -> Workload:
    return dataclasses.replace(own, gpus=ranks)


def launched(ranks: int, cases: list[str], folder: Path) -> list[dict[str, Any]]:
    """What each of real processes held at its peak."""
    check_ended(launch("tests.memory.ranks_run", ranks, str(folder), *cases))
    return [json.loads((folder / f"memory-{i}.json").read_text()) for i in range(ranks)]


def check(ranks: int, case: str, measured: list[dict[str, Any]]) -> None:
    report = trace(of(ranks, CASES[case]), as_on_gpu=False)
    for own in measured:  # of the last rank a row or two less
        assert report.peak == pytest.approx(own[case]["peak"], rel=NEAR), own[case]
    first = measured[0][case]
    assert report.parameters == first["parameters"] > 0
    for part in ("gradients", "optimizer", "reference", "gathered"):
        assert getattr(report, part) == pytest.approx(first[part], rel=NEAR, abs=64), part


def test_a_rank_holds_what_it_holds_in_two_processes(tmp_path):
    check(2, "release-adafactor", launched(2, ["release-adafactor"], tmp_path))


@pytest.fixture(scope="module", params=[2, 4])
def measured(request, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return launched(request.param, list(CASES), folder)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_it_holds_in_real_processes(case, measured):
    check(len(measured), case, measured)


def test_what_a_rank_holds():
    """Arithmetic that any trace must keep to, whatever PyTorch gathers when."""
    model = tiny(num_hidden_layers=1)
    weights = 2 * sum(p.numel() for p in Workload(model).build().parameters())
    largest = 2 * 3001 * 256
    adamw, release = (
        trace(of(8, work(model=model, options=o)))
        for o in ({**HARD, "reference": "resident"}, {**RELEASE, "optim": "adafactor"})
    )
    for report in (adamw, release):
        assert report.peak == sum(getattr(report, part) for part in PARTS)
        assert report.parameters == pytest.approx(weights / 8, rel=0.01)
    assert adamw.optimizer == pytest.approx(2 * weights / 8, rel=0.01)
    assert adamw.reference == pytest.approx(weights / 8, rel=0.01)
    assert release.reference == 0
    assert adamw.gradients >= largest / 8  # the head's, until the step
    assert release.gradients <= 2 * largest / 8
    # a whole weight, its gradient and a buffer for either
    assert 2 * largest <= release.gathered <= 5 * largest
    assert not dist.is_initialized()
    assert PartialState._shared_state.get("num_processes", 1) == 1


@pytest.mark.matrix
def test_two_shallow_models_say_what_a_rank_of_a_deep_one_holds(monkeypatch):
    from tralign_fast.memory import layers

    def whole(_):
        raise AssertionError("traced whole")

    small = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160}
    model = tiny(num_hidden_layers=16, **small)
    deep = of(4, work(model=model, tokens=256, options={**RELEASE, "optim": "adafactor"}))
    monkeypatch.setattr(layers, "trace", whole)
    assert trace_deep(deep) == trace(deep)


def test_the_counter_sees_a_storage_change_its_size():
    from tralign_fast.memory.one_rank import shards_counted

    with LiveTensors() as live, shards_counted(live):
        tensor = torch.empty(1024, dtype=torch.uint8)
        tensor.untyped_storage().resize_(0)
        live.start()
        tensor.untyped_storage().resize_(4096)
        tensor.untyped_storage().resize_(0)
        other = torch.empty(512, dtype=torch.uint8)
        del tensor, other
    assert live.report().peak == 4096


def test_a_trace_that_fails_is_arithmetic_and_says_so(monkeypatch, recipe, capsys):
    alone = MemoryReport(**dict.fromkeys(PARTS, 1000), peak=1000 * len(PARTS))

    def fails(own: Workload) -> MemoryReport:
        if own.gpus > 1:
            raise RuntimeError("no such backend: fake\nmore")
        return alone

    monkeypatch.setattr(rank, "trace_deep", fails)
    own = of(4, work(model=tiny(num_hidden_layers=1)))
    assert trace_rank(own) == (per_gpu(alone, own), "no such backend: fake")
    asked = ["plan", "--model", str(recipe.parent / "model"), "--tokens", "256", "--gpus", "4",
             "--no_alternatives"]  # fmt: skip
    assert main(asked) == 0
    said = "by arithmetic, not traced (no such backend: fake): as asked"
    assert said in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arithmetic"] == {
        "as asked": "no such backend: fake"
    }


def test_what_several_gpus_can_change():
    options = {**HARD, "gradient_checkpointing": True, "reference": "auto", "optim": "adamw_torch"}
    own = work(tokens=4096, options=options)
    several = [change for change, _ in changes(of(2, own))]
    assert several[:3] == [
        "--gradient_release true",
        "--gradient_release true --optim adafactor",
        "--gradient_release true --optim adafactor --tokens 2048",
    ]
    assert not any("8bit" in change for change in several)
    assert not any(c.endswith("adafactor --tokens 2048") for c, _ in changes(of(1, own)))


def test_a_plan_of_several_gpus_names_its_parts(recipe, capsys):
    model = str(recipe.parent / "model")
    asked = ["plan", "--model", model, "--tokens", "256", "--gpus", "2", "--no_alternatives"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "gathered" in text
    assert "the first one's step under FSDP2 is traced" in text
    assert "arithmetic" not in text


def test_a_rank_that_is_one_of_several_already_is_not_traced():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="this process is one of several already"):
            trace(of(2, work()))
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        of(0, work())


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "gpus", "options", "gib"),
    [("llama-3.1-8b", 2, {"tokens": 2048}, 12), ("llama-3.1-70b", 8, {}, 80)],
)
def test_all_weights_fit_the_cards_of_the_docs(model, gpus, options, gib):
    from tralign_fast.memory.plan_answer import HEADROOM
    from tralign_fast.memory.plan_options import PlanOptions, workload

    asked = PlanOptions(model, gpus=gpus, gradient_release=True, optim="adafactor", **options)
    report, why = trace_rank(workload(asked))
    assert why is None
    assert report.peak + HEADROOM <= gib * GIB
