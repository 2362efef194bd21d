"""What benchmarks share: on what they ran, summaries of timings, CSV, tables and bars."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_ROOT = Path(__file__).resolve().parent.parent
# A commit names the code only if these are as committed (results may well have changed).
_CODE = ("tralign_fast", "kernels", "benchmarks/*.py")


class Summary(NamedTuple):
    """Of repeated measurements: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarize(values: Sequence[float]) -> Summary:
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return Summary(median, p20, p80)


def environment(packages: Sequence[str] = ("torch", "transformers", "trl")) -> dict[str, str]:
    """CSV columns that say what was measured where: commit, date, hardware, versions."""
    record = {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
    }
    for package in (*packages, "tralign-fast"):
        try:
            record[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            record[package.replace("-", "_")] = "not installed"
    return record


def commit() -> str:
    """What the environment's TRALIGN_COMMIT says, for a copy of a commit's files; else the short
    commit, with "+" if the code differs from it; where there is no git or no checkout "unknown"."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    if given := os.environ.get("TRALIGN_COMMIT"):
        return given
    try:
        changed = git("status", "--porcelain", "--", *_CODE)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of the card, or of the CPU with its cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows that all have the first one's columns; floats with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def plot_bars(
    path: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Summary]],
    *,
    title: str,
    ylabel: str,
) -> None:
    """A group of bars for each of `groups`, with a bar for each of `series`; whiskers: p20, p80."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(max(6.0, 2.4 + 0.75 * len(groups) * len(series)), 4.5))
    for i, (label, summaries) in enumerate(series.items()):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        median, p20, p80 = np.array(summaries).T
        whiskers = np.maximum(np.stack([median - p20, p80 - median]), 0)
        bars = axes.bar(x, median, 0.92 * width, yerr=whiskers, capsize=2, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_panels(
    path: Path,
    panels: Sequence[tuple[str, Sequence[str], Sequence[Summary]]],
    *,
    columns: int,
    title: str,
) -> None:
    """Panels of horizontal bars, each (title, labels, values); whiskers: p20, p80."""
    figure, grid = _grid(len(panels), columns, (6.0, 3.2))
    for axes, (name, labels, values) in zip(grid, panels, strict=True):
        median, p20, p80 = np.array(values).T
        whiskers = np.maximum(np.stack([median - p20, p80 - median]), 0)
        bars = axes.barh(labels, median, xerr=whiskers, capsize=2)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
    _save(figure, path, title)


def plot_lines(
    path: Path,
    panels: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]],
    *,
    columns: int,
    title: str,
) -> None:
    """Panels of lines over a logarithmic axis, each (x label, y label, points of every line)."""
    figure, grid = _grid(len(panels), columns, (4.2, 3.2))
    for axes, (xlabel, ylabel, lines) in zip(grid, panels, strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.set_ylabel(ylabel, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=7)
    _save(figure, path, title)


def _grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False
    )
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat)[:count]


def _save(figure: Any, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
