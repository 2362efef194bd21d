"""What a plan's alternatives hold, as a picture: a bar of pieces each, and the card's line."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.plan_answer import GIB, HEADROOM, Plan

_PIECES = [f.name for f in dataclasses.fields(MemoryReport) if f.name != "peak"]


def check_plot(path: str) -> None:
    """Raises ValueError before anything is traced, where no picture could be written at its end."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'tralign-fast[train]'")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot: expected a file .png, .svg or .pdf, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: no such folder; expected one that is there")


def save_plot(plan: Plan, path: str) -> None:
    """Draws the plan into a file.

    Raises:
        ValueError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [each.change or "as asked" for each in plan.tried]
    reports = [each.report for each in plan.tried]
    if plan.theirs is not None:
        names, reports = [*names, "TRL, as asked"], [*reports, plan.theirs]
    made, axis = plt.subplots(figsize=(11, 1.6 + 0.45 * len(names)), constrained_layout=True)
    left = [0.0] * len(names)
    for piece in _PIECES:
        sizes = [getattr(report, piece) / GIB for report in reports]
        axis.barh(names, sizes, left=left, label=piece.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.barh(
        names, [HEADROOM / GIB] * len(names), left=left, color="none", edgecolor="grey", hatch="//",
        label="left free",
    )  # fmt: skip
    axis.axvline(plan.memory / GIB, color="black", linestyle="--", label="the card")
    axis.invert_yaxis()
    axis.set_xlabel("GiB")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=7)
    try:
        made.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written ({error.strerror})") from error
    finally:
        plt.close(made)
