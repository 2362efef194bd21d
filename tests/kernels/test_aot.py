"""Kernels compile for every target without a spill, on any machine.

Every configuration of the small kernels, a representative few of those that take seconds each;
`python -m benchmarks.report` compiles all and fails where one spills.
"""

import re

import pytest
import triton

from benchmarks.report import TARGETS, compile_configuration, configurations, measure
from tests.kernels.conftest import INTERPRETED
from tralign_kernels import linear_logprob

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")

# What older compilers spill, by Triton's version, in the unit of `measure`; nothing else may.
KNOWN_SPILLS = {
    "3.6": {
        "sm_100-adafactor_statistics_8192_fp32_split_scaled": 8,
        "sm_100-preference_sigmoid_alpha_divergence": 8,
        "sm_100-preference_sigmoid_bco_pair_sft_weights": 8,
        "gfx942-linear_logprob_bf16_128x128_bias_powers_statistics": 1,
    },
    "3.7": {
        "sm_100-adamw_bf16_fp32_alone": 8,
        "sm_100-linear_logprob_bf16_128x128_bias_powers": 16,
        "gfx942-linear_logprob_bf16_128x128_bias_powers_statistics": 3,
    },
}
KNOWN = KNOWN_SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})
LIMIT = {"cuda": 227 * 1024, "hip": 64 * 1024}  # shared memory a program: H100, MI300
CASES = [
    pytest.param(configuration, target, id=f"{name}-{configuration['name'].replace(' ', '_')}")
    for name, target in TARGETS.items()
    for configuration in ([] if INTERPRETED else configurations(name))
    if configuration.get("representative", True)
]


def find(name: str, target: str) -> dict:
    (found,) = [c for c in configurations(target) if c["name"] == name]
    return found


@pytest.mark.parametrize(("configuration", "target"), CASES)
def test_no_spill(configuration, target, request) -> None:
    row = measure(configuration, target)
    assert row["spills"] == KNOWN.get(request.node.callspec.id, 0), row
    assert 0 < row["registers"] < 256, row
    assert row["shared"] <= LIMIT[target.backend], row


def test_known_spills_are_of_cases() -> None:
    """A renamed or removed configuration leaves the list."""
    cases = {case.id for case in CASES}
    for known in KNOWN_SPILLS.values():
        assert set(known) <= cases


def test_every_kernel_is_listed() -> None:
    """Each kernel that a launcher starts is in the list, in as many ways as it is launched."""
    for target in TARGETS:
        listed = [c["fn"].__name__ for c in configurations(target)]
        # dtypes × softcap × alignment, the forward with and without statistics
        assert listed.count("_logprob_forward_kernel") == 3 * 2 * 2 * 2
        assert listed.count("_logprob_backward_kernel") == 3 * 2 * 2
        # ref × θ dtypes × alignment, the halves in two roundings
        assert listed.count("_ema_kernel") == 3 * 3 * 2 + 2 * 3 * 2
        # tile candidates and the unaligned tile × plain or not; fp32 has one candidate. With powers
        # each candidate × bias where it has room for one; with statistics each × powers, likewise
        launches = linear_logprob.POWERS_LAUNCH[target], linear_logprob.STATISTICS_LAUNCH[target]
        powers, statistics = (
            sum(1 + linear_logprob.is_roomy(c) for c in table) for table in launches
        )
        kinds = 2 * (2 + 1) + 1 + 1 + statistics
        assert listed.count("_linear_logprob_kernel") == kinds * 2 + powers
        # each candidate × bias, and the last to repair
        assert listed.count("_linear_powers_kernel") == (len(launches[0]) + 1) * 2
        assert listed.count("_scale_rows_kernel") == 2  # aligned or not
        assert listed.count("_combine_kernel") == 2  # with statistics or without
        # losses, two in the other normalisation, lengths, KL given, sums, f-divergence and weights
        assert listed.count("_preference_kernel") == 14 + 2 + 1 + 2 + 2 + 1 + 1
        # dtypes × scaled × (4 blocks and a row of parts, 3 and one where C is no multiple of 16)
        assert listed.count("_adafactor_statistics_kernel") == 3 * 2 * (5 + 4)
        assert listed.count("_adafactor_factors_kernel") == 2 * 2
        assert listed.count("_adafactor_update_kernel") == 3 * 2 * 3 * 2
        assert listed.count("_adafactor_vector_kernel") == 3 * 2 * 3
        # alignment × (dtypes), and × (pairs of weight and state × alone or not)
        assert listed.count("_adamw_check_kernel") == 2 * 3
        assert listed.count("_adamw_kernel") == 2 * 5 * 2
        # dtype pairs × roundings × alignment, fp32 in one rounding
        assert listed.count("_lora_merge_kernel") == (1 + 3 * 2) * 2


