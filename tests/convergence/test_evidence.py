"""The evidence: what all seeds of the toy show, and the pieces of the sentiment experiment."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch

from benchmarks.evidence import (
    arms,
    measure,
    sentiment,
    sentiment_figure,
    sentiment_tables,
    toy,
    toy_figure,
    tree,
)
from benchmarks.evidence.__main__ import main
from tests.conftest import make_tiny_llama, words

SEEDS = range(3)


@pytest.fixture(scope="module")
def rows():
    return toy.run(toy.arms(betas=(0.1,), steps=300), SEEDS)


def of(rows, key, **only):
    return torch.tensor(toy_figure.curves(rows, key, **only)[1])  # (seeds, steps)


def test_trajectories_have_the_probabilities_of_their_steps():
    policies = tree.RecurrentPolicies(SEEDS)
    logps = policies()
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(len(SEEDS)))
    for seed, number in ((0, 0), (1, 142), (2, 242)):  # one after the other, as a sampler would
        actions = [number // tree.ACTIONS**k % tree.ACTIONS for k in reversed(range(tree.DEPTH))]
        state, total, action = 0.0, torch.zeros(()), tree.ACTIONS
        for index, following in enumerate(actions):
            carried = state @ policies.recur[seed] if index else 0.0
            move = policies.embed[seed, action] + policies.recur_bias[seed, 0]
            state = torch.tanh(move + carried)
            total = total + (state @ policies.head[seed]).log_softmax(-1)[following]
            action = following
        torch.testing.assert_close(logps[seed, number], total)


def test_seeds_do_not_depend_on_their_company():
    arm = toy.Arm("kto", "hybrid", 0.1, steps=100)
    torch.set_default_dtype(torch.float64)  # in fp32 Adam makes 1e-3 of the rounding of a batch
    try:
        alone, together = toy.run([arm], [1]), toy.run([arm], [0, 1])
    finally:
        torch.set_default_dtype(torch.float32)
    together = [row for row in together if row["seed"] == 1]
    assert len(alone) == len(together) > 15
    for row, other in zip(alone, together, strict=True):
        assert row["step"] == other["step"]
        assert row["chosen"] == pytest.approx(other["chosen"], rel=1e-6)


@pytest.mark.parametrize("loss", toy.METHODS)
def test_all_seeds_push_the_rejected_down_and_start_alike(rows, loss):
    for schedule in toy.SCHEDULES:
        chosen, rejected, ood = (
            of(rows, key, loss=loss, schedule=schedule) for key in ("chosen", "rejected", "ood")
        )
        torch.testing.assert_close(chosen + rejected + ood, torch.ones_like(chosen))
        assert (ood[:, 0] < 0.25).all()
        assert (rejected[:, -1] < 0.05 * rejected[:, 0]).all()
    initial = of(rows, "kl_initial", loss=loss, schedule="hard")[:, 0]
    assert (initial == 0).all()


def test_in_all_seeds_frozen_dpo_saturates_and_a_moving_reference_does_not(rows):
    start = 0.1**2 / 4
    frozen, soft, hard = (
        of(rows, "curvature", loss="dpo", schedule=s)[:, -1] / start
        for s in ("frozen", "soft", "hard")
    )
    assert (frozen < 0.3).all()
    assert (hard > 2 * frozen).all()
    assert (soft > 0.99).all()
    # soft at every step lags by (1 - α)/α = 0.67 steps: no gap to its reference is ever left
    margins = [of(rows, "margin", loss="dpo", schedule=s)[:, -1] for s in ("soft", "frozen")]
    assert (margins[0].abs() < 0.05 * margins[1]).all()


def test_frozen_ipo_stops_at_its_target_and_a_moving_reference_goes_on(rows):
    target = 1 / (2 * 0.1)
    frozen = of(rows, "margin", loss="ipo", schedule="frozen")[:, -1]
    torch.testing.assert_close(frozen, torch.full_like(frozen, target), rtol=0.02, atol=0)
    distance = {s: of(rows, "kl_initial", loss="ipo", schedule=s) for s in ("frozen", "hard")}
    assert (distance["hard"][:, -1] > distance["frozen"][:, -1]).all()


def test_out_of_distribution_mass_rises_in_all_seeds(rows):
    for schedule in toy.SCHEDULES:
        ood = of(rows, "ood", loss="dpo", schedule=schedule)
        assert (ood.max(1).values > 1.2 * ood[:, 0]).all()


def test_toy_command_writes_a_figure_and_a_row_a_look(tmp_path, monkeypatch):
    few = [toy.Arm(loss, s, 0.1, steps=4) for loss in toy.METHODS for s in toy.SCHEDULES]
    monkeypatch.setattr(toy, "arms", lambda **_: few)
    threads = torch.get_num_threads()
    assert main(["toy", "--quick", "--seeds", "2", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    with (tmp_path / "toy_quick.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(few) * 2 * len(toy.log_steps(4))
    assert (tmp_path / "toy_quick.png").read_bytes()[:4] == b"\x89PNG"


# --- sentiment ------------------------------------------------------------------------------------


def test_interval_is_of_the_prompts_means():
    mean, half = measure.mean_interval([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    # a prompt's second sample that repeats the first says nothing new
    assert measure.mean_interval([[0.5], [1.0]]) == measure.mean_interval([[0.5] * 2, [1.0] * 2])
    assert math.isnan(measure.mean_interval([[0.3, 0.4]])[1])


def test_distinct_2_counts_pairs_of_all_texts_together():
    assert measure.distinct_2(["a b c", "A b"]) == pytest.approx(2 / 3)
    assert measure.distinct_2(["so so so so"]) == pytest.approx(1 / 3)
    assert math.isnan(measure.distinct_2(["one", ""]))


def test_cache_is_by_configuration_and_leaves_nothing_of_a_killed_run(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return {"value": value}

    one = {"arm": "x", "settings": {"steps": 1}}
    assert arms.cached(tmp_path, one, lambda: make(1)) == {"value": 1}
    assert arms.cached(tmp_path, one, lambda: make(2)) == {"value": 1}
    reordered = {"settings": {"steps": 1}, "arm": "x"}
    assert arms.cached(tmp_path, reordered, lambda: make(3)) == {"value": 1}
    other = {**one, "settings": {"steps": 2}}
    assert arms.cached(tmp_path, other, lambda: make(4)) == {"value": 4}
    assert made == [1, 4]
    with pytest.raises(KeyboardInterrupt):
        arms.cached(tmp_path, {"arm": "y"}, lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert len(list(tmp_path.iterdir())) == 2


def test_arms_differ_in_what_is_compared_alone():
    full = arms.full_arms()
    assert len(full) == len(set(full)) == 2 * 3 * (3 + 3)
    for loss, betas in arms.BETAS.items():
        for schedule in ("soft", "hard", "hybrid"):
            assert {a.beta for a in full if (a.loss, a.schedule) == (loss, schedule)} == {betas[0]}
        assert {a.beta for a in full if (a.loss, a.schedule) == (loss, "frozen")} == set(betas)


def conversations(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt": [{"role": "user", "content": words(6, g) + f" {i}"}],
            "chosen": [{"role": "assistant", "content": words(5, g)}],
            "rejected": [{"role": "assistant", "content": words(7, g)}],
        }
        for i in range(count)
    ]


TINY = dataclasses.replace(
    arms.QUICK, steps=4, every=2, measure_every=2, prompts=3, new_tokens=6, held_out=4,
    learning_rate=5e-3,
)  # fmt: skip


@pytest.fixture
def tiny_material(small_tokenizer):
    def load():
        return sentiment.Material(
            make_tiny_llama(small_tokenizer), small_tokenizer, conversations(12, 0),
            conversations(4, 1), lambda text: float(len(text) % 7) / 7,
        )  # fmt: skip

    return load


def test_arms_resume_one_by_one_to_the_same_results(tiny_material, tmp_path):
    chosen = [
        arms.Arm(loss, schedule, 0.1, 0)
        for loss, schedule in (("dpo", "frozen"), ("dpo", "soft"), ("kto", "hard"))
    ]
    trained = []

    def execute(arm, settings, folder):
        if len(trained) == 2 and arm not in trained and interrupt:
            raise KeyboardInterrupt
        trained.append(arm)
        return sentiment.run_arm(arm, settings, folder, tiny_material)

    interrupt, seen = True, []
    with pytest.raises(KeyboardInterrupt):
        sentiment.run(chosen, TINY, tmp_path, execute, lambda results: seen.append(len(results)))
    assert (trained, seen) == (chosen[:2], [1, 2])
    interrupt = False
    results = sentiment.run(chosen, TINY, tmp_path, execute)
    assert trained == chosen  # the first two came from their files
    whole = sentiment.run(chosen[:1], TINY, tmp_path / "other", execute)
    assert whole[chosen[0]]["points"] == results[chosen[0]]["points"]  # and again the same numbers

    assert [results[a]["totals"]["reference"] for a in chosen] == [
        "snapshot", "resident", "snapshot",
    ]  # fmt: skip
    for result in results.values():
        start, *later = result["points"]
        assert [p["step"] for p in result["points"]] == [0, 2, 4]
        assert start == results[chosen[0]]["points"][0]
        assert start["kl_initial"] == pytest.approx(0, abs=1e-6)
        assert all(p["kl_initial"] > 1e-6 for p in later)
        assert all(1 <= p["length"] <= TINY.new_tokens for p in later)
    totals = {a: r["totals"]["tokens"] for a, r in results.items()}
    assert totals[chosen[0]] == totals[chosen[1]] > 0

    rows = sentiment.records(results)
    assert len(rows) == 9
    assert {"gold_reward_ci", "distinct_2", "total_train_s", "total_peak_memory_mb"} <= set(rows[0])
    assert not [row for row in rows if "samples" in row]
    sentiment_figure.plot(tmp_path / "figure.png", results, "tiny")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    page = sentiment_figure.samples_page(results, prompts=2)
    assert page.count("- before: ") == 2
    assert page.count("KTO hard, β = 0.1, step 4") == 2


def test_arms_are_compared_at_a_distance_that_all_of_them_reached():
    def curve(*points):
        names = ("kl_initial", "gold_reward", "gold_reward_ci", "logps_chosen", "logps_rejected")
        return {"points": [dict(zip(names, p, strict=True), distinct_2=0.5) for p in points]}

    start = (0.0, 0.2, 0.1, -10.0, -11.0)
    results = {
        arms.Arm("dpo", "frozen", 0.1, 0): curve(start, (4.0, 0.6, 0.1, -12.0, -16.0)),
        arms.Arm("dpo", "hard", 0.1, 0): curve(start, (8.0, 0.4, 0.3, -14.0, -20.0)),
        arms.Arm("kto", "hard", 0.1, 0): curve(start, (2.0, 0.3, 0.1, -10.0, -11.0)),
    }
    lines = sentiment_tables.last_step(results).splitlines()[2:]
    frozen, hard, other = (" ".join(line.split()) for line in lines)
    assert frozen == "dpo frozen β=0.1 4.0 0.60 ± 0.10 0.60 0.60 0.60 -2.0 -5.0 0.50"
    assert hard == "dpo hard β=0.1 8.0 0.40 ± 0.30 0.40 0.30 0.30 -4.0 -9.0 0.50"
    assert other.startswith("kto hard β=0.1 2.0 0.30 ± 0.10 0.30 0.30")  # a distance of its own


def test_measuring_leaves_the_run_alone(tiny_material, tmp_path, monkeypatch):
    """The same weights with and without looks on the way."""
    arm, finals = arms.Arm("dpo", "hybrid", 0.1, 3), []
    for every in (1, 4):
        settings = dataclasses.replace(TINY, measure_every=every)
        result = sentiment.run_arm(arm, settings, tmp_path / str(every), tiny_material)
        finals.append(result["points"][-1])
    assert finals[0] == finals[1]


def test_kl_of_the_gauge_is_that_of_plain_logits(tiny_material):
    material = tiny_material()
    moved = tiny_material().model
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.05)
    prompts = [row["prompt"] for row in material.test_rows]
    gauge = measure.Gauge(
        material.model, material.tokenizer, prompts, material.test_rows, material.gold, TINY, 0
    )
    plain = tiny_material().model.eval()
    assert measure.prepare_model(moved).packs
    found = gauge(moved)
    torch.manual_seed(0)
    with torch.no_grad():
        total, answers = 0.0, gauge._sample(moved)
        for sample in (s for pair in answers for s in pair):
            ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
            first = len(sample.prompt_ids) - 1
            p, q = (m(input_ids=ids).logits[0, first:-1].log_softmax(-1) for m in (moved, plain))
            total += float((p.exp() * (p - q)).sum())
    assert found["kl_initial"] == pytest.approx(total / 6, rel=1e-3)
