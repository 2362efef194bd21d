"""Every shipped kernel configuration compiles for every target without a spill, on any machine."""

import re

import pytest

from benchmarks.aot import TARGETS, compile_configuration, configurations, measure
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")

LIMIT = {"cuda": 227 * 1024, "hip": 64 * 1024}  # shared memory a program: H100, MI300
CASES = [
    pytest.param(configuration, target, id=f"{name}-{configuration['name'].replace(' ', '_')}")
    for name, target in TARGETS.items()
    for configuration in ([] if INTERPRETED else configurations(target.backend))
]


def find(name: str, backend: str) -> dict:
    (found,) = [c for c in configurations(backend) if c["name"] == name]
    return found


@pytest.mark.parametrize(("configuration", "target"), CASES)
def test_no_spill(configuration, target) -> None:
    row = measure(configuration, target)
    assert row["spills"] == 0, row
    assert 0 < row["registers"] < 256, row
    assert row["shared"] <= LIMIT[target.backend], row


def test_every_kernel_is_listed() -> None:
    """Each kernel that a launcher starts is in the list, in as many ways as it is launched."""
    for backend in ("cuda", "hip"):
        listed = [c["fn"].__name__ for c in configurations(backend)]
        # dtypes × softcap × alignment
        assert listed.count("_logprob_forward_kernel") == 3 * 2 * 2
        assert listed.count("_logprob_backward_kernel") == 3 * 2 * 2
        # ref × θ dtypes × alignment, the halves in two roundings
        assert listed.count("_ema_kernel") == 3 * 3 * 2 + 2 * 3 * 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_measure_sees_a_spill(target) -> None:
    """The forward kernel with fewer registers than it needs: 24 of 48 on NVIDIA, 64 for 128 columns
    a thread on AMD."""
    configuration = find("logprob_forward bf16", target.backend)
    if target.backend == "cuda":
        configuration["options"] = {"num_warps": 8, "maxnreg": 24}
    else:
        configuration["constexprs"]["BLOCK"] = 8192
        configuration["options"] = {"num_warps": 1, "waves_per_eu": 8}
    assert measure(configuration, target)["spills"] > 0


@pytest.mark.parametrize("kernel", ["logprob_forward", "logprob_backward"])
def test_row_offsets_are_64_bit(kernel: str) -> None:
    """row · stride passes 2³¹ with 16,384 rows of 131,072 logits."""
    ttir = compile_configuration(find(f"{kernel} bf16", "cuda"), TARGETS["sm_90"]).asm["ttir"]
    products = re.findall(r"arith\.muli %row\S*, .* : (\w+)", ttir)
    assert products == ["i64"], ttir


def test_element_offsets_of_ema_are_64_bit() -> None:
    ttir = compile_configuration(find("ema bf16<-bf16 nearest", "cuda"), TARGETS["sm_90"]).asm[
        "ttir"
    ]
    products = re.findall(r"%begin\S* = arith\.muli .* : (\w+)", ttir)
    assert products == ["i64"], ttir


@pytest.mark.parametrize(
    "name",
    [
        "logprob_forward bf16",
        "logprob_backward bf16",
        "ema bf16<-bf16 nearest",
        "ema bf16<-bf16 stochastic",
        "ema bf16<-fp32 stochastic",
    ],
)
def test_aligned_tensors_move_16_bytes_a_thread(name: str) -> None:
    ptx = compile_configuration(find(name, "cuda"), TARGETS["sm_90"]).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    if "forward" not in name:  # whose output is two numbers a row
        assert "st.global.v4.b32" in ptx
        assert "st.global.b16" not in ptx
