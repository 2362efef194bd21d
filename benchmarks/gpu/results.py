"""The matrix's CSV, the gate between arms, the table and the bars."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Summary, plot_bars, read_csv, write_csv
from benchmarks.gpu import cases
from benchmarks.gpu.cases import ARMS, SCHEDULE, WINDOW, Case, parse
from benchmarks.step import GRADIENT_TOLERANCE

# Relative. Random weights give completions of 512 tokens -6,000, with a standard deviation of 30,
# of which bf16 rounds less than 1: log-probs tell a wrong path, means of 8 pairs differ by 10.
LOGPS_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-4}
# The loss is of differences of such sums, and stays near log 2: that less than 1, times beta.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

COLUMNS = [
    "case", "arm", "model", "reference", "status", "agrees_with_trl", "reason",
    "step_s", "step_s_min", "step_s_max", "windows", "alone_s", "sweep_s", "move_ms",
    f"tau{SCHEDULE}_s", f"tau{WINDOW}_s", "useful_tokens_per_s", "packed_tokens_per_s",
    "mfu", "limit_s", "limit_with_recomputation_s", "rate_tflops", "gpu_busy_share", "gpu_busy_s",
    "graphs_captured", "graphs_replayed", "device_events", "kernels", "peak_gib", "reserved_gib",
    "loss", "grad_norm", "logps_chosen", "logps_rejected",
    "pairs", "packed_tokens", "useful_tokens", "dtype", "case_s",
    "device", "commit", "date", "cpu", "cores", "torch", "triton", "transformers", "trl", "peft",
    "liger_kernel", "bitsandbytes", "tralign_fast",
]  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "liger-kernel", "bitsandbytes")


def make_row(case: Case, found: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The columns of a case, from what its process told: measured, or {"error": one line}."""
    row: dict[str, Any] = {
        "case": case.name, "arm": ARMS[case.arm], "model": case.model.label,
        "reference": case.reference,
    }  # fmt: skip
    if "error" in found:
        return {**row, "status": "failed", "reason": found["error"]}
    step, move = found["step_s"], found["move_ms"] / 1e3
    limit = found["flops"] / rate
    row |= {key: value for key, value in found.items() if key in COLUMNS}
    return row | {
        "status": "measured",
        f"tau{SCHEDULE}_s": step + move / SCHEDULE,
        f"tau{WINDOW}_s": step + move / WINDOW,
        "useful_tokens_per_s": found["useful_tokens"] / step,
        "packed_tokens_per_s": found["packed_tokens"] / step,
        "mfu": limit / step,
        "limit_s": limit,
        "limit_with_recomputation_s": (found["flops"] + found["recomputed_flops"]) / rate,
        "rate_tflops": rate / 1e12,
        "gpu_busy_share": found["gpu_busy_s"] / step if "gpu_busy_s" in found else None,
    }


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows at once or none, with what the gate says of each."""
    same: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in rows:
        case = parse(row["case"])
        if case.arm == "trl" and row["status"] == "measured":
            same.setdefault(_compared(row, case), row)
    done = []
    for row in rows:
        theirs = same.get(_compared(row, parse(row["case"])))
        done.append({**row, "agrees_with_trl": _agreement(row, theirs)})
    replace_csv(path, done, COLUMNS)


def replace_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes rows with these columns, as a whole or not at all; empty where a row has no value."""
    partial = path.with_suffix(".partial")
    filled = ({column: row.get(column) for column in columns} for row in rows)
    write_csv(partial, [{k: "" if v is None else v for k, v in row.items()} for row in filled])
    os.replace(partial, path)


def _compared(row: Mapping[str, Any], case: Case) -> tuple[str, ...]:
    """Checkpointing changes no loss; Adafactor's step comes after the first losses."""
    return row["commit"], row["device"], case.model_name, case.shape_name


