"""The runs in numbers: curves, paired comparisons at equal distance, the interval, the stages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from benchmarks.common import format_table
from benchmarks.evidence.measure import mean_interval
from benchmarks.evidence.overoptimize_arms import STAGE_BETA, STAGES, Arm, Settings
from benchmarks.evidence.overoptimize_figure import by_name, lags, moving_dpo
from benchmarks.evidence.overoptimize_measure import neighbours, turning_point

Results = Mapping[Arm, Mapping[str, Any]]
Points = Sequence[Mapping[str, Any]]
# Of the farthest distance that all have reached, where the arm that went least far is at its end.
SHARES = (1.0, 0.8, 0.6)


def tables(results: Results, settings: Settings, facts: Mapping[str, Any]) -> str:
    """All tables for which there are arms; of finished ones, where there are any."""
    whole = {arm: result for arm, result in results.items() if result["finished"]} or results
    parts = [
        summary(results, facts), curves(whole), masses(whole),
        *(at_equal_distance(whole, share) for share in SHARES),
        interval(whole), stages(whole, settings),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def summary(results: Results, facts: Mapping[str, Any]) -> str:
    rows, golds = facts["rows"], facts["accuracy"]
    ended = [arm for arm, result in results.items() if result["finished"]]
    diverged = [str(arm) for arm, result in results.items() if result["diverged"]]
    hours = {
        key: sum(r["points"][-1][key] for r in results.values()) / 3600
        for key in ("seconds", "cpu_seconds")
    }
    commits = sorted({r["totals"]["commit"] for r in results.values()})
    lines = [
        "pairs: " + ", ".join(f"{number} {name}" for name, number in rows.items()),
        f"held-out accuracy over {rows['gold_test']} of people's pairs: "
        + ", ".join(f"{name} {value:.3f}" for name, value in golds.items())
        + (f"; the golds agree on {facts['golds_agree']:.3f} of the SFT's pairs"
           if facts["golds_agree"] is not None else ""),
        f"{len(ended)} of {len(results)} arms finished; diverged: {', '.join(diverged) or 'none'}",
        f"compute: {hours['seconds']:.2f} hours of arms, {hours['cpu_seconds']:.2f} of CPU; "
        f"commit {', '.join(commits)}",
    ]  # fmt: skip
    starts = {result.get("material", "") for result in results.values()}
    if len(starts) > 1:
        lines.append(f"WARNING: arms of {len(starts)} different starts (the SFT was trained anew)")
    return "\n".join(lines)


def curves(results: Results) -> str:
    """Where every arm turns over, at what height, and what is left at the end; means of seeds."""
    header = ["arm", "seeds", "turns at step", "√KL", "height", "each", "end √KL", "end gold",
              "each", "check", "win", "length", "repeats", "lag"]  # fmt: skip
    table = []
    for name, arms in by_name(results).items():
        curves_ = list(arms.values())
        turns = [turning_point(points) for points in curves_]
        last = [points[-1] for points in curves_]
        checks = [point["check"] for point in last if point["check"] is not None]
        table.append([
            name, str(len(arms)), _mean([t["step"] for t in turns], 0),
            _mean([t["kl"] ** 0.5 for t in turns]), _mean([t["height"] for t in turns]),
            _each([t["height"] for t in turns]), _mean([max(p["kl"], 0) ** 0.5 for p in last]),
            _mean([p["gold"] for p in last]), _each([p["gold"] for p in last]),
            _mean(checks),
            *(_mean([p[key] for p in last]) for key in ("win_rate", "length", "repetition")),
            _mean(lags([p for points in curves_ for p in points])),
        ])  # fmt: skip
    return format_table(header, table)


def masses(results: Results) -> str:
    """Log-mass of the chosen, the rejected and the SFT's other answers: change at the last step."""
    kinds = ("train_chosen", "train_rejected", "train_other", "held_out_chosen",
             "held_out_rejected", "held_out_other")  # fmt: skip
    header = ["change in nats", *(kind.replace("_", " ", kind.count("_")) for kind in kinds),
              "train accuracy", "held-out accuracy"]  # fmt: skip
    table = []
    for name, arms in by_name(results).items():
        last, start = ([points[i] for points in arms.values()] for i in (-1, 0))
        table.append([
            name,
            *(_mean([b[k] - a[k] for a, b in zip(start, last, strict=True)], 1) for k in kinds),
            *(_mean([p[f"{part}_accuracy"] for p in last]) for part in ("train", "held_out")),
        ])  # fmt: skip
    return format_table(header, table)


