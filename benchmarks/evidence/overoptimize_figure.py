"""Gold reward against the distance from the start: one line an arm, a band over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.overoptimize_arms import MOVING, Arm
from benchmarks.evidence.overoptimize_measure import turning_point

Point = Mapping[str, Any]
Results = Mapping[Arm, Mapping[str, Any]]

_COLOURS = {"frozen": "Greys", "soft": "Oranges", "hard": "Blues", "hybrid": "Purples"}
_LABELS = {
    "gold": "gold reward\n(deviations of the SFT's answers)",
    "check": "second gold\n(deviations of the SFT's answers)",
}


def by_name(results: Results) -> dict[str, dict[Arm, list[dict[str, Any]]]]:
    """The points of every seed under the arm's name; of those of one name, as many as all have."""
    found: dict[str, dict[Arm, list[dict[str, Any]]]] = {}
    for arm, result in results.items():
        found.setdefault(arm.name, {})[arm] = list(result["points"])
    return found


def mean_curve(seeds: Sequence[Sequence[Point]], key: str) -> tuple[list[float], ...]:
    """√KL, and the mean, smallest and largest of `key`, over seeds at equal steps."""
    root, mean, low, high = [], [], [], []
    for points in zip(*seeds, strict=False):  # a seed that ended early ends the mean
        values = [point[key] for point in points]
        root.append(sum(max(p["kl"], 0.0) ** 0.5 for p in points) / len(points))
        mean.append(sum(values) / len(values))
        low.append(min(values))
        high.append(max(values))
    return root, mean, low, high


