"""The toy in numbers: where the arms end, and how they compare at one distance from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import format_table
from benchmarks.evidence.toy import METHODS, SCHEDULES
from benchmarks.evidence.toy_figure import curves

Rows = Sequence[Mapping[str, Any]]


def last_step(rows: Rows) -> str:
    """Means over seeds with the smallest and largest, and in how many seeds the chosen have more
    mass than with the frozen reference of the same β. `peak ood` is the largest on the way."""
    header = ["last step", "chosen", "ood", "peak ood", "KL", "seeds over frozen"]
    table = []
    for loss in METHODS:
        for beta in sorted({row["beta"] for row in rows}):
            frozen = None
            for schedule in SCHEDULES:
                only = {"loss": loss, "schedule": schedule, "beta": beta}
                found = {k: curves(rows, k, **only)[1] for k in ("chosen", "ood", "kl_initial")}
                chosen = found["chosen"][:, -1]
                frozen = chosen if frozen is None else frozen
                ends = [*(found[k] for k in ("chosen", "ood")), found["ood"].max(1, keepdims=True)]
                table.append(
                    [
                        f"{loss} {schedule} β={beta:g}",
                        *(_spread(values[:, -1]) for values in (*ends, found["kl_initial"])),
                        "" if schedule == "frozen" else f"{(chosen > frozen).sum()}/{len(chosen)}",
                    ]
                )
    return format_table(header, table)


def at_distance(rows: Rows, distances: Sequence[float] = (1.0, 1.5, 2.0)) -> str:
    """The chosen's mass where a run is first seen at a KL to the start, mean over seeds; "-" where
    a seed never comes so far."""
    betas = sorted({row["beta"] for row in rows})
    header = ["chosen at KL", *(f"{s} β={beta:g}" for s in SCHEDULES for beta in betas)]
    table = []
    for loss in METHODS:
        for distance in distances:
            line = [f"{loss} {distance:g} nats"]
            for schedule in SCHEDULES:
                for beta in betas:
                    only = {"loss": loss, "schedule": schedule, "beta": beta}
                    chosen = curves(rows, "chosen", **only)[1]
                    beyond = curves(rows, "kl_initial", **only)[1] >= distance
                    first = chosen[range(len(chosen)), beyond.argmax(1)]
                    line.append(f"{first.mean():.2f}" if beyond.any(1).all() else "-")
            table.append(line)
    return format_table(header, table)


def _spread(values: Any) -> str:
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"