def at_equal_distance(results: Results, share: float = 1.0) -> str:
    """Each moving arm less each frozen one of its loss and seed, paired over prompts.

    Both are read where they first pass the distance that all arms of the loss and seed have
    reached, or a share of it, straight between their points. The interval of a seed is
    1.96·sd/√prompts of the differences.
    """
    header = ["less", "seed: √KL", "difference, 95%", "by the second gold", "above"]
    table = []
    groups = by_name(results)
    for (name, arms), (other, frozen) in itertools.product(groups.items(), groups.items()):
        one, two = next(iter(arms)), next(iter(frozen))
        same = (one.loss, one.pairs) == (two.loss, two.pairs)
        if not same or one.schedule == "frozen" or two.schedule != "frozen":
            continue
        pairs = [(a, b) for a, b in itertools.product(arms, frozen) if a.seed == b.seed]
        roots = [share * shared_distance(results, arm) for arm, _ in pairs]
        found = [
            [
                _difference(results[a]["points"], results[b]["points"], root, key)
                for (a, b), root in zip(pairs, roots, strict=True)
            ]
            for key in ("golds", "checks")
        ]
        texts = [
            ", ".join("-" if d is None else f"{d[0]:+.2f} ± {d[1]:.2f}" for d in differences)
            for differences in found
        ]
        above = f"{sum(d is not None and d[0] > 0 for d in found[0])} of {len(pairs)}"
        distances = ", ".join(
            f"{arm.seed}: {root:.1f}" for (arm, _), root in zip(pairs, roots, strict=True)
        )
        table.append([f"{name} - {other}", distances, *texts, above])
    return format_table(header, table) if table else ""


def _difference(
    points: Points, others: Points, root: float, key: str
) -> tuple[float, float] | None:
    """Mean and half of the interval over prompts; None where a gold is missing."""
    if any(point[key] is None for curve in (points, others) for point in curve):
        return None
    both = zip(golds_at(points, root, key), golds_at(others, root, key), strict=True)
    return mean_interval([[a - b] for a, b in both])


def shared_distance(results: Results, arm: Arm) -> float:
    """√KL that all arms of its loss, kind of pairs and seed have reached."""
    return min(
        max(point["kl"] for point in result["points"])
        for other, result in results.items()
        if (other.loss, other.pairs, other.seed) == (arm.loss, arm.pairs, arm.seed)
    ) ** 0.5  # fmt: skip


def golds_at(points: Points, root: float, key: str = "golds") -> list[float]:
    """Each prompt's reward (checks: by the second gold) where the arm first passes the distance."""
    first, second, share = neighbours(list(map(dict, points)), root)
    return [
        (1 - share) * a + share * b
        for a, b in zip(points[first][key], points[second][key], strict=True)
    ]


def interval(results: Results) -> str:
    """α, τ: the lag (mean Δ to the moving reference) beside what was gained; DPO, proxy pairs."""
    found = {
        name: arms for name, arms in by_name(results).items()
        if moving_dpo(next(iter(arms)))
    }  # fmt: skip
    if len(found) < 2:
        return ""
    header = ["α", "τ", "lag, nats", "at the end", "end √KL", "height", "end gold"]
    table = []
    order = sorted(found.items(), key=lambda item: (next(iter(item[1])).alpha,
                                                    next(iter(item[1])).every))  # fmt: skip
    for _, arms in order:
        arm, curves_ = next(iter(arms)), list(arms.values())
        table.append([
            f"{arm.alpha:g}", str(arm.every),
            _mean(lags([p for points in curves_ for p in points])),
            _mean(lags([points[-1] for points in curves_])),
            _mean([max(points[-1]["kl"], 0) ** 0.5 for points in curves_]),
            _mean([turning_point(points)["height"] for points in curves_]),
            _mean([points[-1]["gold"] for points in curves_]),
        ])  # fmt: skip
    return format_table(header, table)


def stages(results: Results, settings: Settings) -> str:
    """i stages at β beside a frozen reference at β/i: the same limit, if each stage converges."""
    header = ["stages", "arm", "end √KL", "each", "end gold", "each"]
    table = []
    for count in STAGES:
        pair = [
            Arm("dpo", STAGE_BETA, 1.0, settings.steps // count, 0),
            Arm("dpo", STAGE_BETA / count, 0.0, 0, 0),
        ]
        groups = [by_name(results).get(arm.name) for arm in pair]
        if not all(groups):
            continue
        for arm, arms in zip(pair, groups, strict=True):
            last = [points[-1] for points in (arms or {}).values()]
            roots = [max(p["kl"], 0) ** 0.5 for p in last]
            golds = [p["gold"] for p in last]
            table.append([str(count), arm.name, _mean(roots), _each(roots), _mean(golds),
                          _each(golds)])  # fmt: skip
    return format_table(header, table) if table else ""


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{numpy.mean(values):.{digits}f}" if len(values) else "-"


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
