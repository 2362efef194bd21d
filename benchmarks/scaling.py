"""The model of a step's seconds from 1 to 1,024 cards, and beside what was measured on one.

    python -m benchmarks.scaling [docs/scaling.md]

Prints its tables; with a page, writes them between the page's markers, and the figure and the CSV
into results/model/. Nothing is measured here: `tralign_fast.memory.time_model` is arithmetic.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tralign_fast.memory.plan_options import load_config
from tralign_fast.memory.step_flops import Sizes, sizes_of
from tralign_fast.memory.time_model import CARDS, Layout, Rates, StepTime, rates_of, step_time
from tralign_fast.memory.workload import Workload

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "h200" / "gpu_steps.csv"
OUTPUT = RESULTS / "model"
GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
A_NODE = 8
HARD = {"ref_model_mixup_alpha": 1.0}
# adapters that a reference holds in the measured windows, which begin with the second move
PAST_IN_WINDOWS = 3


class Series(NamedTuple):
    title: str
    preset: str
    fields: dict[str, Any]
    parallel: str = "fsdp2"
    tensor: int = 1
    least: int = 1  # GPUs


SERIES = {
    "8b": Series("Llama-3.1-8B, all weights, AdamW, FSDP2", "llama-3.1-8b", {"options": HARD}),
    "8b-lora": Series(
        "Llama-3.1-8B, LoRA r = 64, DDP", "llama-3.1-8b",
        {"lora_rank": 64, "options": {"ref_model_mixup_alpha": 0.6}}, "ddp",
    ),
    "70b": Series(
        "Llama-3.1-70B, all weights, AdamW, FSDP2", "llama-3.1-70b", {"options": HARD}, least=16
    ),
    "70b-tensor": Series(
        "Llama-3.1-70B, all weights, AdamW, tensor-parallel 8 in a node, FSDP2 between nodes",
        "llama-3.1-70b", {"options": HARD}, tensor=8, least=16,
    ),
}  # fmt: skip


class Point(NamedTuple):
    series: str
    gpus: int
    time: StepTime
    tokens_per_gpu_s: float


def points(card: str = "h100") -> list[Point]:
    """Of every series: a packed row of 2 pairs, 4,096 tokens, a step on each GPU or group."""
    rates, sizes = rates_of(card), _sizes()
    found = []
    for name, series in SERIES.items():
        for gpus in (g for g in GPUS if g >= series.least):
            layout = Layout(gpus, max(1, gpus // A_NODE), series.parallel, series.tensor)
            work = Workload(load_config(series.preset), **series.fields)
            time = step_time(work, sizes[series.preset], rates, layout)
            found.append(Point(name, gpus, time, work.tokens / series.tensor / time.total))
    return found


def _sizes() -> dict[str, Sizes]:
    names = {series.preset for series in SERIES.values()} | {"llama-3.2-1b"}
    return {name: sizes_of(load_config(name)) for name in sorted(names)}


def compared() -> list[tuple[str, float, float, float, float]]:
    """(case, seconds of a step measured and of the model, of the reference's part likewise)."""
    rates, sizes = rates_of("h200"), _sizes()
    with MEASURED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "tralign-fast"]
    return [_compared(row, sizes, rates) for row in rows]


def _compared(row: dict[str, str], sizes: dict[str, Sizes], rates: Rates) -> Any:
    model, _, checkpointing, _ = row["case"].split("/")
    preset = {"8b": "llama-3.1-8b", "1b": "llama-3.2-1b"}[model[:2]]
    options: dict[str, Any] = {**HARD, "gradient_checkpointing": checkpointing == "ckpt"}
    if "release" in model:
        options |= {"optim": "adafactor", "max_grad_norm": 0.0}
    work = Workload(
        load_config(preset), pairs=int(row["pairs"]), tokens=int(row["packed_tokens"]),
        lora_rank=64 if "lora" in model else None, options=options,
    )  # fmt: skip
    time = step_time(work, sizes[preset], rates, past_adapters=PAST_IN_WINDOWS)
    return (row["case"].removesuffix("/ours"), float(row["step_s"]), time.total,
            float(row["sweep_s"]), time.of_reference)  # fmt: skip


# --- tables and figure ----------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Marker of the page -> its table."""
    found = {"check": _check_table(), "cards": _card_table()}
    for name in SERIES:
        found[name] = _series_table([p for p in points() if p.series == name])
    return found


def _check_table() -> str:
    lines = [
        "| step on an H200 | measured, s | model, s | error | its reference: measured, s | "
        "model, s |",
        "|---|---|---|---|---|---|",
    ]
    for case, seconds, model, sweep, own in compared():
        error = f"{model / seconds - 1:+.0%}"
        lines.append(
            f"| {case} | {seconds:.3f} | {model:.3f} | {error} | {sweep:.3f} | {own:.3f} |"
        )
    return "\n".join(lines)


def _card_table() -> str:
    lines = [
        "| card | bf16, TFLOP/s | memory, GB/s | NVLink, GB/s a direction | network, GB/s a GPU |",
        "|---|---|---|---|---|",
    ]
    for card in CARDS.values():
        lines.append(
            f"| {card.name} | {card.tflops:g} | {card.memory_gbs:,.0f} | {card.nvlink_gbs:g} | "
            f"{card.interconnect_gbs:g} |"
        )
    return "\n".join(lines)


def _series_table(found: list[Point]) -> str:
    lines = [
        "| GPUs | a step, s | computing | gathering | reducing | tensor | exposed | "
        "the reference's share | tokens a second a GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for _, gpus, time, tokens in found:
        computing = time.total - time.exposed - time.tensor
        cells = [f"{v:.3f}" if v else "" for v in (
            time.total, computing, time.gathering, time.reducing, time.tensor, time.exposed
        )]  # fmt: skip
        share = f"{time.of_reference / time.total:.0%}"
        lines.append(f"| {gpus:,} | {' | '.join(cells)} | {share} | {tokens:,.0f} |")
    return "\n".join(lines)


def write(page: Path) -> None:
    """Writes tables into the page, and the CSV and the figure."""
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    OUTPUT.mkdir(exist_ok=True)
    found = points()
    names = list(StepTime.__dataclass_fields__)
    with (OUTPUT / "scaling.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["series", "gpus", *names, "tokens_per_gpu_s"])
        for point in found:
            values = [getattr(point.time, name) for name in names]
            row = [f"{value:.6g}" for value in (*values, point.tokens_per_gpu_s)]
            writer.writerow([point.series, point.gpus, *row])
    _draw(found, OUTPUT / "scaling.png")


def filled(text: str) -> str:
    """The page with its tables made again."""
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"expected one {begin} ... {end}")
        text = pattern.sub(f"{begin}\n{table}\n{end}", text)
    return text


def _draw(found: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (name, series) in zip(axes.flat, SERIES.items(), strict=True):
        own = [point for point in found if point.series == name]
        left = [0.0] * len(own)
        pieces = {
            "computing": [p.time.total - p.time.exposed - p.time.tensor for p in own],
            "tensor parallel": [p.time.tensor for p in own],
            "exposed communication": [p.time.exposed for p in own],
        }
        for label, values in pieces.items():
            axis.bar([f"{p.gpus}" for p in own], values, bottom=left, label=label, width=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.plot([p.time.of_reference for p in own], "k.-", label="of it the moving reference")
        axis.set_title(
            series.title if len(series.title) < 60 else f"{series.title[:57]}...", size=9
        )
        axis.set_xlabel("GPUs (H100, eight a node)")
        axis.set_ylabel("seconds of a step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]))
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables().items()))


if __name__ == "__main__":
    main()
