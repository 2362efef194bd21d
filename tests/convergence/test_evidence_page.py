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
