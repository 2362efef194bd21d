"""Operators that a step dispatches: bounds, and what is counted."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import CASES

needs_peft = pytest.mark.skipif(not find_spec("peft"), reason="peft")


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_peft) for n in CASES])
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
