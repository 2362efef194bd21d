"""What a moving reference does, reproduced on a laptop.

    python -m benchmarks.evidence toy [--quick]
    python -m benchmarks.evidence sentiment [--quick]

Each writes a CSV and a figure to benchmarks/results/evidence/. `sentiment` keeps every finished arm
in runs/evidence/ and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import environment, write_csv


def toy(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.evidence.toy import arms, run
    from benchmarks.evidence.toy_figure import plot
    from benchmarks.evidence.toy_tables import at_distance, last_step

    torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
    chosen = arms(betas=(0.1,), steps=500) if options.quick else arms()
    rows = run(chosen, range(options.seeds or 5))
    name = "toy_quick" if options.quick else "toy"
    # thousands of rows: what is the same in all of them stands in a file of its own
    same = {key: rows[0][key] for key in ("steps", "learning_rate")}
    write_csv(
        options.out / f"{name}.csv",
        [{key: value for key, value in row.items() if key not in same} for row in rows],
    )
    write_csv(options.out / f"{name}_environment.csv", [{**same, **environment(("torch",))}])
    plot(options.out / f"{name}.png", rows)
    print(f"{last_step(rows)}\n\n{at_distance(rows)}")


def sentiment(options: argparse.Namespace) -> None:
    from benchmarks.evidence.arms import FULL, QUICK, full_arms, quick_arms
    from benchmarks.evidence.sentiment import records, run
    from benchmarks.evidence.sentiment_figure import plot, samples_page
    from benchmarks.evidence.sentiment_tables import last_step

    settings = QUICK if options.quick else FULL
    chosen = quick_arms(options.seeds or 1) if options.quick else full_arms(options.seeds or 2)
    name = "sentiment_quick" if options.quick else "sentiment"
    system = environment(("torch", "transformers"))
    title = (
        f"Controlled sentiment, SmolLM2-135M-Instruct{' (quick)' if options.quick else ''}:\n"
        f"{settings.steps} steps of {settings.pairs} pairs, τ = {settings.every}, "
        f"{len({arm.seed for arm in chosen})} seed(s)"
    )

    def write(results) -> None:
        rows = [{**row, **system} for row in records(results)]
        write_csv(options.out / f"{name}.csv", rows)
        plot(options.out / f"{name}.png", results, title)
        (options.out / f"{name}_samples.md").write_text(samples_page(results))

    started = time.perf_counter()
    results = run(chosen, settings, options.cache, on_result=write)
    print(last_step(results))
    print(f"{len(results)} arms in {time.perf_counter() - started:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.evidence", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("experiment", choices=("toy", "sentiment"))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter arms")
    parser.add_argument("--seeds", type=int, help="toy: 5; sentiment: 2, quick 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence"))
    parser.add_argument("--cache", type=Path, default=Path("runs/evidence"), help="finished arms")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    {"toy": toy, "sentiment": sentiment}[options.experiment](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
