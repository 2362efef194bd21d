"""Rows, tables and plots of what was timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Summary,
    device_name,
    format_table,
    plot_lines,
    plot_panels,
    read_csv,
    summarize,
    write_csv,
)
from benchmarks.ops.arms import ARMS, Case
from benchmarks.ops.turns import Run


def make_records(case: Case, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The CSV's rows of one case. `ratio_to_bare`: median over that of the bare products."""
    bare = next((summarize(r.seconds).median for r in runs if r.arm == "bare"), float("nan"))
    return [_record(case, run, bare) for run in runs]


def _record(case: Case, run: Run, bare: float) -> dict[str, Any]:
    nothing = [float("nan")]
    seconds = summarize(run.seconds or nothing)
    loss, d_hidden, d_weight = run.errors or nothing * 3
    return {
        "arm": run.arm,
        "dtype": case.dtype,
        "N": case.tokens,
        "H": case.hidden,
        "V": case.vocab,
        "calls": len(run.seconds),
        "median_s": seconds.median,
        "p20_s": seconds.p20,
        "p80_s": seconds.p80,
        "ratio_to_bare": seconds.median / bare,
        "us_per_token": seconds.median / case.tokens * 1e6,
        "first_call_s": run.first,
        "peak_mb": max(run.peak_mb or nothing),
        "loss_error": loss,
        "d_hidden_error": d_hidden,
        "d_weight_error": d_weight,
        "verdict": run.verdict(case.dtype),
        "failure": run.failed or "",
        "device": device_name(case.device),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    header = ("arm", "median s", "p20", "p80", "× bare", "first s", "peak MiB", "loss", "d hidden",
              "d weight", "calls", "")  # fmt: skip
    rows = [
        (
            ARMS[r["arm"]][0], f"{r['median_s']:.4g}", f"{r['p20_s']:.4g}", f"{r['p80_s']:.4g}",
            f"{r['ratio_to_bare']:.3f}", f"{r['first_call_s']:.3g}", f"{r['peak_mb']:.0f}",
            *(f"{r[k]:.1e}" for k in ("loss_error", "d_hidden_error", "d_weight_error")),
            str(r["calls"]), r["failure"] if r["verdict"] == "failed" else r["verdict"],
        )
        for r in records
    ]  # fmt: skip
    return format_table(header, rows)


def plot_comparison(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Bars of every arm: seconds above, MiB below; a column of panels a dtype."""
    panels = []
    for what, key in (("seconds", "median_s"), ("peak MiB beside the inputs", "peak_mb")):
        for dtype in dict.fromkeys(r["dtype"] for r in records):
            shown = [r for r in records if r["dtype"] == dtype and int(r["calls"])]
            marks = {"wrong": " (wrong)"}
            labels = [ARMS[r["arm"]][0] + marks.get(r["verdict"], "") for r in shown]
            spread = ("median_s", "p20_s", "p80_s") if key == "median_s" else (key,) * 3
            values = [Summary(*(float(r[k]) for k in spread)) for r in shown]
            panels.append((f"{dtype}: {what}", labels, values))
    first = records[0]
    plot_panels(
        path,
        panels,
        columns=len({r["dtype"] for r in records}),
        title=f"Policy forward and backward, reference forward: N={first['N']}, H={first['H']}, "
        f"V={first['V']}, {first['device']}",
    )


def plot_scaling(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """For every axis measured: µs a token above, MiB below."""
    panels = []
    axes = list(dict.fromkeys(r["axis"] for r in records))
    for key, unit in (("us_per_token", "µs a token"), ("peak_mb", "peak MiB beside the inputs")):
        for axis in axes:
            own = [r for r in records if r["axis"] == axis and int(r["calls"])]
            lines = {
                ARMS[arm][0]: [(float(r[axis]), float(r[key])) for r in own if r["arm"] == arm]
                for arm in dict.fromkeys(r["arm"] for r in own)
            }
            fixed = ", ".join(f"{k}={own[0][k]}" for k in "NVH" if k != axis)
            panels.append((f"{axis} ({fixed})", unit, lines))
    title = f"{records[0]['dtype']}, {records[0]['device']}"
    plot_lines(path, panels, columns=len(axes), title=title)


def merge(path: Path, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Replaces the rows of a CSV that have the new ones' `key`: each may be a run of its own."""
    replaced = {row[key] for row in rows}
    rows = rows + [row for row in read_csv(path) if row[key] not in replaced]
    write_csv(path, rows)
    return rows
