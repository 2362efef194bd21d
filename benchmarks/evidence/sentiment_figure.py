"""Gold reward against the distance from the start, and what the samples look like there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import Arm

COLOURS = {"frozen": "black", "soft": "tab:orange", "hard": "tab:blue", "hybrid": "tab:purple"}
STYLES = ("-", "--", ":")  # of the β of a loss, the largest first

Point = Mapping[str, Any]
Results = Mapping[Arm, Mapping[str, Any]]


def plot(path: Path, results: Results, title: str) -> None:
    """A column for each loss: gold reward, and the change of held-out log-probs, over the KL.

    Thick lines are means over seeds, point by point; thin ones are the seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = list(dict.fromkeys(arm.loss for arm in results))
    figure, axes = plt.subplots(
        2, len(losses), figsize=(1.5 + 4.5 * len(losses), 7.5), layout="constrained", squeeze=False
    )
    for column, loss in enumerate(losses):
        betas = sorted({arm.beta for arm in results if arm.loss == loss}, reverse=True)
        for (schedule, beta), seeds in _by_setting(results, loss).items():
            look = {"color": COLOURS[schedule], "linestyle": STYLES[betas.index(beta)]}
            label = f"{schedule}, β = {beta:g}"
            _plot_setting(axes[:, column], seeds, label, look)
        axes[0, column].set_title(loss.upper())
        axes[0, column].legend(frameon=False, fontsize=8, loc="lower right")
        axes[1, column].set_xlabel("KL to the initial model (nats per completion)")
    axes[0, 0].set_ylabel("gold reward (VADER), 95% interval")
    axes[1, 0].set_ylabel("held-out log-probs, change in nats\n(● chosen, × rejected)")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _by_setting(results: Results, loss: str) -> dict[tuple[str, float], list[list[Point]]]:
    """The points of every seed, under (schedule, β)."""
    settings: dict[tuple[str, float], list[list[Point]]] = {}
    for arm, result in results.items():
        if arm.loss == loss:
            settings.setdefault((arm.schedule, arm.beta), []).append(result["points"])
    return settings


def _plot_setting(axes: Any, seeds: list[list[Point]], label: str, look: dict[str, Any]) -> None:
    def mean(key: str) -> list[float]:
        at_steps = zip(*seeds, strict=True)
        return [sum(point[key] for point in points) / len(seeds) for points in at_steps]

    def change(points: list[Point], key: str) -> list[float]:
        return [point[key] - points[0][key] for point in points]

    distance = mean("kl_initial")
    axes[0].errorbar(  # seeds share their prompts: an interval does not shrink with their number
        distance, mean("gold_reward"), mean("gold_reward_ci"), label=label,
        elinewidth=0.5, capsize=2, marker="o", markersize=3, linewidth=1.6, **look,
    )  # fmt: skip
    for key, marker in (("logps_chosen", "o"), ("logps_rejected", "x")):
        changes = [change(points, key) for points in seeds]
        averages = [sum(values) / len(seeds) for values in zip(*changes, strict=True)]
        axes[1].plot(distance, averages, marker=marker, markersize=4, linewidth=1.2, **look)
    if len(seeds) > 1:
        for points in seeds:
            axes[0].plot(
                [p["kl_initial"] for p in points], [p["gold_reward"] for p in points],
                linewidth=0.5, alpha=0.6, **look,
            )  # fmt: skip


def samples_page(results: Results, prompts: int = 4) -> str:
    """Markdown: the same prompts before and after, for the arms of seed 0."""
    lines = ["# Fresh samples to held-out prompts", ""]
    arms = [arm for arm in results if arm.seed == 0]
    start = results[arms[0]]["points"][0]["samples"]
    for index, (prompt, before) in enumerate(start[:prompts]):
        lines += [f"**{_flat(prompt)}**", "", f"- before: {_flat(before)}"]
        for arm in arms:
            last = results[arm]["points"][-1]
            after = last["samples"][index][1]
            name = f"{arm.loss.upper()} {arm.schedule}, β = {arm.beta:g}, step {last['step']}"
            lines.append(f"- {name}: {_flat(after)}")
        lines.append("")
    return "\n".join(lines)


def _flat(text: str) -> str:
    return " ".join(text.split())
