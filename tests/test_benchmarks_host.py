"""Host time of a step, held by what does not depend on the machine: what a layer adds to it."""

from __future__ import annotations

import cProfile
import dataclasses

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import host

pytest.importorskip("peft")


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def counts_of_a_step(case: host.Case, layers: int, folder: str) -> tuple[float, float]:
    """Functions that a step calls, of Python and of C, and operators that it dispatches, views
    among them; its share of sweep and move too."""
    case = dataclasses.replace(case, layers=layers)
    with host.as_asked(case):
        arm = host.Arm("ours", host.workload(case), folder)
        arm.round()  # imports, looks at the layers
        profiler = cProfile.Profile()
        profiler.enable()
        arm.round()
        profiler.disable()
        with Operators() as operators:
            arm.round()
    calls = sum(entry.callcount for entry in profiler.getstats())
    return calls / host.STEPS, operators.count / host.STEPS


# counted with torch 2.13 and transformers 5.24; other versions have a few more calls
@pytest.mark.parametrize(
    ("name", "calls", "operators"),
    [
        ("full, one call", 1_460, 322),
        ("full, torch's norm kernel", 1_490, 265),
        ("lora, one call", 5_050, 405),
        ("full, graphs", 536, 0),
        ("lora, graphs", 2_550, 34),  # a round's sweep and move: graphs leave that to the layers
    ],
)
def test_a_layer_adds_no_more_to_a_step_than_it_did(name, calls, operators, tmp_path):
    one, two = (counts_of_a_step(host.CASES[name], n, str(tmp_path)) for n in (1, 2))
    found = two[0] - one[0], two[1] - one[1]
    assert 0.5 * calls < found[0] <= 1.15 * calls
    assert 0.5 * operators <= found[1] <= 1.03 * operators
