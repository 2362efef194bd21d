"""The experiment with people's preferences: its data, its models, its arms, what all seeds show."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from benchmarks.evidence import cache, golds, hh_models, overoptimize, preferences
from benchmarks.evidence import overoptimize_arms as arms
from benchmarks.evidence import overoptimize_figure as figure
from benchmarks.evidence import overoptimize_tables as tables
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.overoptimize_material import load_material
from benchmarks.evidence.overoptimize_measure import neighbours, repetition, turning_point, win_rate
from tests.conftest import make_small_tokenizer, make_tiny_llama, words


def transcript(*contents: str) -> str:
    who = ("Human", "Assistant")
    return "".join(f"\n\n{who[i % 2]}: {text}" for i, text in enumerate(contents))


def row(question: str, chosen: str, rejected: str):
    return {"chosen": transcript(question, chosen), "rejected": transcript(question, rejected)}


def write(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    return str(path)


# --- pairs ----------------------------------------------------------------------------------------


def test_transcripts_become_conversations_and_what_is_no_pair_is_counted(tmp_path):
    rows = [
        {"chosen": transcript("a", "b", "c?", "yes: it\n\nis"),
         "rejected": transcript("a", "b", "c?", "no")},
        row("a", "", "no"),
        row("a", "same", "same"),
        {"chosen": transcript("a", "b"), "rejected": transcript("x", "b")},
        {"chosen": "no turns", "rejected": "none"},
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="4 rows are left out: 1 with an empty answer") as seen:
        pairs = preferences.read_pairs(write(tmp_path / "hh.jsonl.gz", rows))
    assert "\n" not in str(seen[0].message)
    assert pairs == [
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c?"},
            ],
            "chosen": [{"role": "assistant", "content": "yes: it\n\nis"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
    ]


@pytest.mark.parametrize("fault", ["missing", "cut", "columns", "no pair"])
def test_data_that_cannot_be_read_is_one_line(tmp_path, capsys, fault):
    path = tmp_path / "hh.jsonl.gz"
    if fault != "missing":
        key = "text" if fault == "columns" else "chosen"
        write(path, [{key: words(40, torch.Generator()), "rejected": str(i)} for i in range(200)])
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["overoptimize", "--quick", "--data", str(path), "--out", str(tmp_path)])
    *progress, line = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith(f"benchmarks.evidence: {path}: ")
    assert not [other for other in progress if "benchmarks.evidence" in other]


def test_a_conversation_is_in_one_part_only():
    rows = [
        preferences._pair(*row(f"question {i // 3}", f"a{i}", f"b{i}").values()) for i in range(90)
    ]
    short = [i % 3 != 0 or i < 60 for i in range(90)]
    parts = preferences.split(rows, 12, 9, 9, short)
    questions = [
        {each["prompt"][0]["content"] for each in part}
        for part in (parts.gold, parts.gold_test, parts.policy, parts.test)
    ]
    assert sum(map(len, questions)) == len(set().union(*questions)) == 30
    long = {rows[i]["prompt"][0]["content"] for i in range(90) if not short[i]}
    assert not (questions[2] | questions[3]) & long
    assert parts == preferences.split(rows[::-1], 12, 9, 9, short[::-1]) or len(parts.policy) == 12
    with pytest.raises(ValueError, match="90 pairs are too few to be parted: 60 of 99 for policy"):
        preferences.split(rows, 99, 9, 9, short)


# --- models ---------------------------------------------------------------------------------------


def test_first_tokens_of_a_bpe_are_a_tokenizer(small_tokenizer):
    few = hh_models._first_tokens(small_tokenizer, 290)
    text = words(30, torch.Generator().manual_seed(1))
    ids = few(text)["input_ids"]
    assert few.decode(ids) == text
    assert max(ids) < 290
    assert len(ids) > len(small_tokenizer(text)["input_ids"])
    everything = hh_models._first_tokens(small_tokenizer, len(small_tokenizer))
    assert everything(text)["input_ids"] == small_tokenizer(text)["input_ids"]


def test_gold_learns_pairs_and_reads_past_padding(small_tokenizer):
    torch.manual_seed(0)
    pad = small_tokenizer.pad_token_id
    gold = hh_models.Gold.untrained(make_tiny_llama(small_tokenizer), pad, bf16=False)
    pairs = [([5, 6 + i % 3], [20 + i % 7, 30], [40 + i % 5, 30, 31]) for i in range(24)]
    assert hh_models.accuracy(gold, pairs) == 0.5  # a head of zeros: all ties
    gold.fit(pairs, steps=25, size=8, rate=5e-3, seed=0)
    assert hh_models.accuracy(gold, pairs) == 1.0
    together = gold([([5, 6], [20, 30]), ([5, 6, 7], [40, 30, 31, 32, pad])])
    alone = [*gold([([5, 6], [20, 30])]), *gold([([5, 6, 7], [40, 30, 31, 32, pad])])]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_head_on_the_backbone_learns_pairs_and_reads_past_padding(small_tokenizer):
    torch.manual_seed(0)
    model, pad = make_tiny_llama(small_tokenizer), small_tokenizer.pad_token_id
    gold = hh_models.BackboneGold(hh_models.first_layers(model, 1), pad, bf16=False)
    pairs = [([5, 6 + i % 3], [20 + i % 7, 30], [40 + i % 5, 30, 31]) for i in range(24)]
    gold.fit(pairs)
    assert hh_models.accuracy(gold, pairs) == 1.0
    together = gold([([5, 6], [20, 30]), ([5, 6, 7], [40, 30, 31, 32, pad])])
    alone = [*gold([([5, 6], [20, 30])]), *gold([([5, 6, 7], [40, 30, 31, 32, pad])])]
    assert together == pytest.approx(alone, abs=1e-4)
    # the mean of the first layer's states over the answer, of a model that is left whole
    states = model.model(torch.tensor([[5, 6, 20, 30]]), output_hidden_states=True).hidden_states
    own = states[1][0, 2:].double().mean(0) / gold.scale
    assert torch.allclose(gold.features([([5, 6], [20, 30])])[0], own, rtol=1e-4, atol=1e-6)
    assert len(states) == 1 + model.config.num_hidden_layers > 2


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs wordllama")
def test_words_learn_pairs(small_tokenizer):
    gold = hh_models.WordGold(small_tokenizer)

    def ids(text):
        return small_tokenizer(text)["input_ids"]

    pairs = [(ids(f"question {i}"), ids(f"good {i}"), ids(f"a bad {i}")) for i in range(12)]
    gold.fit(pairs)
    assert hh_models.accuracy(gold, pairs) == 1.0
    assert gold([(ids("x"), [])]) == [0.0]


def test_tokens_learn_pairs_and_weigh_the_common_ones():
    pairs = [([1], [5 + i % 3, 20], [5 + (i + 1) % 3, 21, 22 + i]) for i in range(12)]
    gold = hh_models.TokenGold(40, kept=5)
    gold.fit(pairs)
    assert hh_models.accuracy(gold, pairs) == 1.0
    assert gold.weight[20] > 0 > gold.weight[21]
    assert (gold.weight != 0).sum() <= 5
    assert gold([([1], []), ([1], [39])]) == [0.0, 0.0]  # nothing, and a token without a weight


def test_golds_are_compared_over_folds_that_share_no_conversation():
    rows = [preferences._pair(*row(f"q{i // 2}", "a", "b").values()) for i in range(20)]
    groups = golds.conversations([(each, None) for each in rows])
    assert groups == [i // 2 for i in range(20)]
    # what tells the pairs of one conversation apart is of no use in another
    x = torch.eye(10, dtype=torch.float64).repeat_interleave(2, 0)
    assert golds.right(x @ hh_models.logistic(x, 0.01)).mean() == 1.0
    assert golds.cross_validated(x, groups, 0.01).tolist() == [0.5] * 20
    signal = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    assert golds.cross_validated(signal, groups, 0.01).tolist() == [1.0] * 20


def test_second_gold_names_what_is_missing(small_tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps wordllama"):
        hh_models.WordGold(small_tokenizer)


def test_folders_are_whole_or_not_there(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    made = []
    with pytest.raises(KeyboardInterrupt):
        cache.cached_folder(tmp_path, "x", {"a": 1}, fail)
    for _ in range(2):
        folder = cache.cached_folder(tmp_path, "x", {"a": 1}, made.append)
    assert len(made) == 1
    assert not (folder / "half").exists()
    cache.write_json(folder / "configuration.json", {"format": 0, "a": 1})
    with pytest.raises(ValueError, match="another configuration; remove the folder"):
        cache.cached_folder(tmp_path, "x", {"a": 1}, made.append)


# --- arms -----------------------------------------------------------------------------------------


def test_table_of_arms_is_that_of_the_experiment():
    found = arms.arms_of(["all"], arms.GPU, 3)
    assert len(found) == len(set(found))
    for loss in ("dpo", "ipo", "kto"):
        own = [a for a in found if (a.loss, a.pairs, a.seed) == (loss, "proxy", 2)]
        for beta in arms.FROZEN[loss]:
            assert arms.Arm(loss, beta, 0.0, 0, 2) in own
        assert {"soft", "hard", "hybrid"} <= {a.schedule for a in own}
        assert len({a.every for a in own if a.schedule == "hard"}) >= 3
    taus = [a.every for a in arms.arms_of(["interval"], arms.GPU, 1) if a.alpha == 1.0]
    assert sorted(set(taus)) == [2**i for i in range(10)]
    with pytest.raises(ValueError, match="no experiment dops; expected all or some of core"):
        arms.arms_of(["dops"], arms.GPU, 1)
    drawn = [a for a in found if a.seed == 0 and arms.in_figure(a, arms.GPU)]
    assert len(drawn) == 4 * 9 + 3  # the curves and the literature
    assert arms.in_figure(arms.Arm("dpo", 9.0, 0.0, 0, 0), arms.GPU)  # one of the reader's own
    longer = arms.with_steps(arms.GPU, 2000)
    assert (longer.measure_every, longer.save_every) == (100, 500)


def test_turning_points_and_distances():
    points = [{"step": i, "kl": k, "gold": g} for i, (k, g) in enumerate(
        [(0.0, 0.0), (4.0, 1.0), (1.0, 0.5), (16.0, -1.0)])]  # fmt: skip
    assert turning_point(points) == {
        "step": 1, "kl": 4.0, "height": 1.0, "left": -1.0, "last_kl": 16.0,
    }  # fmt: skip
    assert neighbours(points, 1.0) == (0, 1, 0.5)
    assert neighbours(points, 3.0) == (2, 3, pytest.approx(2 / 3))
    assert neighbours(points, 9.0) == (3, 3, 0.0)
    assert repetition(["a b c a b c", "a b"]) == pytest.approx(0.125)
    assert win_rate([1.0, 2.0, 0.0], [0.0, 2.0, 1.0]) == pytest.approx(0.5)


TINY = replace(
    arms.CPU, vocabulary=320, prompt_tokens=48, new_tokens=8, sft_steps=4, sft_rate=1e-3,
    gold="model", gold_steps=8, gold_rate=3e-3, model_batch=8, policy_rows=40, test_rows=12,
    gold_test_rows=12, steps=40, pairs=4, learning_rate=1e-2, measure_every=20, save_every=40,
    every=(4, 15, 30), prompts=8, held_out=24, sample_batch=40,
)  # fmt: skip


def made_rows(_):
    g = torch.Generator().manual_seed(0)
    return [
        preferences._pair(*row(f"{words(3, g)} {i}", words(3, g), words(3, g)).values())
        for i in range(100)
    ]


def tiny(*_):
    tokenizer = make_small_tokenizer()
    return make_tiny_llama(tokenizer), tokenizer


def tiny_material(source, settings, root, device):
    return load_material(source, settings, root, device, tiny, made_rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("overoptimize")


@pytest.fixture(scope="module")
def material(root):
    return tiny_material("made", TINY, root, "cpu")


def test_material_is_made_once_and_as_told(material, root):
    again = tiny_material("made", replace(TINY, steps=7, learning_rate=1.0), root, "cpu")
    assert again.folder == material.folder  # what only arms read makes no second start
    assert tiny_material("made", replace(TINY, flipped=0.0), root, "cpu").folder != material.folder
    assert 0 <= material.facts["accuracy"]["model"] <= 1
    judge, rows = material.judges["gold"], material.pairs["proxy"]
    chosen, rejected = (
        judge([(r["prompt_ids"], r[f"{key}_ids"]) for r in rows]) for key in ("chosen", "rejected")
    )
    kept = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    flips = random.Random(0)  # 20% of the labels are turned around
    assert kept == 1 - sum(flips.random() < 0.2 for _ in rows) / len(rows)
    every = judge([(r["prompt_ids"], r["other_ids"]) for r in rows])
    assert abs(sum(every) / len(every)) < 0.5  # in deviations of the SFT's answers


def test_a_head_as_gold_is_stored_with_the_material(tmp_path):
    headed = replace(TINY, gold="backbone", check="tokens", gold_steps=0)
    load = [tiny_material("made", headed, tmp_path, "cpu") for _ in range(2)]
    rows = [(r["prompt_ids"], r["chosen_ids"]) for r in load[0].pairs["proxy"]]
    first, again = (material.judges["gold"](rows) for material in load)
    assert first == again
    assert len(set(first)) > 1
    assert set(load[0].facts["accuracy"]) >= {"backbone", "tokens"}
    assert load[0].judges["check"](rows) != first


def test_a_killed_arm_goes_on_to_the_same_numbers(material, tmp_path, monkeypatch):
    settings = replace(TINY, steps=8, measure_every=2, save_every=4)
    short = replace(material, settings=settings)
    arm = arms.Arm("dpo", 0.1, 0.6, 3, 1)
    whole = overoptimize.run_arm(arm, short, tmp_path / "whole")

    gauge, looks = overoptimize.Gauge.__call__, []

    def killed(self, *args):
        looks.append(0)
        if len(looks) == 5:  # the start, steps 2, 4 (saved), 6; then 8
            raise KeyboardInterrupt
        return gauge(self, *args)

    monkeypatch.setattr(overoptimize.Gauge, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        overoptimize.run_arm(arm, short, tmp_path / "cut")
    resumed = overoptimize.run_arm(arm, short, tmp_path / "cut")
    assert len(looks) == 7  # 6 and 8 again, from the checkpoint of step 4
    late = overoptimize.run_arm(arm, short, tmp_path / "late", deadline=0.0)
    assert not late["finished"]
    assert [p["step"] for p in late["points"]] == [0]
    looks.clear()
    monkeypatch.setattr(overoptimize.Gauge, "__call__", gauge)
    late = overoptimize.run_arm(arm, short, tmp_path / "late")
    for other in (resumed, late):
        assert other["finished"]
        for point, same in zip(whole["points"], other["points"], strict=True):
            clocks = ("seconds", "cpu_seconds")
            assert {k: v for k, v in point.items() if k not in clocks} == {
                k: v for k, v in same.items() if k not in clocks
            }
    names = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert [name.split("-")[0] for name in names] == ["arm", "start"]  # files, and no folder


def test_an_arm_that_diverges_is_kept_and_shown(material, tmp_path):
    wild = replace(material, settings=replace(TINY, learning_rate=1e30, steps=16, measure_every=2))
    arm = arms.Arm("dpo", 0.1, 0.0, 0, 0)
    result = overoptimize.run_arm(arm, wild, tmp_path)
    assert "finite" in result["diverged"]
    assert result["finished"]
    assert all(math.isfinite(point["kl"]) for point in result["points"])
    assert overoptimize.run_arm(arm, wild, tmp_path) == json.loads(json.dumps(result))
    assert "diverged" in overoptimize.in_a_line(result)
    figure.plot(tmp_path / "figure.png", {arm: result}, "wild")
    assert f"diverged: {arm}" in tables.summary({arm: result}, material.facts)


@pytest.fixture(scope="module")
def results(material, root):
    chosen = [
        arms.Arm(loss, 0.5, alpha, every, seed)
        for seed in range(3)
        for loss, alpha, every in (("dpo", 0.0, 0), ("dpo", 0.6, 1))
    ]
    return dict(
        overoptimize.run(chosen, "made", TINY, root, "cpu", load=lambda *_: material)
    )  # fmt: skip


def test_in_all_seeds_a_soft_reference_goes_farther_and_leaves_no_gap(results):
    for seed in range(3):
        frozen, soft = (
            next(r["points"] for a, r in results.items() if (a.seed, a.alpha) == (seed, alpha))
            for alpha in (0.0, 0.6)
        )
        assert soft[-1]["kl"] > 1.2 * frozen[-1]["kl"] > 3.0
        assert abs(soft[-1]["lag"]) < 0.1 * frozen[-1]["lag"]
        for points in (frozen, soft):
            assert points[0]["kl"] == pytest.approx(0, abs=1e-4)
            assert points[-1]["train_accuracy"] > 0.9 > points[0]["train_accuracy"]
            # the rejected lose, and what is in no pair and what is held out lose with them
            for key in ("train_rejected", "train_other", "held_out_chosen"):
                assert points[-1][key] < points[0][key] - 3


def test_the_start_is_measured_by_the_first_arm_of_a_seed(results, root):
    assert len(list(root.glob("start-*.json"))) == 3
    for seed in range(3):
        one, other = (r["points"][0] for arm, r in results.items() if arm.seed == seed)
        assert one == other


def test_two_estimates_of_the_distance_agree(results):
    last = [result["points"][-1] for result in results.values()]
    exact, sampled = (sum(p[key] for p in last) for key in ("kl", "kl_samples"))
    assert sampled == pytest.approx(exact, rel=0.25)
    assert all(p["kl_token"] == pytest.approx(p["kl"] / p["length"]) for p in last)


def test_tables_and_figure_of_finished_arms(results, material, root, tmp_path):
    text = tables.tables(results, TINY, material.facts)
    assert "6 of 6 arms finished; diverged: none" in text
    cut = {arm: {**r, "finished": arm.seed < 2} for arm, r in results.items()}
    short = tables.tables(cut, TINY, material.facts)
    assert "4 of 6 arms finished" in short
    assert " of 2" in short.split("above")[1].splitlines()[2]  # a mean of whole arms alone
    paired = tables.at_equal_distance(results).splitlines()
    assert len(paired) == 3
    assert paired[-1].endswith(" of 3")
    assert tables.at_equal_distance(results, 0.6) in text
    for arm in results:
        nearer = 0.6 * tables.shared_distance(results, arm)
        assert f"{arm.seed}: {nearer:.1f}" in tables.at_equal_distance(results, 0.6)
    figure.plot(tmp_path / "figure.png", results, "tiny")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    points = next(iter(results.values()))
    swept = {arms.Arm("dpo", 0.1, 1.0, 2**i, 0): points for i in range(4)}
    figure.plot_interval(tmp_path / "interval.png", swept, "tiny")
    assert (tmp_path / "interval.png").read_bytes()[:4] == b"\x89PNG"
    assert len(tables.interval(swept).splitlines()) == 2 + 4
    again = overoptimize.run(
        [*results, arms.Arm("dpo", 9.0, 0.0, 0, 0)], "made", TINY, root, "cpu",
        deadline=0.0, load=lambda *_: material,
    )  # fmt: skip
    kept = dict(again)  # what is finished, though there is no time
    assert list(kept) == list(results)
    assert list(kept.values()) == json.loads(json.dumps(list(results.values())))
    rows = overoptimize.records(results)
    assert len(rows) == 6 * 3
    assert not {"samples", "golds", "checks"} & set(rows[0])
    assert {each["loss"] for each in rows} == {"dpo"}
    assert "to be read before" in figure.samples_page(results)


def test_the_command_says_what_is_left(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overoptimize, "load_material", lambda *_: material)
    monkeypatch.setattr(overoptimize, "run", lambda a, *_: iter([(a[0], unfinished)]))
    point = {
        **dict.fromkeys(
            (
                "kl",
                "gold",
                "win_rate",
                "length",
                "repetition",
                "lag",
                "step",
                "seconds",
                "cpu_seconds",
            ),
            0.0,
        ),
        "check": None,
        "samples": [],
    }
    point |= {f"{p}_{k}": 0.0 for p in ("train", "held_out")
              for k in ("chosen", "rejected", "other", "accuracy")}  # fmt: skip
    unfinished = {
        "points": [{**point, "golds": [0.0], "checks": None}], "diverged": None, "finished": False,
        "totals": {"commit": "x", "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "overoptimize").mkdir()
    arguments = ["--quick", "--arms", "core", "--out", str(tmp_path), "--cache", str(tmp_path)]
    assert main(["overoptimize", *arguments]) == 0
    assert "4 of 4 arms are left: the same command goes on" in capsys.readouterr().out
    with (tmp_path / "overoptimize_quick.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    whole = [{"--quick": "--whole"}.get(each, each) for each in arguments]
    assert main(["overoptimize", *whole, "--seeds", "1"]) == 0
    assert (tmp_path / "overoptimize_whole.csv").is_file()
    arguments[2] = "losses"  # leaves the files of other experiments alone
    assert main(["overoptimize", *arguments]) == 0
    assert "8 of 8 arms are left" in capsys.readouterr().out
    assert (tmp_path / "overoptimize_quick_losses.csv").is_file()


def test_of_several_workers_one_that_fails_leaves_the_others(
    material, tmp_path, monkeypatch, capsys
):
    def stops(arm, *_):
        if arm.seed == 0:
            return {"arm": arm.seed}
        error = RuntimeError("CUDA error: out of memory\nlong") if arm.seed == 1 else None
        raise error or BrokenProcessPool("terminated abruptly")

    def pool(workers, mp_context):  # threads: a process takes seconds to import torch
        assert mp_context.get_start_method() == "spawn"
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(overoptimize, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(overoptimize, "_in_worker", stops)
    few = [arms.Arm("dpo", 0.1, 0.0, 0, seed) for seed in (1, 0)]
    load = {"load": lambda *_: material, "workers": 2}
    found = dict(overoptimize.run(few, "made", TINY, tmp_path, "cpu", **load))
    assert found == {few[1]: {"arm": 0}}
    stopped = capsys.readouterr().err.splitlines()
    assert "dpo frozen β=0.1 seed 1: stopped: RuntimeError: CUDA error: out of memory" in stopped
    lost = [arms.Arm("dpo", 0.1, 0.0, 0, 2)]
    with pytest.raises(ValueError, match="a process ended in mid-arm"):
        list(overoptimize.run(lost, "made", TINY, tmp_path, "cpu", **load))
