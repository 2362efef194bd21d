"""Moving a reference: `ref ← (1-α)·ref + α·θ`, ours beside its rivals, against a copy.

    python -m benchmarks.ema [--dtype fp32 bf16] [--numel 134515008] [--rounds 15] [--quick]

**The work.** One update of all weights of a model, tensors shaped as in a Llama, `--numel` elements
in all. Rivals: TRL's `SyncRefModelCallback`, `torch._foreach_lerp_`, and the EMA function that
`torch.optim.swa_utils.AveragedModel` calls. They take turns in one process, after a gate that
compares each with fp64. The rate counts the bytes that must be moved (read θ, read ref, write ref);
that of the copy (read, write) is the limit.

**Movement.** If the policy stands still at ref + δ, k updates ought to move a reference by
(1 - (1-α)^k)·δ. Here: how much of that a bf16 reference moves, for weights ~ N(0, 0.02²) and
δ ~ N(0, 0.002²), as a least-squares slope. Rounding to nearest loses every movement of less than
half a unit in the last place of its weight.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    device_name,
    environment,
    format_table,
    plot_lines,
    summarize,
    write_csv,
)
from tralign_fast import ema_update_
from tralign_fast.ops.ema import ema_naive

ALPHA = 0.6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHAS = (0.6, 0.1, 0.01, 0.001)
LABELS = {
    "copy": "a copy (the limit)",
    "tralign_fast": "tralign-fast",
    "tralign_fast_stochastic": "tralign-fast, stochastic rounding",
    "foreach": "torch._foreach_lerp_",
    "swa_utils": "torch.optim.swa_utils",
    "trl": "TRL's callback",
}


class Weights(nn.Module):
    """Parameters shaped as in a Llama: of 9 in a layer two are vectors; one embedding."""

    def __init__(self, numel: int, dtype: torch.dtype, device: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(seed)
        width = max(8, int((numel / 250) ** 0.5) // 8 * 8)
        layer = [(width, width)] * 2 + [(width // 3, width)] * 2 + [(8 * width // 3, width)] * 3
        layer += [(width,)] * 2
        shapes, left = [], numel
        while left > 0:
            for shape in layer:
                size = torch.Size(shape).numel()
                shapes.append(shape if size <= left else (left,))
                left -= min(left, size)
                if left == 0:
                    break
        self.weights = nn.ParameterList(
            nn.Parameter(
                torch.empty(shape, device=device).normal_(0, 0.02, generator=generator).to(dtype)
            )
            for shape in shapes
        )


Update = Callable[[Weights, Weights, float], Any]


def _lists(update: Callable[[list[Tensor], list[Tensor], float], Any]) -> Update:
    def on_modules(reference: Weights, policy: Weights, alpha: float) -> None:
        refs, thetas = ([p.data for p in m.parameters()] for m in (reference, policy))
        update(refs, thetas, alpha)

    return on_modules


def make_updates() -> dict[str, Update]:
    from accelerate import Accelerator
    from torch.optim.swa_utils import get_ema_multi_avg_fn
    from trl.trainer.callbacks import SyncRefModelCallback

    Accelerator(cpu=not torch.cuda.is_available())  # the callback asks its state for DeepSpeed

    def swa(refs: list[Tensor], thetas: list[Tensor], alpha: float) -> None:
        get_ema_multi_avg_fn(1 - alpha)(refs, thetas, None)  # pyright: ignore[reportArgumentType]

    def stochastic(refs: list[Tensor], thetas: list[Tensor], alpha: float) -> None:
        ema_update_(refs, thetas, alpha, rounding="stochastic")

    def trl(reference: Weights, policy: Weights, alpha: float) -> None:
        SyncRefModelCallback.sync_target_model(policy, reference, alpha)

    return {
        "copy": _lists(lambda refs, thetas, alpha: torch._foreach_copy_(refs, thetas)),
        "tralign_fast": _lists(ema_update_),
        "tralign_fast_stochastic": _lists(stochastic),
        "foreach": _lists(torch._foreach_lerp_),
        "swa_utils": _lists(swa),
        "trl": trl,
    }


# --- time -----------------------------------------------------------------------------------------


def worst_error(update: Update, dtype: str, device: str, numel: int = 20_000) -> float:
    """The largest error of one update in units of the dtype's rounding of |ref| + |θ|."""
    reference, policy = (Weights(numel, DTYPES[dtype], device, seed) for seed in (0, 1))
    expected = [
        (ema_naive(r.data, t.data, ALPHA), r.data.abs() + t.data.abs())
        for r, t in zip(reference.parameters(), policy.parameters(), strict=True)
    ]
    update(reference, policy, ALPHA)
    unit = torch.finfo(DTYPES[dtype]).eps
    return max(
        float(((r.data.double() - e).abs() / (unit * scale.double())).nan_to_num(0).max())
        for r, (e, scale) in zip(reference.parameters(), expected, strict=True)
    )