@pytest.mark.parametrize("name", TARGETS)
def test_measure_sees_a_spill(name) -> None:
    """The forward kernel with fewer registers than it needs: 24 of 48 on NVIDIA, 64 for 128 columns
    a thread on AMD."""
    configuration, target = find("logprob_forward bf16", name), TARGETS[name]
    if target.backend == "cuda":
        configuration["options"] = {"num_warps": 8, "maxnreg": 24}
    else:
        configuration["constexprs"]["BLOCK"] = 8192
        configuration["options"] = {"num_warps": 1, "waves_per_eu": 8}
    assert measure(configuration, target)["spills"] > 0


@pytest.mark.parametrize("kernel", ["logprob_forward", "logprob_backward"])
def test_row_offsets_are_64_bit(kernel: str) -> None:
    """row · stride passes 2³¹ with 16,384 rows of 131,072 logits."""
    ttir = compile_configuration(find(f"{kernel} bf16", "sm_90"), TARGETS["sm_90"]).asm["ttir"]
    products = re.findall(r"arith\.muli %row\S*, .* : (\w+)", ttir)
    assert set(products) == {"i64"}, ttir


def test_element_offsets_of_ema_are_64_bit() -> None:
    ttir = compile_configuration(find("ema bf16<-bf16 nearest", "sm_90"), TARGETS["sm_90"]).asm[
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
        "adamw bf16 bf16",
        "adafactor_update 1024 bf16",
    ],
)
def test_aligned_tensors_move_16_bytes_a_thread(name: str) -> None:
    ptx = compile_configuration(find(name, "sm_90"), TARGETS["sm_90"]).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    if "forward" not in name:  # whose output is two numbers a row
        assert "st.global.v4.b32" in ptx
        assert "st.global.b16" not in ptx


@pytest.mark.parametrize(
    "name", ["logprob_forward bf16 statistics", "logprob_backward bf16", "linear_powers 128x256"]
)
def test_exponentials_keep_no_subnormal_numbers(name: str) -> None:
    """Each of which would take a comparison and two products more."""
    ptx = compile_configuration(find(name, "sm_90"), TARGETS["sm_90"]).asm["ptx"]
    assert "ex2.approx.ftz.f32" in ptx
    assert "ex2.approx.f32" not in ptx


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("sm_80", ["cp.async", "mma.sync"]),
        ("sm_90", ["cp.async.bulk.tensor", "wgmma.mma_async"]),
        ("sm_100", ["cp.async.bulk.tensor", "tcgen05.mma"]),
    ],
)
def test_the_head_uses_what_the_architecture_has(target: str, instructions: list[str]) -> None:
    launch = linear_logprob.WIDE_LAUNCH[target][0]
    configuration = find(f"linear_logprob bf16 {launch.rows}x{launch.columns}", target)
    ptx = compile_configuration(configuration, TARGETS[target]).asm["ptx"]
    for instruction in instructions:
        assert instruction in ptx


def test_ampere_tiles_fit_smaller_gpus() -> None:
    """sm_86, sm_89 and sm_120 run the tiles of sm_80 with 99 kB of shared memory a program."""
    for configuration in configurations("sm_80"):
        if configuration["fn"].__name__ == "_linear_logprob_kernel":
            launch = configuration["constexprs"]
            size = 4 if "fp32" in configuration["name"] else 2
            slices = (launch["ROWS"] + launch["COLUMNS"]) * launch["DEPTH"] * size
            assert slices * configuration["options"]["num_stages"] <= 99 * 1024


@pytest.mark.parametrize("name", ["hinge", "ipo", "ipo lengths"])
def test_means_and_shares_divide_to_the_nearest(name: str) -> None:
    """`/` is a product with a rounded reciprocal; these losses divide for nothing else."""
    ptx = compile_configuration(find(f"preference {name}", "sm_90"), TARGETS["sm_90"]).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full.f32" not in ptx
    assert "rcp.approx" not in ptx
