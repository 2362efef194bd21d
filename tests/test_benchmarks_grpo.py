"""The GRPO benchmark compares what computes the same, and counts the logits."""

from __future__ import annotations

import csv
import math

import pytest

from benchmarks import grpo

SMALL = [
    "--rounds", "1", "--rows", "8", "--prompt", "24", "--completion", "32", "--layers", "1",
    "--hidden", "16", "--vocab", "32768",
]  # fmt: skip


def test_arms_agree_and_ours_holds_the_least(tmp_path):
    assert grpo.main([*SMALL, "--output_dir", str(tmp_path)]) == 0
    with (tmp_path / "grpo.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(grpo.ARMS)
    peaks = {arm: float(row["peak_mb"]) for arm, row in rows.items()}
    every_logit = 8 * 32 * 32768 * 4 / 2**20  # of the completions, once, in fp32
    assert peaks["logits"] > 2 * every_logit
    assert peaks["drop_in"] < min(peaks["logits"], peaks["trl"], peaks["trl_compact"])
    assert float(rows["trl"]["ratio_to_trl"]) == 1.0
    assert {"commit", "date", "cpu", "trl"} <= set(rows["trl"])


def test_disagreement_ends_it(monkeypatch, tmp_path, capsys):
    grpo.check_agreement({"trl": (0.5, 2.0, 1.0), "drop_in": (0.50001, 2.0, 1.0)}, 1e-4)
    for facts in ((0.6, 2.0, 1.0), (0.5, 2.1, 1.0), (0.5, 2.0, math.nan)):
        with pytest.raises(grpo.Disagreement, match=r"drop_in: .*TRL's"):
            grpo.check_agreement({"trl": (0.5, 2.0, 1.0), "drop_in": facts}, 1e-4)

    def disagree(options):
        raise grpo.Disagreement("loss 1, TRL's 2")

    monkeypatch.setattr(grpo, "run", disagree)
    assert grpo.main(["--output_dir", str(tmp_path)]) == 1
    assert "TRL's 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
