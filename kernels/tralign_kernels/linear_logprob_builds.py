"""What `linear_logprob` and `linear_powers` launch, to be compiled ahead of time, and its bytes."""

# pyright: reportPrivateUsage=false

from typing import Any

import triton

from . import head_tiles, linear_logprob, linear_powers
from .launch import FLOAT_PRECISION, DotLaunch
from .linear_logprob import (
    POWERS_LAUNCH,
    SMALL_LAUNCH,
    STATISTICS_LAUNCH,
    WIDE_LAUNCH,
    is_roomy,
)
from .logprob import DTYPES

_SIZES = ("start", "N", "W", "H", "hidden_stride", "weight_stride", "powers_stride")


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """Every configuration that the launcher can launch on `backend`, as `ema.aot_configurations`.

    targets: the architectures that launch it. representative: whether the tests compile it, which
    leave the candidates of TRALIGN_AUTOTUNE and most of the rest to benchmarks.report.
    """
    architectures = ["sm_80", "sm_90", "sm_100"] if backend == "cuda" else ["gfx942"]
    configurations = [_combine_configuration(statistics) for statistics in (False, True)]
    for name in architectures:
        for dtype in DTYPES.values():
            small = SMALL_LAUNCH[name]
            candidates = small if dtype == "fp32" else WIDE_LAUNCH[name]
            for launch, aligned in [*((c, True) for c in candidates), (small[0], False)]:
                plain, every = (False, False), (True, is_roomy(launch))
                for bias, softcap in (plain, every):
                    configuration = _configuration(name, dtype, launch, aligned, bias, softcap)
                    by_default = dtype == "bf16" and launch == candidates[0]
                    configuration["representative"] = by_default or (
                        dtype == "fp32" and softcap and not aligned
                    )
                    configurations.append(configuration)
        for launch in POWERS_LAUNCH[name]:
            roomy = is_roomy(launch)
            for bias in (False, True) if roomy else (False,):
                configuration = _configuration(name, "bf16", launch, True, bias, False, True)
                configuration["representative"] = bias or not roomy
                configurations.append(configuration)
            for bias in (False, True):
                configurations.append(_powers_configuration(name, launch, bias, repair=False))
            if launch == POWERS_LAUNCH[name][-1]:
                configurations += [
                    _powers_configuration(name, launch, bias, repair=True) for bias in (False, True)
                ]
        configurations += _statistics_configurations(name)
    configurations += [_scale_configuration(backend, aligned) for aligned in (True, False)]
    return configurations


def _statistics_configurations(target: str) -> list[dict[str, Any]]:
    found = []
    for launch in STATISTICS_LAUNCH[target]:
        for bias in (False, True) if is_roomy(launch) else (False,):
            for powers in (False, True):
                configuration = _configuration(
                    target, "bf16", launch, True, bias, False, powers, statistics=True
                )
                by_default = launch == STATISTICS_LAUNCH[target][0]
                configuration["representative"] = powers and (bias or not is_roomy(launch))
                configuration["representative"] &= by_default
                found.append(configuration)
    return found


def _powers_configuration(
    target: str, launch: DotLaunch, bias: bool, repair: bool
) -> dict[str, Any]:
    N, W, H = 2048, 128_256, 4096  # Llama-3-8B
    like = _configuration(target, "bf16", launch, True, bias, False, True)
    kept = ("TMA", "PRECISION", "SPLIT", "GROUP", "ROWS", "COLUMNS", "DEPTH")
    constexprs = {"BIAS": bias, "REPAIR": repair, **{k: like["constexprs"][k] for k in kept}}
    signature = {
        **{name: like["signature"][name] for name in ("hidden", "weight", "bias_ptr")},
        **{"targets_ptr": "*i64", "logsumexp_ptr": "*fp32", "logps_ptr": "*fp32"},
        **{"powers": "*bf16" if repair else like["signature"]["powers"], "powers_ptr": "*bf16"},
        **dict.fromkeys(_SIZES, "i32"),
        **{"inner": "fp32", "outer": "fp32"},
        **dict.fromkeys(constexprs, "constexpr"),
    }
    name = f"linear_powers {launch.rows}x{launch.columns}" + " bias" * bias + " repair" * repair
    described = [i for i, kind in enumerate(signature.values()) if kind.startswith("tensordesc")]
    divisible = [i for i in (*range(8), 10, 11, 12, 13, 14) if i not in described]
    return {
        "name": name,
        "targets": (target,),
        "fn": linear_powers._linear_powers_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in divisible},
        "options": like["options"],
        "shape": like["shape"],
        **powers_traffic(N, W, H, launch, bias, repair),
        "representative": bias and not repair and launch == POWERS_LAUNCH[target][0],
    }


def _scale_configuration(backend: str, aligned: bool) -> dict[str, Any]:
    N, H = 2048, 4096
    launch = linear_powers.SCALE_LAUNCH[backend]
    return {
        "name": "scale_rows" + " unaligned" * (not aligned),
        "fn": linear_powers._scale_rows_kernel,
        "signature": {
            "source_ptr": "*bf16",
            "scaled_ptr": "*bf16",
            "logsumexp_ptr": "*fp32",
            "grad_ptr": "*fp32",
            "slope": "fp32",
            **dict.fromkeys(("H", "source_stride", "scaled_stride"), "i32"),
            "BLOCK": "constexpr",
        },
        "constexprs": {"BLOCK": launch.block},
        "attrs": {
            (i,): [["tt.divisibility", 16]]
            for i in ((0, 1, 2, 3, 5, 6, 7) if aligned else range(4))
        },
        "options": {"num_warps": launch.num_warps},
        "shape": f"N={N} H={H}",
        **scale_traffic(N, H, launch.block),
    }


