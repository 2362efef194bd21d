"""Gold reward against the distance from the start: one line an arm, a band over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.overoptimize_arms import Arm
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

    Lines are means over seeds, bands go from the worst seed to the best, a ring marks where a mean
    is highest. A cross ends an arm that diverged in a seed.
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
    if len(seeds) > 1:
        axes.fill_between(root, low, high, color=colour, alpha=0.12, linewidth=0)
    best = turning_point([
        {"step": i, "kl": x * x, key: y} for i, (x, y) in enumerate(zip(root, mean, strict=True))
    ], key)  # fmt: skip
    axes.plot(
        best["kl"] ** 0.5, best["height"], marker="o", markersize=8, fillstyle="none",
        color=colour,
    )  # fmt: skip
    if diverged:
        axes.plot(root[-1], mean[-1], marker="x", markersize=9, color=colour)


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
