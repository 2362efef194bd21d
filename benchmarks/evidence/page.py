"""Tables of docs/evidence.md from the CSVs of `overoptimize`, as Markdown: those that it shows, and
all of them in `overoptimize_tables.md` beside the CSVs.

    python -m benchmarks.evidence.page

A test compares both with the CSVs.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results/evidence"

Row = dict[str, str]
Curves = dict[str, list[list[Row]]]  # of each arm the points of every seed

HEADER = (
    "| arm | turns | height, each seed | end √KL, each | end gold, each | second gold, each | win "
    "rate | repeats | lag, nats |"
)

SHORT = "| arm | highest gold, each seed | end: √KL | end: gold | end: second gold |"

PAIRED = "| at the last step, mean of seeds | √KL | gold | second gold | held-out accuracy |"

EQUAL = (
    "| at equal distance, mean of seeds (seeds above) | gold | at 0.8 | at 0.6 | second gold | at "
    "0.8 | at 0.6 |"
)

# 97.5% quantile of Student's t at one degree of freedom less than seeds
STUDENT = {3: 4.303, 5: 2.776, 8: 2.365}


def read(path: Path) -> Curves:
    """The points of every arm, under what it is (its seed left out), in the file's order."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(_name(row), {}).setdefault(row["seed"], []).append(row)
    return {name: list(seeds.values()) for name, seeds in found.items()}


def _name(row: Row) -> str:
    moves = "" if row["schedule"] == "frozen" else f", α = {row['alpha']}, τ = {row['every']}"
    people = ", people's pairs" if row["pairs"] == "people" else ""
    return f"{row['loss'].upper()} {row['schedule']}{moves}, β = {row['beta']}{people}"


def at_the_end(seeds: Sequence[list[Row]], key: str) -> list[float]:
    return [float(points[-1][key]) for points in seeds]


def distances(seeds: Sequence[list[Row]]) -> list[float]:
    """√KL of each seed's last point."""
    return [max(value, 0.0) ** 0.5 for value in at_the_end(seeds, "kl")]


def changes(seeds: Sequence[list[Row]], key: str) -> list[float]:
    """Of each seed, from the start to the last point."""
    return [float(points[-1][key]) - float(points[0][key]) for points in seeds]


def highest(seeds: Sequence[list[Row]]) -> list[Row]:
    """The point of each seed with the most gold."""
    return [max(points, key=lambda point: float(point["gold"])) for points in seeds]


def lag(seeds: Sequence[list[Row]]) -> list[float]:
    """Mean over each seed's run."""
    found = []
    for points in seeds:
        values = [float(p["lag"]) for p in points if p["step"] != "0" and p["lag"]]
        found.append(mean(values))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def each(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def line(name: str, seeds: Sequence[list[Row]]) -> str:
    second = each(at_the_end(seeds, "check"), 2) if seeds[0][-1]["check"] else ""
    tops = highest(seeds)
    of_lag = mean(lag(seeds))
    cells = [
        name,
        f"{mean([float(p['step']) for p in tops]):.0f}",
        each([float(p["gold"]) for p in tops], 2),
        each(distances(seeds), 1),
        each(at_the_end(seeds, "gold"), 2),
        second,
        f"{mean(at_the_end(seeds, 'win_rate')):.2f}",
        f"{mean(at_the_end(seeds, 'repetition')):.2f}",
        f"{of_lag:.0f}" if abs(of_lag) >= 10 else f"{of_lag:.1f}",
    ]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def short_line(name: str, seeds: Sequence[list[Row]]) -> str:
    """What the page shows of an arm."""
    cells = line(name, seeds).strip("| ").split(" | ")
    name, _, height, root, gold = cells[:5]
    second = each(at_the_end(seeds, "check"), 2) if seeds[0][-1]["check"] else "not measured"
    return f"| {' | '.join([name, height, root, gold, second])} |"


def table(curves: Curves, header: str = HEADER, row: Callable[..., str] = line) -> str:
    marks = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, marks, *(row(name, seeds) for name, seeds in curves.items())])


def over_seeds(values: Sequence[float]) -> str:
    """Mean and half of its 95% interval, as of so many normal values (Student's t)."""
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.2f} ± {half:.2f}"


def differences(seeds: Sequence[list[Row]], others: Sequence[list[Row]], key: str) -> list[float]:
    """Of each seed at the last step; "root" is √KL."""
    of = distances if key == "root" else lambda points: at_the_end(points, key)
    return [one - other for one, other in zip(of(seeds), of(others), strict=True)]


