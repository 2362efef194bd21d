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
EVERY = ("", "_losses", "_stages", "_people", "_interval")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_are_those_of_the_results(file):
    curves = page.read(file)
    assert page.HEADER in PAGE
    for name, seeds in curves.items():
        assert page.line(name, seeds) in PAGE


def test_paired_differences_are_those_of_the_tables():
    of_runs = "\n".join(file.read_text() for file in RESULTS.glob("overoptimize_cpu*.txt"))
    of_runs += "\n".join(over_seeds_of_people().values())
    of_runs += "\n".join(page.paired_table(curves(name)) for name in EVERY)
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
        assert masses(seeds) in PAGE
    assert f"√KL {ends(soft)}, where frozen ends at {ends(frozen)}" in PAGE


def test_how_many_arms_end_lower_than_they_were_is_counted():
    lower = [fell(points) for name in EVERY for points in arms_of(curves(name))]
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
    hard, small = losses["KTO hard, α = 1, τ = 16, β = 0.1"], losses["KTO frozen, β = 0.01"]
    assert farther(hard, kto[0]) == farther(small, kto[0]) == 3
    assert (higher(hard, kto[0], "gold"), higher(small, kto[0], "gold")) == (3, 2)
    assert f"√KL {ends(hard)}" in PAGE
    roots = [page.each(page.distances(seeds), 1) for seeds in (small, kto[1])]
    small_golds = page.each(page.at_the_end(small, "gold"), 2)
    assert f"√KL {roots[0]} and {roots[1]}), with gold {small_golds}." in PAGE
    assert f"√KL {roots[0]}) and has more gold in two of three" in PAGE
    assert f"({small_golds}). Against" in PAGE
    gains = [name for name, seeds in losses.items() if max(page.changes(seeds, "train_chosen")) > 0]
    assert gains == ["KTO frozen, β = 0.1"]
    frozen, hard = stages["DPO frozen, β = 0.075"], stages["DPO hard, α = 1, τ = 30, β = 0.3"]
    tops = [[float(top["gold"]) for top in page.highest(seeds)] for seeds in (hard, frozen)]
    assert all(one > other for one, other in zip(*tops, strict=True))
    assert f"in height ({page.each(tops[0], 2)} and {page.each(tops[1], 2)})" in PAGE
    assert higher(hard, frozen, "gold") == 2
    roots = [page.each(page.distances(seeds), 1) for seeds in (hard, frozen)]
    assert f"√KL {roots[0]} and {roots[1]}" in PAGE


def test_over_seeds_only_the_distance_of_kto_is_beyond_its_interval():
    sure = []
    for name in EVERY:
        found = curves(name)
        for pair in page.pairings(found):
            line = page.paired_line(found, *pair)
            assert line in PAGE
            cells = re.findall(r"([+-]\d+\.\d\d) ± (\d+\.\d\d)", line)[:-1]  # no accuracy
            sure += [line for middle, half in cells if abs(float(middle)) > float(half)]
    assert len(sure) == 1
    assert sure[0].startswith("| KTO soft")


def cells_of_people():
    """Rows of the paired tables: schedule and the frozen β, and (difference, half) by each gold."""
    for line in (RESULTS / "overoptimize_cpu_people.txt").read_text().splitlines():
        if match := re.match(r"dpo (soft|hard) .* - dpo frozen β=(\S+) people", line):
            _, roots, gold, second, _ = re.split(r"\s{2,}", line.strip())
            roots = re.sub(r"\d: ", "", roots)
            assert f"| {match[1]} | {match[2]} | {roots} | {gold} | {second} |" in PAGE
            yield match.groups(), [
                tuple(map(float, text.split(" ± ")))
                for cell in (gold, second) for text in cell.split(", ")
            ]  # fmt: skip


def people_less_frozen(schedule, beta):
    """Cells at the farthest shared distance, at 0.8 and at 0.6 of it; three seeds by each gold."""
    rows = [cells for name, cells in cells_of_people() if name == (schedule, beta)]
    assert [len(cells) for cells in rows] == [6, 6, 6]
    return rows


def over_seeds_of_people():
    """Means of soft's differences over seeds, as they stand in the tables: each β, share, gold."""
    return {
        (beta, share, gold): page.over_seeds([difference for difference, _ in cells[part]])
        for beta in ("0.1", "0.01")
        for share, cells in zip((1.0, 0.8, 0.6), people_less_frozen("soft", beta), strict=True)
        for gold, part in (("gold", slice(0, 3)), ("second", slice(3, 6)))
    }


def test_what_is_said_of_peoples_pairs_at_equal_distance_and_one_beta_holds():
    soft, hard = people_less_frozen("soft", "0.1"), people_less_frozen("hard", "0.1")
    assert all(difference > 0 for cells in soft for difference, _ in cells)
    assert all(difference > half for difference, half in soft[0])
    golds = ", ".join(f"{difference:+.2f}" for difference, _ in soft[0][:3])
    over = over_seeds_of_people()["0.1", 1.0, "gold"]
    assert f"({golds}, each beyond its interval over prompts; over seeds {over})" in PAGE
    assert f"at the farthest is {over} by" in PAGE
    assert beyond(soft) == (8, 5)
    assert all(difference > 0 for difference, _ in hard[0])
    assert [difference > half for difference, half in hard[0]] == [True, False, True] + 3 * [True]
    for cells in hard[1:]:
        assert [difference > 0 for difference, _ in cells] == 2 * [False, True, True]


def beyond(rows):
    """In how many of the nine cells by each gold the moving arm is above by its interval."""
    by_gold, by_second = (
        sum(difference > half for cells in rows for difference, half in cells[part])
        for part in (slice(0, 3), slice(3, 6))
    )
    return by_gold, by_second


