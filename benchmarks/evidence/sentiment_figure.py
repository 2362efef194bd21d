"""Gold reward against the distance from the start, and what the samples look like there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import Arm

COLOURS = {"frozen": "black", "soft": "tab:orange", "hard": "tab:blue", "hybrid": "tab:purple"}
STYLES = ("-", "--", ":")  # of the β of a loss, the largest first

Results = Mapping[Arm, Mapping[str, Any]]


def plot(path: Path, results: Results, title: str) -> None:
    """A column for each loss: gold reward, and the change of held-out log-probs, over the KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = list(dict.fromkeys(arm.loss for arm in results))
    figure, axes = plt.subplots(
        2, len(losses), figsize=(1.5 + 4.5 * len(losses), 7), layout="constrained", squeeze=False
    )
    for column, loss in enumerate(losses):
        of_loss = {arm: result for arm, result in results.items() if arm.loss == loss}
        betas = sorted({arm.beta for arm in of_loss}, reverse=True)
        for arm, result in of_loss.items():
            style = STYLES[betas.index(arm.beta) % len(STYLES)]
            label = f"{arm.schedule}, β = {arm.beta:g}" if arm.seed == 0 else None
            _plot_arm(axes[:, column], result["points"], COLOURS[arm.schedule], style, label)
        axes[0, column].set_title(loss.upper())
        axes[0, column].legend(frameon=False, fontsize=8)
        axes[1, column].set_xlabel("KL to the initial model (nats per completion)")
    axes[0, 0].set_ylabel("gold reward (VADER), 95% interval")
    axes[1, 0].set_ylabel("held-out log-probs, change in nats\n(● chosen, × rejected)")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_arm(
    axes: Any, points: list[Mapping[str, Any]], colour: str, style: str, label: str | None
) -> None:
    distance = [p["kl_initial"] for p in points]
    look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.2}
    axes[0].errorbar(
        distance, [p["gold_reward"] for p in points], [p["gold_reward_ci"] for p in points],
        elinewidth=0.5, capsize=2, marker="o", markersize=3, label=label, **look,
    )  # fmt: skip
    for key, marker in (("logps_chosen", "o"), ("logps_rejected", "x")):
        change = [p[key] - points[0][key] for p in points]
        axes[1].plot(distance, change, marker=marker, markersize=4, **look)


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
