"""Curves of runs, the moves of the reference marked: an SVG for the report, a PNG beside it."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

# title, curves as (name in the logs, label), the axis' label
PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    ("loss", (("loss", "train"), ("eval_loss", "held out")), ""),
    ("reward margin", (("rewards/margins", "train"), ("eval_rewards/margins", "held out")), ""),
    ("accuracy", (("rewards/accuracies", "train"), ("eval_rewards/accuracies", "held out")), ""),
    ("log-probabilities", (("logps/chosen", "chosen"), ("logps/rejected", "rejected")), "nats"),
    ("KL to the start", (("eval_kl/initial", "held out"),), "nats a token"),
    ("gradient norm", (("grad_norm", "train"),), ""),
)
_COLOURS = ("#3b6fb6", "#c8553d", "#588157", "#8e6c8a", "#d4a017", "#4f5d75", "#2a9d8f", "#9b2226")


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def panels_of(histories: list[list[dict[str, Any]]]) -> list[Any]:
    """The panels for which any of the runs has a number."""
    names = {name for history in histories for log in history for name in log}
    return [p for p in PANELS if any(name in names for name, _ in p[1])]


def figure(runs: list[Any]) -> Any:
    """A figure with a panel a metric; one run's curves have colours, of several each run has one.

    Args:
        runs: `RunRecord`s.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = panels_of([run.history for run in runs])
    rows = -(-len(panels) // 3) or 1
    made, axes = plt.subplots(
        rows, 3, figsize=(13, 3.4 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, curves, unit) in zip(axes.flat, panels, strict=False):
        for index, run in enumerate(runs):
            _draw(axis, run, curves, _COLOURS[index % len(_COLOURS)] if len(runs) > 1 else None)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return made


def _draw(axis: Any, run: Any, curves: Any, colour: str | None) -> None:
    for number, (name, label) in enumerate(curves):
        points = [(log["step"], log[name]) for log in run.history if name in log]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        several = colour is not None
        text = f"{run.name}: {label}" if several and len(curves) > 1 else (
            run.name if several else label
        )  # fmt: skip
        axis.plot(
            steps, values, label=text, color=colour or _COLOURS[number],
            linestyle="-" if number == 0 or not several else "--", linewidth=1.4,
            marker="o" if len(points) < 40 else None, markersize=2.5,
        )  # fmt: skip
    for number, step in enumerate(run.moves):
        label = "reference moves" if number == 0 and colour is None else None
        axis.axvline(
            step, color=colour or "grey", linestyle=":", linewidth=0.9, alpha=0.6, label=label
        )


def draw(runs: list[Any]) -> tuple[str, bytes]:
    """(SVG that stands inside a page, PNG) of the figure."""
    import matplotlib.pyplot as plt

    made, text, picture = figure(runs), io.StringIO(), io.BytesIO()
    made.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    made.savefig(picture, format="png", dpi=120)
    plt.close(made)
    return text.getvalue()[text.getvalue().index("<svg") :], picture.getvalue()