def _agreement(row: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> str:
    """ "yes", what differs, or nothing where there is no row of TRL's to compare with."""
    if theirs is None or row["status"] != "measured":
        return ""
    # TRL trains the adapters of a quantised base in bf16, whatever their dtype was
    quantised = parse(row["case"]).model.base_bits < 16
    dtype = "bf16" if quantised else _DTYPES[row["dtype"]]
    for column, tolerance in (
        ("loss", LOSS_TOLERANCE[dtype]),
        ("logps_chosen", LOGPS_TOLERANCE[dtype]),
        ("logps_rejected", LOGPS_TOLERANCE[dtype]),
        ("grad_norm", GRADIENT_TOLERANCE[dtype]),
    ):
        if row.get(column) in ("", None) or theirs.get(column) in ("", None):
            continue
        a, b = float(row[column]), float(theirs[column])
        if not abs(a - b) <= tolerance * abs(b):  # written so that NaN fails
            return f"no: {column} {a:.7g}, TRL {b:.7g}"
    return "yes"


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of cases that there still are."""
    return [row for row in read_csv(path) if cases.is_case(row["case"])]


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Works in the order of the rows, the arms of each beside each other."""
    works = list(dict.fromkeys(parse(row["case"]).work for row in rows))
    arms = list(ARMS)

    def place(row: Mapping[str, Any]) -> tuple[int, int]:
        case = parse(row["case"])
        return works.index(case.work), arms.index(case.arm)

    return sorted(rows, key=place)


def of_here(rows: Sequence[dict[str, Any]], here: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of this commit and card."""
    return [r for r in rows if r["commit"] == here["commit"] and r["device"] == here["device"]]


def disagreeing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{r['case']}: {r['agrees_with_trl']}" for r in rows if r["agrees_with_trl"][:2] == "no"
    ]


# --- what is shown --------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown. A ratio above 1: faster than TRL on the same work; no ratio where losses differ."""
    measured = {row["case"]: row for row in rows if row["status"] == "measured"}
    lines = [
        "| case | arm | s/step | times TRL | limit s | times limit | alone | sweep | move ms | "
        f"τ={SCHEDULE} | τ={WINDOW} | useful tok/s | MFU | GPU busy | events | peak GiB "
        "| reference |",
        "|---" * 2 + "|---:" * 14 + "|---|",
    ]
    for row in rows:
        case = parse(row["case"])
        work = f"{case.model.label}, {_shape(case)}"
        if row["status"] != "measured":
            lines.append(f"| {work} | {row['arm']} | {row['reason']} |" + " |" * 14)
            continue
        theirs = measured.get(f"{case.work}/trl")
        ratio = ""
        if row["agrees_with_trl"].startswith("no"):
            ratio = "other losses"
        elif theirs is not None:
            ratio = f"{float(theirs['step_s']) / float(row['step_s']):.2f}x"
        cells = [
            work, row["arm"], _number(row, "step_s", ".3f"), ratio,
            _number(row, "limit_s", ".3f"),
            f"{float(row['step_s']) / float(row['limit_s']):.2f}x",
            _number(row, "alone_s", ".3f"), _number(row, "sweep_s", ".3f"),
            _number(row, "move_ms", ".0f"), _number(row, f"tau{SCHEDULE}_s", ".3f"),
            _number(row, f"tau{WINDOW}_s", ".3f"), _number(row, "useful_tokens_per_s", ",.0f"),
            _number(row, "mfu", ".0%"), _number(row, "gpu_busy_share", ".0%"),
            _number(row, "device_events", ",.0f"), _number(row, "peak_gib", ".1f"),
            row["reference"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shape(case: Case) -> str:
    checkpointing = "checkpointing" if case.checkpointing else "no checkpointing"
    return f"{case.shape.pairs} pairs, {case.shape.tokens:,} tokens, {checkpointing}"


def _number(row: Mapping[str, str], column: str, form: str) -> str:
    return format(float(row[column]), form) if row.get(column) else ""


def plot(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Seconds a step over the limit, a group of bars for each work, a bar for each arm."""
    measured = [row for row in rows if row["status"] == "measured"]
    works = list(dict.fromkeys(parse(row["case"]).work for row in measured))
    missing = Summary(math.nan, math.nan, math.nan)
    series: dict[str, list[Summary]] = {}
    for row in measured:
        case, limit = parse(row["case"]), float(row["limit_s"])
        bars = series.setdefault(ARMS[case.arm], [missing] * len(works))
        values = (float(row[f"step_s{end}"]) / limit for end in ("", "_min", "_max"))
        bars[works.index(case.work)] = Summary(*values)
    first = measured[0]
    plot_bars(
        path, [work.replace("/", "\n") for work in works], series,
        title=f"One optimizer step with its reference over its limit, {first['device']}, "
        f"{first['date']}, commit {first['commit']}\ntorch {first['torch']}, transformers "
        f"{first['transformers']}, TRL {first['trl']}; windows' median, least and most",
        ylabel="times the products' own time (lower is better)",
    )  # fmt: skip
