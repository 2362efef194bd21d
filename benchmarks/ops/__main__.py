"""Seconds and memory of the head: hidden states to a DPO loss and back, ours beside its rivals.

    python -m benchmarks.ops [--dtype fp32 bf16] [--tokens N] [--hidden H] [--vocab V]
    python -m benchmarks.ops --scaling N|V|H         time and memory against one size
    python -m benchmarks.ops --vocab_filter          ε against columns kept, error and time
    python -m benchmarks.ops --quick                 small sizes, to try it out

**The work.** Two pairs, so four sequences, half of whose positions are completions: N scored of
2·N. LM head and DPO's loss alone: policy forward and backward (gradients of hidden states and of
the weight) and reference forward. Every arm is called as its documentation says. On a GPU the
default sizes are those of Llama-3-8B, on a CPU smaller ones.

**Turns.** Every arm is a process of its own, and one works at a time: A B C … A B C …, so that
noise of the machine hits all alike. An arm that has used up `--arm_seconds` leaves the round (at
least one steady call is timed); `calls` says how many were.

On a GPU our arms are six: logits kept within what is free (`tralign_fast`), within 1 GiB, head and
loss as one node, and that with powers kept in place of logits; then what the trainer asks for,
log-probs with the statistics that it logs, of logits and of powers. Powers are not measured so far.

quack's operator gives the mean of cross entropies and no log-probs of tokens, which DPO needs: its
arm computes that mean of policy and reference, forward and backward, and is not checked. An arm
whose package is missing is a row with the reason.

**The gate.** After the first call, loss and gradients are compared with exact ones from the same
inputs (fp64 for fp32, fp32 for bf16). An arm outside the tolerance is marked wrong and timed on; if
it is ours, the exit code is 1.

On a GPU an arm whose turn is over gives back all memory but its inputs, and repeats its call before
the next one is timed: what allocators keep would leave the others no room, and ours take what is
free. Rows are written after every size.

**Memory.** What a steady call needs on top of inputs: on a GPU the allocator's peak, on Linux the
process's peak resident memory, reset before the call (/proc/self/clear_refs; freed memory is given
back to the system first). Both gradients are in it.

**First call.** The first of the process, imports done: compilation, if any, without disk caches.

**The limit** is the four bare matrix products over the N scored rows, without anything around them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import environment, write_csv
from benchmarks.ops import vocab_filter
from benchmarks.ops.arms import ARMS, DTYPES, GPU_ARMS, Case
from benchmarks.ops.results import make_records, merge, plot_comparison, plot_scaling, table
from benchmarks.ops.turns import ArmProcess, measure

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# Of the sweeps: what else takes seconds where these take one is left out.
SCALING_ARMS = (
    "bare", "tralign_fast", "tralign_fast_node", "tralign_fast_lean", "cce", "eager_scored",
)  # fmt: skip


def scaling_cases(axis: str, base: Case) -> list[Case]:
    tokens = (256, 1024, 4096, 16384)
    sizes = {
        "N": ("tokens", (128, *tokens, 32768) if base.device == "cuda" else tokens),
        "V": ("vocab", (32768, 65536, 131072, 262144)),
        "H": ("hidden", (512, 1024, 2048, 4096)),
    }
    name, values = sizes[axis]
    return [replace(base, **{name: value}) for value in values]


def default_arms(scaling: str | None, on_gpu: bool) -> list[str]:
    arms = [*SCALING_ARMS] if scaling else [*ARMS]
    if on_gpu:
        return arms + [arm for arm in GPU_ARMS if arm not in arms]
    return [arm for arm in arms if arm not in GPU_ARMS]


def compare(
    args: argparse.Namespace,
    cases: Sequence[Case],
    keep: Callable[[list[dict]], None],
    gate: bool = True,
) -> list[dict]:
    """Runs all cases, prints a table of each, and hands the records so far to `keep`."""
    records = []
    processes = [ArmProcess(arm) for arm in args.arms]
    try:
        for case in cases:
            print(f"N={case.tokens} H={case.hidden} V={case.vocab} {case.dtype} on {case.device}")
            runs = measure(
                processes, case, rounds=args.rounds, arm_seconds=args.arm_seconds, gate=gate
            )
            records += (own := make_records(case, runs))
            print(table(own) + "\n", flush=True)
            keep(records)
    finally:
        for process in processes:
            process.stop()
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.arms = args.arms or default_arms(args.scaling, on_gpu)
    args.dtype = args.dtype or (["bf16"] if on_gpu else list(DTYPES))
    args.rounds = args.rounds or (3 if args.scaling else 9)
    # compile times are those of a first user, not of whoever ran this before
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    folder = Path(args.output_dir)
    prefix = "gpu_" if on_gpu else ""
    defaults = (1024, 4096, 128256) if on_gpu else (1024, 1024, 65536)
    if args.scaling and not on_gpu:
        defaults = (1024, 512, 32768)
    if args.quick:
        defaults = (64, 64, 1024)
    tokens, hidden, vocab = (
        given or default
        for given, default in zip((args.tokens, args.hidden, args.vocab), defaults, strict=True)
    )
    system = environment(PACKAGES)
    if args.vocab_filter:
        rows = vocab_filter.measure(tokens, args.dtype[0], args.device, args.rounds)
        print(vocab_filter.table(rows))
        write_csv(folder / f"{prefix}vocab_filter.csv", [{**row, **system} for row in rows])
        vocab_filter.plot(folder / f"{prefix}vocab_filter.png", rows)
        return 0
    if args.scaling:
        base = Case(tokens, hidden, vocab, "bf16", args.device)
        cases = scaling_cases(args.scaling, base)

        def keep(rows: list[dict]) -> None:
            rows = [{"axis": args.scaling, **row, **system} for row in rows]
            merged = merge(folder / f"{prefix}ops_scaling.csv", rows, "axis")
            plot_scaling(folder / f"{prefix}ops_scaling.png", merged)

        compare(args, cases, keep, gate=False)
        return 0

    def keep_all(rows: list[dict]) -> None:
        merged = merge(folder / f"{prefix}ops.csv", [{**row, **system} for row in rows], "dtype")
        plot_comparison(folder / f"{prefix}ops.png", merged)

    cases = [Case(tokens, hidden, vocab, dtype, args.device) for dtype in args.dtype]
    rows = compare(args, cases, keep_all)
    bad = [r for r in rows if r["arm"].startswith("tralign_fast") and r["verdict"] != "ok"]
    for row in bad:
        print(f"{row['arm']} is {row['verdict']} in {row['dtype']}: see above", file=sys.stderr)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: all")
    parser.add_argument("--tokens", type=int, help="N, scored positions; a multiple of 4")
    parser.add_argument("--hidden", type=int, help="H")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    parser.add_argument("--rounds", type=int, help="timed calls of an arm, at most")
    parser.add_argument(
        "--arm_seconds", type=float, default=15.0, help="after so many an arm leaves the round"
    )
    parser.add_argument("--scaling", choices=["N", "V", "H"], help="sweep one size instead")
    parser.add_argument("--vocab_filter", action="store_true", help="sweep ε instead")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--output_dir", default="benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
