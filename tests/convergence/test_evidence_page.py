"""docs/evidence.md says what the results say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from benchmarks.evidence import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/evidence"
PAGE = (ROOT / "docs/evidence.md").read_text()
FILES = sorted(RESULTS.glob("overoptimize_*.csv"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_are_those_of_the_results(file):
    curves = page.read(file)
    assert page.HEADER in PAGE
    for name, seeds in curves.items():
        assert page.line(name, seeds) in PAGE


def test_paired_differences_are_those_of_the_tables():
    of_runs = "\n".join(file.read_text() for file in RESULTS.glob("overoptimize_*.txt"))
    found = re.findall(r"[+-]\d+\.\d\d ± \d+\.\d\d", PAGE[PAGE.index("Paired over") :])
    assert len(found) >= 12
    for text in found:
        assert text in of_runs.replace("-0.00 ± 0.22", "0.00 ± 0.22") or text in of_runs, text


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
    for further, nearer in zip(page.distances(soft), page.distances(frozen), strict=True):
        assert further > nearer
    for worse, better in zip(
        page.at_the_end(soft, "gold"), page.at_the_end(frozen, "gold"), strict=True
    ):
        assert worse < better
    for seeds in (frozen, small, soft, hard):
        for key in ("train_chosen", "train_rejected", "train_other"):
            assert max(page.changes(seeds, key)) < 0
        means = [
            page.mean(page.changes(seeds, f"train_{k}")) for k in ("chosen", "rejected", "other")
        ]
        assert page.each(means, 0) in PAGE
    assert f"√KL {ends(soft)}, where frozen ends at {ends(frozen)}" in PAGE
    turned = [
        float(top["gold"]) > float(points[-1]["gold"])
        for seeds in core.values()
        for top, points in zip(page.highest(seeds), seeds, strict=True)
    ]
    assert f"{sum(turned)} of {len(turned)} arms" in PAGE
