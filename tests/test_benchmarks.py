"""The step benchmark measures what it says: same work, in turn, one CSV row an arm."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks import common, step, step_arm
from tests.quick import fork_arms

COLUMNS = {
    "distribution", "part", "first", "arm", "steps", "median_s", "p20_s", "p80_s",
    "ratio_to_first", "pairwise_ratio_to_first", "total_ratio_to_first",
    "tokens_computed", "useful_tokens_per_s", "peak_mb", "delta_mb", "max_rel_loss_diff",
    "shapes", "commit", "date", "cpu", "cores", "torch", "transformers", "trl", "tralign_fast",
}  # fmt: skip


def jobs(arms=step.COMPARISONS["step"][""]):
    return [step.Job(arm, "chat", steps=2, pairs=1, dtype="fp32", model="tiny") for arm in arms]


@pytest.fixture(scope="module")
def warm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "START", fork_arms())
        yield


@pytest.fixture(scope="module")
def runs(warm):
    return step.measure(jobs())


def test_both_arms_compute_the_same(runs):
    trl, ours = runs
    assert len(trl.losses) == len(ours.losses) == 2
    assert trl.losses[0] == pytest.approx(math.log(2), rel=1e-6)  # the policy is the reference
    assert ours.losses == pytest.approx(trl.losses, rel=1e-4)
    assert ours.gradient_norms == pytest.approx(trl.gradient_norms, rel=1e-3)
    assert ours.lengths == trl.lengths
    # by policy and reference: TRL pads a pair's sequences to one length, ours share the prompt
    for computed, (chosen, rejected) in zip(trl.computed, trl.lengths, strict=True):
        assert computed == 2 * 2 * max(chosen, rejected)
    assert all(n < 2 * useful for n, useful in zip(ours.computed, ours.useful, strict=True))


def test_arms_step_in_turn(runs):
    spans = sorted((*span, run.arm) for run in runs for span in run.spans)
    assert [arm for _, _, arm in spans] == ["trl", "tralign_fast"] * 2
    assert all(end <= begin for (_, end, _), (begin, _, _) in pairwise(spans))


def test_csv_has_a_row_an_arm(runs, tmp_path):
    system = common.environment()
    records = [{**record, **system} for record in step.make_records(jobs(), runs)]
    common.write_csv(tmp_path / "step.csv", records)
    step.plot(tmp_path / "step.png", records)
    assert (tmp_path / "step.png").stat().st_size > 10_000
    with (tmp_path / "step.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= COLUMNS
    assert [row["arm"] for row in rows] == ["trl", "tralign_fast"]
    assert [row["steps"] for row in rows] == ["1", "1"]  # the warm-up is not among them
    trl, ours = rows
    assert float(trl["ratio_to_first"]) == 1.0
    assert float(ours["ratio_to_first"]) == pytest.approx(
        float(trl["median_s"]) / float(ours["median_s"]), rel=1e-4
    )
    assert all(float(row["peak_mb"]) > float(row["delta_mb"]) >= 0 for row in rows)
    assert "/" not in "".join(v for row in rows for k, v in row.items() if k != "cpu")
    assert step.table(records).count("\n") == 3


def test_disagreement_ends_the_benchmark(monkeypatch, tmp_path, capsys):
    def run(arm, loss):
        return step.Run(arm, losses=[0.7, loss], gradient_norms=[1.0, 1.0], lengths=[[5], [6]])

    step.check_agreement([run("trl", 0.69), run("tralign_fast", 0.69005)])
    with pytest.raises(step.Disagreement, match=r"step 2.*loss"):
        step.check_agreement([run("trl", 0.69), run("tralign_fast", 0.70)])
    with pytest.raises(step.Disagreement, match="loss nan"):
        step.check_agreement([run("trl", 0.69), run("tralign_fast", math.nan)])

    def disagree(*_):
        raise step.Disagreement("step 1: loss 1 and 2")

    monkeypatch.setattr(step, "measure", disagree)
    assert step.main(["--distribution", "chat", "--output_dir", str(tmp_path)]) == 1
    assert "loss 1 and 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_arm_that_the_system_kills_is_told_from_one_that_failed(monkeypatch):
    """A fresh interpreter, as the benchmark's arms are."""
    monkeypatch.setattr(step, "START", "spawn")
    process = step._ArmProcess(jobs()[0])
    process.step()
    assert process.run.losses == pytest.approx([math.log(2)], rel=1e-6)
    process._process.kill()
    with pytest.raises(RuntimeError, match=r"arm trl died: killed, .*memory"):
        process.step()


def test_rows_keep_the_stated_lengths():
    for name, words in step.DISTRIBUTIONS.items():
        rows = step_arm.make_rows(name, 20)
        assert rows[:5] == step_arm.make_rows(name, 5)
        for row in rows:
            assert words.prompt[0] <= len(row["prompt"].split()) <= words.prompt[1]
            for completion in (row["chosen"], row["rejected"]):
                assert words.completion[0] <= len(completion.split()) <= words.completion[1]
                assert completion.startswith(" ")


@pytest.mark.matrix
def test_ablations_compute_the_same_with_less_and_less_work(runs, warm):
    pairs = step.COMPARISONS["step_ablations"].values()
    arms = {arm for pair in pairs for arm in pair} - {run.arm for run in runs}
    runs = {run.arm: run for run in (*runs, *step.measure(jobs(sorted(arms))))}
    for run in runs.values():
        assert run.losses == pytest.approx(runs["trl"].losses, rel=1e-4)
    assert runs["full_logits"].computed == runs["padded"].computed == runs["trl"].computed
    for more, less in (("padded", "packed"), ("packed", "tralign_fast")):
        for a, b in zip(runs[more].computed, runs[less].computed, strict=True):
            assert a > b or more == "padded"


def test_ablations_run_a_part_at_a_time(monkeypatch, tmp_path, runs):
    """Two arms of each part beside each other, one bar without and one with it, one row each."""
    measured = []

    def measure(jobs, on_turn):
        measured.append([job.arm for job in jobs])
        return [replace(run, arm=job.arm) for run, job in zip(runs, jobs, strict=True)]

    monkeypatch.setattr(step, "measure", measure)
    arguments = ["--ablations", "--distribution", "chat", "--model", "tiny", "--steps", "1"]
    assert step.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    parts = step.COMPARISONS["step_ablations"]
    assert measured == [list(pair) for pair in parts.values()]
    with (tmp_path / "step_ablations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == [part for part in parts for _ in range(2)]
    assert all(row["first"] == parts[row["part"]][0] for row in rows)
    assert (tmp_path / "step_ablations.png").stat().st_size > 10_000


def test_trl_with_fast_logprobs_takes_the_same_steps(runs, warm):
    assert step.COMPARISONS["step_drop_in"] == {"": ("trl", "drop_in")}
    theirs = runs[0]
    (ours,) = step.measure(jobs(["drop_in"]))
    step.check_agreement([theirs, ours])
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.computed == theirs.computed


@pytest.mark.matrix
def test_places_of_the_reference_agree_and_the_sweep_is_timed(warm):
    four = [
        step.Job(arm, "chat", steps=5, pairs=1, dtype="fp32", model="tiny")
        for arm in ("resident", "snapshot", "offloaded")
    ]
    resident, snapshot, offloaded = step.measure(four)  # raises where they disagree
    for run in (resident, snapshot, offloaded):
        assert len(run.window_seconds) == 1  # steps 3 and 4: the second window
        # steps 2 to 3 hold the sweep, 3 to 4 do not
    assert snapshot.between[1] > 2 * snapshot.between[2]
    assert offloaded.between[1] > 2 * offloaded.between[2]
