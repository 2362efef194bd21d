"""What `adafactor_step_` and `adamw_step_` launch, to be compiled ahead of time, and its bytes."""

# pyright: reportPrivateUsage=false

from typing import Any

import triton

from . import adafactor, adamw

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """As `ema.aot_configurations`, the same on every backend."""
    return _adafactor_configurations() + _adamw_configurations()


def _entry(
    fn: Any,
    name: str,
    dtypes: dict[str, str],
    ints: dict[str, bool],
    constexprs: dict[str, Any],
    **rest: Any,
) -> dict[str, Any]:
    """A configuration, of a kernel's arguments: pointers are to fp32 and numbers are fp32, but for
    those of `dtypes` and `ints` (which says what is a multiple of 16, as all addresses are)."""
    signature, divisible = {}, []
    for index, argument in enumerate(fn.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + dtypes.get(argument, "fp32")
            divisible.append(index)
        elif argument in ints:
            signature[argument] = "i32"
            divisible += [index] if ints[argument] else []
        else:
            signature[argument] = "fp32"
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    own = {"signature": signature, "constexprs": constexprs, "attrs": attributes}
    return {"name": name, "fn": fn, **own, **rest}


def _adafactor_configurations() -> list[dict[str, Any]]:
    """Of every block of the first launch, and of rows in parts; C a multiple of 16 or not."""
    found = []
    for name in ("fp32", "bf16", "fp16"):
        for scaled in (False, True):
            for C in (64, 256, 1024, 4096, 8192, 14_336, 50, 250, 1001, 4001, 5001):
                found += _matrix_configurations(name, scaled, 4096, C)
            for C in (4096, 128_256):
                found += _vector_configurations(name, scaled, C)
    seen = {}  # the small launches are the same for many lengths of a row
    for configuration in found:
        seen.setdefault(configuration["name"], configuration)
    return list(seen.values())


def _matrix_configurations(name: str, scaled: bool, R: int, C: int) -> list[dict[str, Any]]:
    plan, size = adafactor.plan_of(1, R, C), _SIZES[name]
    dtypes = {"weight_ptr": name, "grad_ptr": name}
    ints = {"R": False, "C": C % 16 == 0, "groups": False}
    tail = " scaled" * scaled + " unaligned" * (C % 16 != 0)
    moved, shape = adafactor_traffic(R, C, size, scaled), f"R={R} C={C}"
    usual, split = name == "bf16" and not scaled, plan.parts > 1
    return [
        _entry(
            adafactor._adafactor_statistics_kernel,
            f"adafactor_statistics {plan.block} {name}{' split' * split}{tail}", dtypes,
            {**ints, "rows": False}, {"SCALED": scaled, "SPLIT": split, "BLOCK": plan.block},
            options={"num_warps": plan.num_warps}, shape=shape, **moved[0],
            representative=usual or (scaled and split),
        ),
        _entry(
            adafactor._adafactor_factors_kernel, "adafactor_factors" + tail, dtypes,
            {**ints, "M": False, "squares": False},
            {"SCALED": scaled, "GROUPS": adafactor._PARTIALS, "BLOCK": adafactor._COLUMNS,
             "SUMS": adafactor._SUMS},
            options={"num_warps": 4}, shape=shape, **moved[1],
        ),
        _entry(
            adafactor._adafactor_update_kernel,
            f"adafactor_update {plan.tile} {name}{tail}", dtypes,
            {**ints, "sums": False, "seed": False, "first_counter": False},
            {"SCALED": scaled, "ROWS": adafactor._TILES[plan.tile], "BLOCK": plan.tile,
             "SUMS": adafactor._SUMS},
            options={"num_warps": adafactor._WARPS}, shape=shape, **moved[2], representative=usual,
        ),
    ]  # fmt: skip


def _vector_configurations(name: str, scaled: bool, C: int) -> list[dict[str, Any]]:
    size = _SIZES[name]
    ints = {"C": True, "programs": False, "seed": False, "first_counter": False}
    found = []
    alone = C <= adafactor._VECTOR
    for measures, updates in ((True, True),) if alone else ((True, False), (False, True)):
        word = "step" if measures and updates else ("measure" if measures else "update")
        moved = C * (2 * size + 4) + (C * (size + 4) if updates else 0)
        flags = {
            "MEASURES": measures,
            "UPDATES": updates,
            "SCALED": scaled,
            "BLOCK": adafactor._VECTOR,
            "SUMS": adafactor._SUMS,
        }
        found.append(
            _entry(
                adafactor._adafactor_vector_kernel,
                f"adafactor_vector_{word} {name}" + " scaled" * scaled,
                {"weight_ptr": name, "grad_ptr": name}, ints, flags,
                options={"num_warps": adafactor._WARPS}, shape=f"C={C}", moved=moved, minimum=moved,
                representative=name == "bf16" and not scaled,
            )
        )  # fmt: skip
    return found


def adafactor_traffic(R: int, C: int, size: int, scaled: bool) -> list[dict[str, int]]:
    """Bytes that each launch asks for on one matrix, and that any way to do its work must."""
    plan, blocks = adafactor.plan_of(1, R, C), triton.cdiv(C, adafactor._COLUMNS)
    parts, groups, half = plan.parts, plan.groups, R * C * size
    statistics = half * (parts + scaled) + R * parts * 4 + R * 4 + 8 * groups * C
    statistics += groups * 4 + groups * parts * (4 + 4 * scaled)
    factors = 8 * groups * C + blocks * (groups + 3) * 4 + 2 * C * 4 + 4
    factors += scaled * (groups * parts + 1) * 4
    programs = triton.cdiv(R, adafactor._TILES[plan.tile])
    update = 3 * half + 8 * R + programs * (C + blocks + 2 + scaled) * 4
    return [
        {"moved": statistics, "minimum": half * (1 + scaled) + 8 * (R + C)},
        {"moved": factors, "minimum": 8 * groups * C + 8 * C},
        {"moved": update, "minimum": 3 * half + 8 * R + 4 * C},
    ]


def _adamw_configurations() -> list[dict[str, Any]]:
    found = []
    numel = 4096 * 14336
    for aligned in (True, False):
        ints = {"size": aligned, "seed": False, "first_counter": False}
        tail = "" if aligned else " unaligned"
        shared = {"options": {"num_warps": adamw._WARPS}, "shape": f"{numel} elements"}
        for name, size in _SIZES.items():
            moved = adamw_traffic(numel, size, size)[0]
            found.append(
                _entry(
                    adamw._adamw_check_kernel,
                    f"adamw_check {name}" + tail, {"grad_ptr": name}, ints,
                    {"CHUNK": adamw._CHUNK, "BLOCK": adamw._BLOCK},
                    representative=name == "bf16", **shared, **moved,
                )
            )  # fmt: skip
        # states as torch makes them, and fp32 ones of a weight in half precision
        pairs = [(name, name) for name in _SIZES] + [("bf16", "fp32"), ("fp16", "fp32")]
        for name, state in pairs:
            for alone in (False, True):
                halves = {"weight_ptr": name, "grad_ptr": name}
                halves |= {"mean_ptr": state, "square_ptr": state}
                found.append(
                    _entry(
                        adamw._adamw_kernel,
                        f"adamw {name} {state}" + " alone" * alone + tail, halves, ints,
                        {"ALONE": alone, "CHUNK": adamw._CHUNK, "BLOCK": adamw._BLOCK},
                        representative=name == "bf16" and aligned, **shared,
                        **adamw_traffic(numel, _SIZES[name], _SIZES[state])[1],
                    )
                )  # fmt: skip
    return found


def adamw_traffic(numel: int, size: int, state_size: int) -> list[dict[str, int]]:
    """Bytes that each launch asks for, and that any way to do its work must."""
    programs = triton.cdiv(numel, adamw._CHUNK)
    update = numel * (3 * size + 4 * state_size)
    return [
        {"moved": numel * size + 16, "minimum": numel * size},
        {"moved": update + 16 * programs + 4, "minimum": update},
    ]