def _configuration(
    target: str,
    dtype: str,
    launch: DotLaunch,
    aligned: bool,
    bias: bool,
    softcap: bool,
    powers: bool = False,
    statistics: bool = False,
) -> dict[str, Any]:
    N, W, H = 2048, 128_256, 4096  # Llama-3-8B
    constexprs = {
        "BIAS": bias,
        "SOFTCAP": softcap,
        "POWERS": powers,
        "STATISTICS": statistics,
        "PARTS": launch.parts,
        "TMA": launch.tma,
        "PRECISION": FLOAT_PRECISION[target],
        "SPLIT": head_tiles.SPLIT,
        "GROUP": head_tiles.GROUP if launch not in SMALL_LAUNCH[target] else 0,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
    }
    pointer = f"*{dtype}"
    hidden = f"tensordesc<{dtype}[{launch.rows}, {launch.depth}]>" if launch.tma else pointer
    weight = f"tensordesc<{dtype}[{launch.columns}, {launch.depth}]>" if launch.tma else pointer
    # arguments divisible by 16: pointers, W, H, row strides
    divisible = (*range(7), 9, 10, 11, 12, 13) if aligned else range(7)
    name = f"linear_logprob {dtype} {launch.rows}x{launch.columns}"
    name += " bias" * bias + " softcap" * softcap + " powers" * powers
    name += " statistics" * statistics
    name += " unaligned" * (not aligned)
    return {
        "name": name,
        "targets": (target,),
        "fn": linear_logprob._linear_logprob_kernel,
        "signature": {
            "hidden": hidden,
            "weight": weight,
            "bias_ptr": pointer,
            "targets_ptr": "*i64",
            "partial_ptr": "*fp32",
            "target_logit_ptr": "*fp32",
            "powers": (
                f"tensordesc<{dtype}[{launch.rows}, {launch.columns // launch.parts}]>"
                if powers and launch.tma
                else pointer
            ),
            **dict.fromkeys(_SIZES, "i32"),
            "inner": "fp32",
            "outer": "fp32",
            **dict.fromkeys(constexprs, "constexpr"),
        },
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]]
            for i in divisible
            if not (launch.tma and (i in (0, 1) or (powers and i == 6)))
        },
        "options": {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        "shape": f"N={N} W={W} H={H}",
        **traffic(N, W, H, 4 if dtype == "fp32" else 2, launch, bias, powers, statistics),
    }


def traffic(
    N: int,
    W: int,
    H: int,
    size: int,
    launch: DotLaunch,
    bias: bool,
    powers: bool = False,
    statistics: bool = False,
) -> dict[str, int]:
    """Bytes that the kernel asks for (caches serve most), and that any kernel must."""
    row_blocks, splits = triton.cdiv(N, launch.rows), triton.cdiv(W, head_tiles.SPLIT)
    columns = sum(
        triton.cdiv(min(head_tiles.SPLIT, W - begin), launch.columns)
        for begin in range(0, W, head_tiles.SPLIT)
    )
    operands = (columns * N + row_blocks * W) * H * size
    # targets are read for every item; its numbers are written
    vectors = N * (splits * (8 + _part_bytes(statistics)) + 4) + bias * row_blocks * W * size
    least = (N + W) * H * size + N * (8 + 8 + 4) + bias * W * size
    stored = powers * N * W * size
    return {"moved": operands + vectors + stored, "minimum": least + stored}


def powers_traffic(
    N: int, W: int, H: int, launch: DotLaunch, bias: bool, repair: bool
) -> dict[str, int]:
    """As `traffic`, of `linear_powers_`; to repair, of rows that need none."""
    splits = triton.cdiv(W, head_tiles.SPLIT)
    # targets and logsumexp for every item, log-probs in one of them
    vectors = N * (splits * (8 + 8) + 4)
    if repair:
        return {"moved": vectors + 2 * N, "minimum": N * (8 + 8 + 4 + 2)}
    made = traffic(N, W, H, 2, launch, bias, powers=True)  # reads and writes as many bytes a row
    return {"moved": made["moved"], "minimum": made["minimum"]}


def scale_traffic(N: int, H: int, block: int, size: int = 2) -> dict[str, int]:
    rows, vectors = 2 * N * H * size, N * (8 + 4)
    return {"moved": rows + triton.cdiv(H, block) * vectors, "minimum": rows + vectors}


def _part_bytes(statistics: bool) -> int:
    """Of a row and item."""
    return 6 * 4 if statistics else 2 * 4


def _combine_configuration(statistics: bool) -> dict[str, Any]:
    N, splits = 2048, triton.cdiv(128_256, head_tiles.SPLIT)
    traffic = _part_bytes(statistics) * N * splits + 16 * N + statistics * 40 * N
    constexprs = {"STATISTICS": statistics, "BLOCK": linear_logprob._COMBINE_BLOCK}
    return {
        "name": "linear_logprob combine" + " statistics" * statistics,
        "fn": linear_logprob._combine_kernel,
        "signature": {
            "partial_ptr": "*fp32",
            "logsumexp_ptr": "*fp32",
            "statistics_ptr": "*fp32",
            **dict.fromkeys(("N", "splits", "statistics_stride"), "i32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2)},
        "options": {"num_warps": 4},
        "shape": f"N={N} splits={splits}",
        "moved": traffic,
        "minimum": traffic,
    }
