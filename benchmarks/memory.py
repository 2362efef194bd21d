"""Peak memory of a training step, traced without a GPU: this trainer against TRL on the same work.

    python -m benchmarks.memory [--out benchmarks/results] [--models llama-3.2-1b ...] [--measure]

Two pairs, a packed row of 4,096 tokens in all (half prompts), gradient checkpointing, bf16 weights.
TRL runs the same pairs unshared and padded, 6,144 tokens. Counted are tensors, of the trainers'
own code under fake tensors (`tralign_fast.memory`): not fragmentation, not kernel workspaces.

`--measure` trains the same on this machine's GPU, random weights, the reference moving after every
second step, and notes what its allocator gave out: results/gpu_memory.csv. Left out: 4-bit weights,
which cannot be quantised without data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import device_name, environment, format_table, write_csv
from benchmarks.ops.results import merge
from tralign_fast.memory import MemoryReport, Workload, measure, trace, trace_trl
from tralign_fast.memory.plan_answer import GIB, NOTE
from tralign_fast.memory.plan_options import load_config

HARD = {"ref_model_mixup_alpha": 1.0}
RELEASE = {**HARD, "gradient_release": True, "max_grad_norm": 0.0, "optim": "adafactor"}
EIGHT_BIT = {**RELEASE, "optim": "adamw_bnb_8bit"}

# (group, bar, model, trainer, fields of Workload); without HARD, TRL's schedule: α = 0.6, τ = 512
CASES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("Llama-3.2-1B full", "TRL, AdamW", "llama-3.2-1b", "trl", {"options": HARD}),
    ("Llama-3.2-1B full", "AdamW", "llama-3.2-1b", "ours", {"options": HARD}),
    ("Llama-3.2-1B full", "release, Adafactor", "llama-3.2-1b", "ours", {"options": RELEASE}),
    ("Llama-3.1-8B full", "TRL, AdamW", "llama-3.1-8b", "trl", {"options": HARD}),
    ("Llama-3.1-8B full", "AdamW", "llama-3.1-8b", "ours", {"options": HARD}),
    ("Llama-3.1-8B full", "release, 8-bit AdamW", "llama-3.1-8b", "ours", {"options": EIGHT_BIT}),
    ("Llama-3.1-8B full", "release, Adafactor", "llama-3.1-8b", "ours", {"options": RELEASE}),
    ("Llama-3.1-8B LoRA 64", "TRL", "llama-3.1-8b", "trl", {"lora_rank": 64}),
    ("Llama-3.1-8B LoRA 64", "AdamW", "llama-3.1-8b", "ours", {"lora_rank": 64}),
    (
        "Llama-3.1-8B LoRA 64", "fp32 adapters", "llama-3.1-8b", "ours",
        {"lora_rank": 64, "lora_dtype": "float32"},
    ),
    (
        "Llama-3.1-70B 4-bit LoRA 64", "TRL", "llama-3.1-70b", "trl",
        {"lora_rank": 64, "base_bits": 4},
    ),
    (
        "Llama-3.1-70B 4-bit LoRA 64", "AdamW", "llama-3.1-70b", "ours",
        {"lora_rank": 64, "base_bits": 4},
    ),
]  # fmt: skip


def run(models: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for group, bar, model, trainer, fields in CASES:
        if model not in models:
            continue
        start = time.perf_counter()
        work = Workload(load_config(model), **fields)
        report: MemoryReport = (trace_trl if trainer == "trl" else trace)(work)
        seconds = time.perf_counter() - start
        print(f"{group}, {bar}: {report.peak / GIB:.2f} GiB ({seconds:.0f} s)", file=sys.stderr)
        rows.append({
            "group": group, "bar": bar, "trainer": trainer, "pairs": work.pairs,
            "packed_tokens": work.tokens, "dtype": work.dtype,
            **{f"{k}_bytes": v for k, v in asdict(report).items()},
            "trace_seconds": round(seconds, 1),
        })  # fmt: skip
    return rows


def run_on_gpu(models: Sequence[str]) -> list[dict[str, Any]]:
    """Measured; a case that fails (memory, a missing package) is named and left out."""
    rows = []
    for group, bar, model, trainer, fields in CASES:
        if model not in models or fields.get("base_bits"):
            continue
        work = Workload(load_config(model), **fields)
        try:
            measured = measure(work, trl=trainer == "trl")
        except (RuntimeError, ImportError, ValueError) as error:
            print(f"{group}, {bar}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        print(
            f"{group}, {bar}: {measured.peak / GIB:.2f} GiB ({measured.reserved / GIB:.2f} "
            f"reserved), {measured.seconds:.3f} s a step",
            file=sys.stderr,
        )
        rows.append({
            "group": group, "bar": bar, "trainer": trainer, "pairs": work.pairs,
            "packed_tokens": work.tokens, "dtype": work.dtype, "peak_bytes": measured.peak,
            "reserved_bytes": measured.reserved,
            "step_s": measured.seconds, "device": device_name("cuda"),
        })  # fmt: skip
    return rows


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [key for key in rows[0] if key.endswith("_bytes") and key != "peak_bytes"]
    figure, axes = plt.subplots(figsize=(9.0, 0.5 * len(rows) + 1.6))
    labels = [f"{row['group']}: {row['bar']}" for row in rows]
    left = [0.0] * len(rows)
    for part in parts:
        widths = [row[part] / GIB for row in rows]
        name = part.removesuffix("_bytes").replace("_", " ")
        bars = axes.barh(labels, widths, left=left, height=0.7, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.bar_label(bars, [f"{total:.1f}" for total in left], fontsize=8, padding=3)
    for size in (24, 80):
        axes.axvline(size, color="0.6", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak of a step (dotted: 24 and 80)")
    axes.set_title("2 pairs, 4,096 packed tokens, bf16, gradient checkpointing", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Traced peak memory of a training step.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    models = sorted({case[2] for case in CASES})
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    options = parser.parse_args(arguments)
    if options.measure:
        if not torch.cuda.is_available():
            parser.error("--measure needs a GPU; without it the same is traced")
        about = environment(("torch", "transformers", "trl", "peft"))
        rows = [{**row, **about} for row in run_on_gpu(options.models)]
        merge(options.out / "gpu_memory.csv", rows, "group")
        return 0
    rows = run(options.models)
    about = environment(("torch", "transformers", "trl", "peft", "bitsandbytes"))
    write_csv(options.out / "memory.csv", [{**row, **about} for row in rows])
    plot(options.out / "memory.png", rows)
    parts = [key for key in rows[0] if key.endswith("_bytes")]
    print(
        format_table(
            ["GiB", *(p.removesuffix("_bytes").replace("_", " ") for p in parts)],
            [
                [f"{row['group']}: {row['bar']}", *(f"{row[p] / GIB:.2f}" for p in parts)]
                for row in rows
            ],
        )
    )
    print(NOTE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
