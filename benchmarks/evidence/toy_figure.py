"""The toy in one figure, a row for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.toy import METHODS, SCHEDULES

GROUPS = {"chosen": "tab:green", "rejected": "tab:red", "ood": "tab:grey"}
COLOURS = dict(zip(SCHEDULES, ("black", "tab:orange", "tab:blue", "tab:purple"), strict=True))
BETA = 0.1  # of the columns that show one
STYLES = {"-": "line", ":": "dotted", "-.": "dash-dotted", "--": "dashed"}


def curves(
    rows: Sequence[Mapping[str, Any]], key: str, **only: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) and (seeds, steps) of a column, of the rows that have the values of `only`."""
    kept = [row for row in rows if all(row[k] == v for k, v in only.items())]
    steps = sorted({row["step"] for row in kept})
    seeds = sorted({row["seed"] for row in kept})
    table = {(row["seed"], row["step"]): row[key] for row in kept}
    return np.array(steps), np.array([[table[seed, step] for step in steps] for seed in seeds])


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Masses over training for each schedule, the curvature, and the mass of the chosen over KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = len(SCHEDULES) + 2
    figure, axes = plt.subplots(
        len(METHODS), width, figsize=(3.1 * width, 2.7 * len(METHODS)), layout="constrained"
    )
    for row, loss in zip(axes, METHODS, strict=True):
        for axis, schedule in zip(row, SCHEDULES, strict=False):
            _plot_masses(axis, rows, loss, schedule)
        _plot_curvature(row[-2], rows, loss)
        _plot_distance(row[-1], rows, loss)
        row[0].set_ylabel(f"{loss.upper()}\nmass")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[0, -1].legend(frameon=False, fontsize=7)
    seeds = len({row["seed"] for row in rows})
    names = [f"{name} {b:g}" for name, b in zip(STYLES.values(), _betas(rows), strict=False)]
    figure.suptitle(
        f"Preference optimization on a tree: {seeds} seeds (thin) and their mean, β = {BETA}; last "
        f"column: means, β {', '.join(names)}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_masses(axis: Any, rows: Sequence[Mapping[str, Any]], loss: str, schedule: str) -> None:
    for group, colour in GROUPS.items():
        steps, masses = curves(rows, group, loss=loss, schedule=schedule, beta=BETA)
        axis.plot(steps, masses.T, color=colour, linewidth=0.5, alpha=0.35)
        axis.plot(steps, masses.mean(0), color=colour, linewidth=1.8, label=group)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(ylim=(0, 1), xlabel="step", title=schedule)


def _plot_curvature(axis: Any, rows: Sequence[Mapping[str, Any]], loss: str) -> None:
    for schedule, colour in COLOURS.items():
        steps, values = curves(rows, "curvature", loss=loss, schedule=schedule, beta=BETA)
        axis.plot(steps, values.mean(0) / (BETA**2 / 4), color=colour, label=schedule)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="step", title="β²σ(1-σ) over its start, β²/4", ylim=(0, 1.05))


def _plot_distance(axis: Any, rows: Sequence[Mapping[str, Any]], loss: str) -> None:
    """Where training stood on the way, for every β: the mean over seeds of both coordinates."""
    betas = _betas(rows)
    for schedule, colour in COLOURS.items():
        for beta, style in zip(betas, STYLES, strict=False):
            only = {"loss": loss, "schedule": schedule, "beta": beta}
            distance = curves(rows, "kl_initial", **only)[1].mean(0)
            chosen = curves(rows, "chosen", **only)[1].mean(0)
            label = schedule if style == "-" else None
            axis.plot(distance, chosen, style, color=colour, linewidth=1, label=label)
            axis.plot(distance[-1], chosen[-1], "o", color=colour, markersize=4)
    axis.set(xlabel="KL to the start (nats)", title="mass of the chosen (● last)")
    axis.set_ylim(0, 1)


def _betas(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Those of the rows in the order of `STYLES`."""
    return sorted({row["beta"] for row in rows}, key=lambda beta: (beta != BETA, beta))