def test_what_is_said_of_peoples_pairs_beside_a_ten_times_smaller_beta_holds():
    soft, hard = people_less_frozen("soft", "0.01"), people_less_frozen("hard", "0.01")
    above = [[difference > 0 for difference, _ in cells] for cells in soft]
    assert above[0] == [False, True, True, False, False, True]
    assert above[1] == 2 * [False, True, True]
    assert all(above[2])
    assert beyond(soft) == (5, 3)
    assert beyond(soft[:1]) == (1, 1)
    assert beyond(soft[2:]) == (2, 2)
    first = soft[0][3]
    assert -first[0] > first[1]  # seed 0 by the second gold: below, beyond its interval
    cells = ", ".join(f"{difference:+.2f} ± {half:.2f}" for difference, half in soft[0][:3])
    over = over_seeds_of_people()
    small = over["0.01", 1.0, "gold"]
    assert f"{cells}, over seeds {small}; by the second gold above in one of three." in PAGE
    second = over["0.01", 1.0, "second"]
    assert f"The mean over seeds is {small}, by the second gold {second}." in PAGE
    assert f"seed 0 below, over seeds {over['0.01', 0.8, 'gold']}" in PAGE
    assert f"Over seeds that is {over['0.01', 0.6, 'gold']}" in PAGE
    assert f"{small} over seeds" in (ROOT / "docs/benchmarks.md").read_text()
    means = [float(over[beta, 1.0, "gold"].split()[0]) for beta in ("0.1", "0.01")]
    assert (means[0] - means[1]) / means[0] == pytest.approx(0.9, abs=0.05)
    assert [difference < 0 for difference, _ in hard[0][:3]] == 3 * [True]
    assert [-difference > half for difference, half in hard[0][:3]] == [True, False, False]


def test_what_is_said_of_a_small_beta_on_peoples_pairs_at_the_last_step_holds():
    _, small, soft, hard = people = list(curves("_people").values())
    for key in ("gold", "check"):
        assert higher(small, soft, key) == 2
    assert farther(soft, small) == farther(hard, small) == 2
    golds, roots = (
        [page.each(of(seeds), digits) for seeds in (soft, small)]
        for of, digits in ((lambda s: page.at_the_end(s, "gold"), 2), (page.distances, 1))
    )
    assert PAGE.index(f"({golds[0]},\n  frozen at 0.01 {golds[1]})") > 0
    assert f"(√KL {roots[0]} and {roots[1]})" in PAGE
    assert f"(√KL {roots[1]} and {roots[0]})" in PAGE
    assert all(fell(points) for points in small)
    assert sum(map(fell, [points for seeds in people for points in seeds])) == 9
    jumps = [
        ", ".join(
            "{:.1f} to {:.1f}".format(*(float(point["kl"]) ** 0.5 for point in pair))
            for pair in (arm[0][3:5], arm[1][3:5], arm[2][2:4])
        )
        for arm in (small, soft)
    ]
    assert f"(√KL {jumps[0]}), and so does soft ({jumps[1]})" in PAGE
    step_40, step_60 = small[0][2], small[0][3]
    said = "where its gold is {:.2f}, and at step 60 stands at √KL {:.1f} with {:.2f}"
    root = float(step_60["kl"]) ** 0.5
    assert said.format(float(step_40["gold"]), root, float(step_60["gold"])) in PAGE
    assert float(step_60["gold"]) > max(float(point["gold"]) for point in soft[0])


def test_what_is_said_of_peoples_pairs_at_the_last_step_holds():
    frozen, small, soft, hard = curves("_people").values()
    for seeds in (soft, hard):
        assert farther(seeds, frozen) == 3
        assert higher(seeds, frozen, "held_out_accuracy") == 3
        assert higher(seeds, frozen, "gold") == 2
        assert page.at_the_end(seeds, "gold")[1] < float(seeds[1][0]["gold"])
    assert farther(hard, soft) == 2

    def three(values):
        first, second, third = values
        return f"({second} and {third}, frozen {first}"

    arms = (frozen, soft, hard)
    assert three([page.each(page.at_the_end(s, "held_out_accuracy"), 2) for s in arms]) in PAGE
    roots = [page.each(page.distances(s), 1) for s in arms]
    assert f"√KL {roots[1]} and {roots[2]}, frozen {roots[0]}" in PAGE
    golds = [page.each(page.at_the_end(s, "gold"), 2) for s in arms]
    assert f"({golds[1]}, frozen {golds[0]}), and so has hard ({golds[2]})" in PAGE
    assert (
        f"frozen {masses(frozen)}; at β = 0.01 {masses(small)}; soft {masses(soft)}; hard " in PAGE
    )
    assert f"; hard {masses(hard)} nats" in PAGE
    step_40, step_60 = soft[0][2], soft[0][3]
    assert {f"{float(point['kl']) ** 0.5:.1f}" for point in (step_40, step_60)} == {"3.5"}
    said = "at √KL 3.5 with {:.2f} at step 40, and with {:.2f} at step 60"
    assert said.format(float(step_40["gold"]), float(step_60["gold"])) in PAGE


def masses(seeds):
    kinds = ("chosen", "rejected", "other")
    return page.each([page.mean(page.changes(seeds, f"train_{kind}")) for kind in kinds], 0)


def arms_of(found):
    return [points for seeds in found.values() for points in seeds]


def fell(points):
    """By more than both intervals: the highest of seven points is above the last by chance."""
    (top,) = page.highest([points])
    by = float(top["gold"]) - float(points[-1]["gold"])
    return by > math.hypot(float(top["gold_ci"]), float(points[-1]["gold_ci"]))


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
