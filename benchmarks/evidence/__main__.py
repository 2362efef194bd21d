"""What a moving reference does, reproduced on a laptop.

    python -m benchmarks.evidence toy [--quick]
    python -m benchmarks.evidence sentiment [--quick]
    python -m benchmarks.evidence overoptimize [--data FILE] [--arms NAMES] [--minutes M] [--quick]
    python -m benchmarks.evidence overoptimize --whole [--data FILE] [--minutes M]
    python -m benchmarks.evidence golds [--data FILE]

Each writes a CSV, all but the last one a figure too, to benchmarks/results/evidence/. `sentiment`
keeps every finished arm in runs/evidence/, `overoptimize` also the points and checkpoints of
unfinished ones, and both go on from there when they are started again.
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


def overoptimize(options: argparse.Namespace) -> None:
    """Trains what is not there yet, and writes figure, rows and tables of all that is."""
    import torch

    from benchmarks.evidence import overoptimize as experiment
    from benchmarks.evidence.overoptimize_arms import (
        CPU,
        GPU,
        QUICK,
        WHOLE,
        arms_of,
        in_figure,
        with_steps,
    )
    from benchmarks.evidence.overoptimize_figure import plot, plot_interval, samples_page
    from benchmarks.evidence.overoptimize_tables import tables

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "quick" if options.quick else "whole" if options.whole else device
    settings = {"quick": QUICK, "whole": WHOLE, "cuda": GPU, "cpu": CPU}[kind]
    settings = with_steps(settings, options.steps or settings.steps)
    seeds = options.seeds or (1 if options.quick else 3)
    usual = ["all"] if kind == "cuda" else ["core"]
    names = options.arms or usual
    arms = [arm for arm in arms_of(names, settings, seeds) if options.match in arm.name]
    if not arms:
        raise ValueError(f"--match: no arm's name holds {options.match!r}")
    deadline = None if options.minutes is None else time.time() + 60 * options.minutes
    workers = options.workers or (6 if device == "cuda" else 1)
    root = options.cache / "overoptimize"
    system = environment(("torch", "transformers"))
    name = f"overoptimize_{kind}"
    if names != usual:  # experiments of their own have files of their own
        name = "_".join([name, *names])
    results = {}

    def write() -> None:
        rows = [{**row, **system} for row in experiment.records(results)]
        write_csv(options.out / f"{name}.csv", rows)
        whole = {arm: result for arm, result in results.items() if result["finished"]}
        title = _title(results, settings, system)
        drawn = {arm: result for arm, result in whole.items() if in_figure(arm, settings)}
        if drawn:  # a mean over seeds would end with its shortest
            plot(options.out / f"{name}.png", drawn, title)
        plot_interval(options.out / f"{name}_interval.png", whole, title)
        if whole:
            (root / f"{name}_samples.md").write_text(samples_page(whole))

    for arm, result in experiment.run(
        arms, options.data, settings, root, device, workers, deadline
    ):
        results[arm] = result
        print(f"{arm}: {experiment.in_a_line(result)}", flush=True)
        write()
    if not results:
        raise ValueError("--minutes: the time was up before the first arm")
    results = {arm: results[arm] for arm in arms if arm in results}
    write()
    facts = experiment.facts(options.data, settings, root, device)
    text = tables(results, settings, facts)
    (options.out / f"{name}.txt").write_text(text + "\n")
    print(f"\n{text}")
    left = len(arms) - sum(result["finished"] for result in results.values())
    if left:
        print(f"\n{left} of {len(arms)} arms are left: the same command goes on with them")


def golds(options: argparse.Namespace) -> None:
    """What the golds of `overoptimize` know of people's pairs, and what others would."""
    from benchmarks.evidence.golds import run, table

    rows = run(options.data, options.cache / "overoptimize")
    system = environment(("torch", "transformers"))
    write_csv(options.out / "golds.csv", [{**row, **system} for row in rows])
    print(table(rows))


def _title(results, settings, system: dict[str, str]) -> str:
    devices = ", ".join(sorted({result["totals"]["device"] for result in results.values()}))
    commits = ", ".join(sorted({result["totals"]["commit"] for result in results.values()}))
    whole = settings.layers == 30
    model = "SmolLM2-135M-Instruct" + ("" if whole else f", {settings.layers} of its layers")
    return (
        f"HH-RLHF harmless, {model}, {settings.steps} steps of {settings.pairs} pairs, "
        f"learning rate {settings.learning_rate:g}\n"
        f"{devices}; torch {system['torch']}, transformers {system['transformers']}, "
        f"commit {commits}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.evidence", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("experiment", choices=("toy", "sentiment", "overoptimize", "golds"))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter arms")
    parser.add_argument(
        "--whole", action="store_true", help="overoptimize: the whole model where there is no GPU"
    )
    parser.add_argument("--seeds", type=int, help="toy: 5; sentiment: 2; overoptimize: 3")
    parser.add_argument("--steps", type=int, help="overoptimize: of every arm")
    parser.add_argument(
        "--data", default="Anthropic/hh-rlhf", help="people's pairs: file or hub id"
    )
    parser.add_argument("--arms", nargs="+", help="overoptimize: experiments, or all")
    parser.add_argument("--match", default="", help="overoptimize: part of an arm's name")
    parser.add_argument("--minutes", type=float, help="overoptimize: stop then, and keep all")
    parser.add_argument("--workers", type=int, help="overoptimize: arms at once; GPU 6, CPU 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence"))
    parser.add_argument("--cache", type=Path, default=Path("runs/evidence"), help="finished arms")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    experiments = {"toy": toy, "sentiment": sentiment, "overoptimize": overoptimize}
    experiments["golds"] = golds
    try:
        experiments[options.experiment](options)
    except ValueError as error:
        print(f"benchmarks.evidence: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