def measure_time(numel: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """CSV rows, one an update; the first round is a warm-up and left out."""
    updates = make_updates()
    if dtype == "fp32":  # nothing is rounded that could be rounded otherwise
        del updates["tralign_fast_stochastic"]
    errors = {n: 0.0 if n == "copy" else worst_error(u, dtype, device) for n, u in updates.items()}
    reference, policy = (Weights(numel, DTYPES[dtype], device, seed) for seed in (0, 1))
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds + 1):
        for name, update in updates.items():
            _synchronize(device)
            begin = time.perf_counter()
            update(reference, policy, ALPHA)
            _synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    size = numel * DTYPES[dtype].itemsize
    times = {name: summarize(values[1:]) for name, values in seconds.items()}
    return [
        {
            "update": name,
            "dtype": dtype,
            "numel": numel,
            "tensors": len(list(policy.parameters())),
            "rounds": rounds,
            "median_s": times[name].median,
            "p20_s": times[name].p20,
            "p80_s": times[name].p80,
            "gb_per_s": size * (2 if name == "copy" else 3) / times[name].median / 1e9,
            "ratio_to_foreach": times[name].median / times["foreach"].median,
            # one rounding is 0.5; two, as in mul_ and add_, 1; a stochastic one up to 1
            "error_units": errors[name],
            "verdict": "ok" if errors[name] <= 1.01 else "wrong",
            "device": device_name(device),
        }
        for name in updates
    ]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_table(records: Sequence[dict[str, Any]]) -> str:
    header = ("update", "dtype", "median ms", "p20", "p80", "GB/s", "× foreach", "error", "")
    rows = [
        (
            LABELS[r["update"]], r["dtype"],
            *(f"{r[k] * 1e3:.2f}" for k in ("median_s", "p20_s", "p80_s")),
            f"{r['gb_per_s']:.2f}", f"{r['ratio_to_foreach']:.3f}", f"{r['error_units']:.2f}",
            r["verdict"],
        )
        for r in records
    ]  # fmt: skip
    return format_table(header, rows)


# --- movement -------------------------------------------------------------------------------------


def measure_movement(numel: int, device: str, updates: int = 500) -> list[dict[str, Any]]:
    """CSV rows, one an update and α: the share made of the movement that is due, in bf16."""
    names = ("trl", "foreach", "tralign_fast", "tralign_fast_stochastic")
    functions = make_updates()
    torch.manual_seed(0)  # of the stochastic rounding
    records = []
    for alpha in ALPHAS:
        # until nine tenths of the way are due, at most
        count = next(k for k in range(1, updates + 1) if (1 - alpha) ** k < 0.1 or k == updates)
        due = 1 - (1 - alpha) ** count
        for name in names:
            reference, policy = (Weights(numel, torch.bfloat16, device, 0) for _ in range(2))
            generator = torch.Generator(device).manual_seed(1)
            start, way = [], []
            for p in policy.parameters():
                start.append(p.data.double())
                step = torch.empty_like(p.data, dtype=torch.float32)
                step.normal_(0, 0.002, generator=generator)
                p.data.copy_(p.data.float() + step)
                way.append(p.data.double() - start[-1])
            for _ in range(count):
                functions[name](reference, policy, alpha)
            moved = [
                r.data.double() - s for r, s in zip(reference.parameters(), start, strict=True)
            ]
            along = sum(float((m * w).sum()) for m, w in zip(moved, way, strict=True))
            made = along / sum(float((w * w).sum()) for w in way) / due
            records.append(
                {
                    "update": name,
                    "alpha": alpha,
                    "updates": count,
                    "due": due,
                    "movement": made,
                    "numel": numel,
                    "device": device_name(device),
                }
            )
    return records


def movement_table(records: Sequence[dict[str, Any]]) -> str:
    header = ("movement made in bf16", *(f"α = {a:g}" for a in ALPHAS))
    names = dict.fromkeys(r["update"] for r in records)
    rows = [
        (LABELS[n], *(f"{r['movement']:.1%}" for r in records if r["update"] == n)) for n in names
    ]
    return format_table(header, rows)


def plot_movement(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = {
        LABELS[name]: [(r["alpha"], r["movement"]) for r in records if r["update"] == name]
        for name in dict.fromkeys(r["update"] for r in records)
    }
    title = "Movement a bf16 reference makes, of what is due"
    plot_lines(path, [("α", "share made", lines)], columns=1, title=title)


def main(arguments: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("benchmarks.ema", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--numel", type=int, help="default: 135 M (SmolLM2), on a GPU 8 G")
    parser.add_argument("--rounds", type=int, default=15, help="timed updates of each")
    parser.add_argument("--quick", action="store_true", help="few weights, to try it out")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--output_dir", default="benchmarks/results")
    args = parser.parse_args(arguments)
    numel = args.numel or (10_000 if args.quick else 8_000_000_000 if on_gpu else 134_515_008)
    folder, prefix = Path(args.output_dir), "gpu_" if args.device == "cuda" else ""
    system = environment(("torch", "triton", "trl"))
    records = []
    for dtype in args.dtype:
        records += measure_time(numel, dtype, args.device, args.rounds)
    print(time_table(records) + "\n")
    movement = measure_movement(min(numel, 1_000_000), args.device)
    print(movement_table(movement))
    write_csv(folder / f"{prefix}ema.csv", [{**r, **system} for r in records])
    write_csv(folder / f"{prefix}ema_movement.csv", [{**r, **system} for r in movement])
    plot_movement(folder / f"{prefix}ema_movement.png", movement)
    return 0


if __name__ == "__main__":
    sys.exit(main())