def pairings(curves: Curves) -> list[tuple[str, str]]:
    """Every moving arm with every frozen one of its loss and pairs, of as many seeds."""
    whole = {name: seeds[0][0] for name, seeds in curves.items() if len(seeds) in STUDENT}
    return [
        (one, other)
        for (one, row), (other, frozen) in product(whole.items(), whole.items())
        if row["schedule"] != "frozen" and frozen["schedule"] == "frozen"
        and (row["loss"], row["pairs"]) == (frozen["loss"], frozen["pairs"])
        and len(curves[one]) == len(curves[other])
    ]  # fmt: skip


def paired_line(curves: Curves, one: str, other: str) -> str:
    seeds, others = curves[one], curves[other]
    keys = ["root", "gold", "check", "held_out_accuracy"]
    cells = [
        "" if key == "check" and not seeds[0][-1]["check"]
        else over_seeds(differences(seeds, others, key))
        for key in keys
    ]  # fmt: skip
    less = f"less frozen, β = {others[0][0]['beta']}"
    return f"| {one} {less} | {' | '.join(cells)} |".replace("|  |", "| |")


def paired_table(curves: Curves) -> str:
    lines = [paired_line(curves, one, other) for one, other in pairings(curves)]
    return "\n".join([PAIRED, "|" + "---|" * 5, *lines]) if lines else ""


def at_equal_distance(text: str) -> dict[str, list[list[float]]]:
    """Every moving arm less every frozen one: each seed's differences, as a text file of
    `overoptimize` has them; by the gold at the farthest shared distance, at 0.8 and at 0.6 of it,
    then by the second gold. What the file lacks is an empty list."""
    found: dict[str, list[list[list[float]]]] = {}
    for row in text.splitlines():
        first, *cells = re.split(r"\s{2,}", row.strip())
        if match := re.fullmatch(r"(.+) - \w+ frozen β=(\S+)( people)?", first):
            loss, schedule, *rest = match[1].removesuffix(" people").split()
            arm = ", ".join([f"{loss.upper()} {schedule}", *(f.replace("=", " = ") for f in rest)])
            golds = [
                [float(value) for value in re.findall(r"([+-]\d+\.\d\d) ±", cell)]
                for cell in cells[1:3]
            ]
            found.setdefault(f"{arm} less frozen, β = {match[2]}", []).append(golds)
    return {
        name: [rows[i][gold] if i < len(rows) else [] for gold in (0, 1) for i in range(3)]
        for name, rows in found.items()
    }


def equal_line(name: str, differences: Sequence[Sequence[float]]) -> str:
    cells = [
        f"{over_seeds(values)} ({sum(math.copysign(1, v) > 0 for v in values)})" if values else ""
        for values in differences
    ]
    return f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def equal_table(text: str) -> str:
    lines = [
        equal_line(name, differences)
        for name, differences in at_equal_distance(text).items()
        if len(differences[0]) in STUDENT
    ]
    return "\n".join([EQUAL, "|" + "---|" * 7, *lines]) if lines else ""


MASSES = "| change at the last step, training answers, nats | chosen | rejected | other |"


def masses_line(name: str, seeds: Sequence[list[Row]]) -> str:
    keys = ("train_chosen", "train_rejected", "train_other")
    cells = [f"{mean(changes(seeds, key)):.0f}" for key in keys]
    return f"| {name} | {' | '.join(cells)} |"


def document(paths: Sequence[Path]) -> str:
    """All tables of all experiments."""
    parts = ["# All arms of `overoptimize`", EXPLAINED]
    for path in paths:
        curves = read(path)
        parts += [f"## {path.name}", table(curves), paired_table(curves),
                  equal_table(path.with_suffix(".txt").read_text()),
                  table(curves, MASSES, masses_line)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


EXPLAINED = (
    "Each value is a seed's, from seed 0 on; other numbers are means of seeds. Turns: the step of "
    "the highest gold. Gold: deviations of the SFT's answers. Win rate: against the SFT's answers. "
    "Repeats: share of an answer's runs of three words that stood in it before. Lag: mean Δ to the "
    "reference over the run. Less: paired by seeds, mean and Student's 95% interval over seeds. At "
    "equal distance: the farthest that all arms of a seed have reached, 0.8 and 0.6 of it; each "
    "seed stands in the text file beside the CSV."
)


if __name__ == "__main__":
    files = sorted(RESULTS.glob("overoptimize_*.csv"))
    (RESULTS / "overoptimize_tables.md").write_text(document(files))
    for file in files:
        print(f"{file.name}\n\n{table(read(file), SHORT, short_line)}\n")
