"""docs/evidence.md says what the results say."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from benchmarks.evidence import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/evidence"
PAGE = (ROOT / "docs/evidence.md").read_text()
FILES = sorted(RESULTS.glob("overoptimize_cpu*.csv"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_are_those_of_the_results(file):
    curves = page.read(file)
    assert page.HEADER in PAGE
    for name, seeds in curves.items():
        assert page.line(name, seeds) in PAGE


def test_paired_differences_are_those_of_the_tables():
    of_runs = "\n".join(file.read_text() for file in RESULTS.glob("overoptimize_cpu*.txt"))
    found = re.findall(r"[+-]\d+\.\d\d ± \d+\.\d\d", PAGE[PAGE.index("Paired over") :])
    assert len(found) >= 12
    for text in found:
        assert text in of_runs, text


def test_accuracies_of_golds_are_those_that_were_measured():
    with (RESULTS / "golds.csv").open() as file:
        rows = {row["features"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        cells = [f"{float(row[f'{k}_accuracy']):.3f} ± {float(row[f'{k}_ci']):.3f}"
                 for k in ("folds", "held_out")]  # fmt: skip
        assert f"| {row['features']} | {' | '.join(cells)} |" in PAGE


def curves(name):
    return page.read(RESULTS / f"overoptimize_cpu{name}.csv")


def ends(seeds):
    golds = page.each(page.at_the_end(seeds, "gold"), 2)
    return f"{page.each(page.distances(seeds), 1)} and gold {golds}"


def test_what_is_said_of_every_seed_of_dpo_holds():
    core = curves("")
    frozen, small = core["DPO frozen, β = 0.1"], core["DPO frozen, β = 0.01"]
    soft, hard = core["DPO soft, α = 0.6, τ = 1, β = 0.1"], core["DPO hard, α = 1, τ = 16, β = 0.1"]
    assert farther(soft, frozen) == 3
    assert higher(frozen, soft, "gold") == 3
    for seeds in (frozen, small, soft, hard):
        for key in ("train_chosen", "train_rejected", "train_other"):
            assert max(page.changes(seeds, key)) < 0
        means = [
            page.mean(page.changes(seeds, f"train_{k}")) for k in ("chosen", "rejected", "other")
        ]
        assert page.each(means, 0) in PAGE
    assert f"√KL {ends(soft)}, where frozen ends at {ends(frozen)}" in PAGE


EVERY = ("", "_losses", "_stages", "_people", "_interval")


def test_how_many_arms_end_lower_than_they_were_is_counted():
    """By more than both intervals: the highest of seven points is above the last by chance."""
    lower = []
    for name in EVERY:
        for seeds in curves(name).values():
            for top, points in zip(page.highest(seeds), seeds, strict=True):
                fall = float(top["gold"]) - float(points[-1]["gold"])
                lower.append(fall > math.hypot(float(top["gold_ci"]), float(points[-1]["gold_ci"])))
    assert PAGE.count(f"{sum(lower)} of {len(lower)} arms") == 2
    seconds = [
        sum(float(points[-1][key]) for name in EVERY for seeds in curves(name).values()
            for points in seeds) / 3600
        for key in ("seconds", "cpu_seconds")
    ]  # fmt: skip
    said = "{} arms of 120 steps of 2 pairs, {:.2f} hours on a machine that others used, {:.2f} CPU"
    assert said.format(len(lower), *seconds) in PAGE


def test_what_is_said_of_every_seed_of_kto_ipo_and_the_stages_holds():
    losses, stages = curves("_losses"), curves("_stages")
    kto = losses["KTO frozen, β = 0.1"], losses["KTO soft, α = 0.6, τ = 1, β = 0.1"]
    ipo = losses["IPO frozen, β = 0.3"], losses["IPO soft, α = 0.6, τ = 1, β = 0.3"]
    for frozen, soft in (kto, ipo):
        assert len(frozen) == len(soft) == 3
        assert farther(soft, frozen) == 3
    assert higher(kto[1], kto[0], "gold") == 3
    assert higher(kto[1], kto[0], "check") == 2
    assert higher(ipo[1], ipo[0], "gold") == 1
    golds = [page.each(page.at_the_end(seeds, "gold"), 2) for seeds in reversed(kto)]
    assert f"with more in every seed ({golds[0]} against {golds[1]})" in PAGE
    gains = [name for name, seeds in losses.items() if max(page.changes(seeds, "train_chosen")) > 0]
    assert gains == ["KTO frozen, β = 0.1"]
    frozen, hard = stages["DPO frozen, β = 0.075"], stages["DPO hard, α = 1, τ = 30, β = 0.3"]
    tops = [[float(top["gold"]) for top in page.highest(seeds)] for seeds in (hard, frozen)]
    assert all(one > other for one, other in zip(*tops, strict=True))
    assert f"in height ({page.each(tops[0], 2)} and {page.each(tops[1], 2)})" in PAGE
    assert higher(hard, frozen, "gold") == 2
    roots = [page.each(page.distances(seeds), 1) for seeds in (hard, frozen)]
    assert f"√KL {roots[0]} and {roots[1]}" in PAGE


def test_the_shorter_the_interval_the_farther():
    found = [
        curves("_interval")["DPO hard, α = 1, τ = 4, β = 0.1"],
        curves("")["DPO hard, α = 1, τ = 16, β = 0.1"],
        curves("_interval")["DPO hard, α = 1, τ = 64, β = 0.1"],
        curves("")["DPO frozen, β = 0.1"],
    ]
    roots = [page.distances(seeds)[0] for seeds in found]
    golds = [page.at_the_end(seeds, "gold")[0] for seeds in found]
    assert roots == sorted(roots, reverse=True)
    (*first, last), (*others, end) = (
        [f"{x:.{n}f}" for x in xs] for xs, n in ((roots, 1), (golds, 2))
    )
    assert (
        f"√KL ends at {', '.join(first)} and {last}, gold at {', '.join(others)} and {end}" in PAGE
    )


def farther(seeds, others):
    pairs = zip(page.distances(seeds), page.distances(others), strict=True)
    return sum(one > other for one, other in pairs)


def higher(seeds, others, key):
    pairs = zip(page.at_the_end(seeds, key), page.at_the_end(others, key), strict=True)
    return sum(one > other for one, other in pairs)
