"""The sentiment runs in numbers: where the arms end, and how they compare at one distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from benchmarks.common import format_table
from benchmarks.evidence.arms import Arm

Results = Mapping[Arm, Mapping[str, Any]]


def last_step(results: Results) -> str:
    """Means over seeds, and the gold reward of every seed, at the last step and at equal KL.

    "At equal KL": where an arm's curve, drawn straight between its points, passes the distance
    that every arm of its loss and seed has reached.
    """
    header = ["last step", "KL", "gold reward", "seeds", "at equal KL", "seeds"]
    header += ["chosen", "rejected", "distinct-2"]
    settings: dict[tuple[str, str, float], list[Arm]] = {}
    for arm in results:
        settings.setdefault((arm.loss, arm.schedule, arm.beta), []).append(arm)
    table = []
    for (loss, schedule, beta), arms in settings.items():
        points = [results[arm]["points"] for arm in arms]
        equal = [_gold_at(results[arm]["points"], _shared_distance(results, arm)) for arm in arms]
        gold = [arm[-1]["gold_reward"] for arm in points]
        half = numpy.mean([arm[-1]["gold_reward_ci"] for arm in points])
        table.append(
            [
                f"{loss} {schedule} β={beta:g}",
                f"{numpy.mean([arm[-1]['kl_initial'] for arm in points]):.1f}",
                f"{numpy.mean(gold):.2f} ± {half:.2f}",
                _each(gold),
                f"{numpy.mean(equal):.2f}",
                _each(equal),
                *(f"{_change(points, key):+.1f}" for key in ("logps_chosen", "logps_rejected")),
                f"{numpy.mean([arm[-1]['distinct_2'] for arm in points]):.2f}",
            ]
        )
    return format_table(header, table)


def _shared_distance(results: Results, arm: Arm) -> float:
    return min(
        result["points"][-1]["kl_initial"]
        for other, result in results.items()
        if (other.loss, other.seed) == (arm.loss, arm.seed)
    )


def _gold_at(points: list[dict[str, Any]], distance: float) -> float:
    walked = [point["kl_initial"] for point in points]
    return float(numpy.interp(distance, walked, [point["gold_reward"] for point in points]))


def _change(points: list[list[dict[str, Any]]], key: str) -> float:
    return float(numpy.mean([arm[-1][key] - arm[0][key] for arm in points]))


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
