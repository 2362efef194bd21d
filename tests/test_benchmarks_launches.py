"""Operators that a step dispatches: bounds, and what is counted."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import CASES

needs_both = pytest.mark.skipif(
    not (find_spec("peft") and find_spec("liger_kernel")), reason="PEFT and Liger"
)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """What several tests ask of the same case."""
    own, found = launches.count, {}

    def count(case, **options):
        key = (id(case), *sorted(options.items()))
        if key not in found:
            found[key] = (case, own(case, **options))  # a case that lives keeps its id
        return found[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "count", count)
        yield


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_both) for n in CASES])
def test_a_step_dispatches_no_more_operators_than_it_did(name):
    """At real size. A step that needs fewer: lower `bound`, towards the goal."""
    case = CASES[name]
    total = launches.at_full_size(case).total()
    assert 0.5 * case.bound < total <= case.bound


@pytest.mark.matrix
def test_further_layers_add_what_the_second_does():
    case = CASES["1B full"]
    one, two, four = (launches.count(case, layers=n) for n in (1, 2, 4))
    assert {k: one[k] + 3 * (two[k] - one[k]) for k in one | two} == dict(four)


def test_views_and_allocations_are_no_launches():
    aten = torch.ops.aten
    for op in (aten.view.default, aten.t.default, aten.empty.memory_format, aten.slice.Tensor):
        assert not launches._computes(op)
    for op in (aten.mm.default, aten.add_.Tensor, aten.copy_.default, aten.slice_backward.default,
               aten._fused_adamw_.default):  # fmt: skip
        assert launches._computes(op)


@needs_both
def test_a_kernel_of_ligers_is_one_operator():
    """Of two layers' norms, MLPs and rotary embeddings, in a forward without gradient, one that is
    run again, and a backward."""
    case = CASES["8B LoRA 64"]
    (one, two) = (launches.count(case, layers=n) for n in (1, 2))
    added = {phase: two[phase, "Liger's kernel"] - one[phase, "Liger's kernel"]
             for phase in ("reference", "forward", "backward")}  # fmt: skip
    assert added == {"reference": 2, "forward": 4, "backward": 8}
    plain = {**case.fields, "options": {"layer_kernels": "none"}}
    without = launches.count(dataclasses.replace(case, fields=plain), layers=2)
    assert not [key for key in without if key[1] == "Liger's kernel"]
    assert without.total() > two.total() + 2 * 80


def test_one_node_for_head_and_loss_spares_no_operator():
    """Why the trainer makes two calls (docs/decisions.md); and powers take one operator more, the
    hidden states times their rows' factors."""
    totals = {name: launches.count_head(*kind).total() for name, kind in launches.HEADS.items()}
    assert totals["one node"] == totals["two calls"] == 13
    assert totals["one node, powers"] == totals["two calls, powers"] == 14
    assert totals["two calls, statistics, powers"] == totals["two calls, statistics"] + 1
    own = launches.count_head(*launches.HEADS["two calls, statistics, powers"])
    assert not [key for key in own if key == ("forward", "mm.out")]  # no logits are made