def plot(path: Path, results: Results, title: str) -> None:
    """A column for each loss and kind of pairs, a row for each gold.

    Lines are means over seeds, bands go from the worst seed to the best (thin lines are the seeds
    where a mean turns back towards the start), a ring marks where a mean is highest. A cross ends
    an arm that diverged in a seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys((arm.loss, arm.pairs) for arm in results))
    first = next(iter(results.values()))["points"][0]
    keys = ["gold", *(["check"] if first["check"] is not None else [])]
    figure, axes = plt.subplots(
        len(keys), len(columns), figsize=(2 + 5.5 * len(columns), 1 + 4.2 * len(keys)),
        layout="constrained", squeeze=False, sharex="col",
    )  # fmt: skip
    for column, (loss, pairs) in enumerate(columns):
        names = {
            name: arms for name, arms in by_name(results).items()
            if (loss, pairs) == (next(iter(arms)).loss, next(iter(arms)).pairs)
        }  # fmt: skip
        looks = _looks([next(iter(arms)) for arms in names.values()])
        for row, key in enumerate(keys):
            for name, arms in names.items():
                diverged = any(results[arm]["diverged"] for arm in arms)
                _line(axes[row, column], list(arms.values()), key, name, looks[name], diverged)
            axes[row, column].spines[["top", "right"]].set_visible(False)
            axes[row, 0].set_ylabel(_LABELS[key])
        axes[0, column].set_title(f"{loss.upper()}, {_pairs(pairs)}", fontsize=10)
        axes[0, column].legend(frameon=False, fontsize=7)
        axes[-1, column].set_xlabel("√KL to the start (nats per answer)")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pairs(kind: str) -> str:
    return "people's pairs" if kind == "people" else "own samples ranked by the gold"


def _looks(arms: list[Arm]) -> dict[str, Any]:
    """A hue for each schedule; the larger β or τ the darker."""
    import matplotlib

    found = {}
    for schedule, colours in _COLOURS.items():
        same = sorted(
            (arm for arm in arms if arm.schedule == schedule), key=lambda a: (a.every, a.beta)
        )
        for index, arm in enumerate(same):
            shade = 0.9 if len(same) == 1 else 0.4 + 0.55 * index / (len(same) - 1)
            found[arm.name] = matplotlib.colormaps[colours](shade)
    return found


def _line(
    axes: Any, seeds: list[list[dict[str, Any]]], key: str, name: str, colour: Any, diverged: bool
) -> None:
    root, mean, low, high = mean_curve(seeds, key)
    label = name.split(" ", 1)[1] + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
    axes.plot(root, mean, color=colour, linewidth=1.6, marker=".", markersize=4, label=label)
    if len(seeds) > 1 and root == sorted(root):
        axes.fill_between(root, low, high, color=colour, alpha=0.12, linewidth=0)
    elif len(seeds) > 1:  # a curve that turns back has no band: its seeds instead
        for points in seeds:
            away = [max(point["kl"], 0.0) ** 0.5 for point in points]
            gold = [point[key] for point in points]
            axes.plot(away, gold, color=colour, linewidth=0.6, alpha=0.5)
    best = turning_point([
        {"step": i, "kl": x * x, key: y} for i, (x, y) in enumerate(zip(root, mean, strict=True))
    ], key)  # fmt: skip
    axes.plot(
        best["kl"] ** 0.5, best["height"], marker="o", markersize=8, fillstyle="none",
        color=colour,
    )  # fmt: skip
    if diverged:
        axes.plot(root[-1], mean[-1], marker="x", markersize=9, color=colour)


def plot_interval(path: Path, results: Results, title: str) -> None:
    """What a moving reference gains against its lag: a dot for each α and τ of DPO, joined in the
    order of τ (α = 1) and of α. Nothing where there are less than four of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {name: arms for name, arms in by_name(results).items() if moving_dpo(next(iter(arms)))}
    if len(groups) < 4:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, which in zip(axes, ("highest", "last"), strict=True):
        for hard in (True, False):
            dots = sorted(
                (arm.every, arm.alpha, *_lag_and_gold(list(arms.values()), which))
                for arms in groups.values()
                if ((arm := next(iter(arms))).alpha == 1.0) == hard
            )
            axis.plot(
                [dot[2] for dot in dots], [dot[3] for dot in dots], marker="o", linewidth=0.8,
                color=matplotlib.colormaps["Blues" if hard else "Purples"](0.8),
                label="hard: α = 1" if hard else "α < 1",
            )  # fmt: skip
            for every, alpha, lag, gold in dots:
                text = f"τ={every}" if hard else f"α={alpha:g}, τ={every}"
                axis.annotate(text, (lag, gold), fontsize=7, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
        axis.set_xlabel("lag: mean Δ to the moving reference (nats)")
        axis.set_ylabel(f"gold reward, {which} point (mean of seeds)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def moving_dpo(arm: Arm) -> bool:
    """Of the arms of the interval: DPO on the proxy's pairs, one β, a reference that moves."""
    return arm.alpha > 0 and (arm.loss, arm.beta, arm.pairs) == ("dpo", MOVING["dpo"], "proxy")


def lags(points: Sequence[Point]) -> list[float]:
    """Of what was logged: neither the start nor a point that a kill came before."""
    return [p["lag"] for p in points if p["step"] > 0 and p["lag"] is not None]


def _lag_and_gold(seeds: list[list[dict[str, Any]]], which: str) -> tuple[float, float]:
    lag = [value for points in seeds for value in lags(points)]
    gold = [
        turning_point(points)["height"] if which == "highest" else points[-1]["gold"]
        for points in seeds
    ]
    return sum(lag) / max(1, len(lag)), sum(gold) / len(gold)


def samples_page(results: Results, count: int = 8) -> str:
    """Markdown: answers of each arm of one seed, where it first is as far as the nearest arm gets.

    Answers alone: the prompts of harmless-base offend. A person reads the page, and takes from it
    what may be shown, before any of it is published.
    """
    seed = min(arm.seed for arm in results)
    arms = [arm for arm in results if arm.seed == seed]
    distance = min(max(p["kl"] for p in results[arm]["points"]) for arm in arms)
    lines = [f"# Answers at a KL of {distance:.1f} nats (to be read before they are shown)", ""]
    start = results[arms[0]]["points"][0]
    lines += ["**start**", "", *(f"- {_flat(text)}" for text in start["samples"][:count]), ""]
    for arm in arms:
        point = next(p for p in results[arm]["points"] if p["kl"] >= distance)
        lines += [f"**{arm.name}**, step {point['step']}, KL {point['kl']:.1f}", ""]
        lines += [*(f"- {_flat(text)}" for text in point["samples"][:count]), ""]
    return "\n".join(lines)


def _flat(text: str) -> str:
    return " ".join(text.split())[:160]
