"""`tralign-fast report RUN [RUN ...]`, and what `train` writes at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tralign_fast.command_line import PositionalParser
from tralign_fast.commands import curves, record
from tralign_fast.commands.record import CONFIG, SAMPLES, SUMMARY, RunRecord, read_run
from tralign_fast.commands.report_page import differing, figures_of, page

REPORT, PNG = "report.html", "curves.png"


def run_report(arguments: list[str]) -> int:
    """Writes the report of a run again, or of several that are compared.

    Raises:
        ValueError: a folder that is no run's, or runs of different data.
    """
    parser = PositionalParser(prog="tralign-fast report", description=run_report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run.")
    parser.add_argument(
        "--output", help="Folder of the report. Default: the run's, or for several this one."
    )
    parser.add_argument(
        "--any_data", "--any-data", action="store_true", help="Compare runs of different data, too."
    )
    given = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in dict.fromkeys(given.runs)]
    _name_apart(runs)
    if not given.any_data:
        check_comparable(runs)
    folder = Path(given.output or (runs[0].folder if len(runs) == 1 else "."))
    written = write_report(runs, folder)
    print(table(runs))
    print(f"{folder}/: {', '.join(written)}")
    return 0


def _name_apart(runs: list[RunRecord]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)


def check_comparable(runs: list[RunRecord]) -> None:
    """Raises ValueError for runs of different rows, whose figures say nothing of each other."""
    for name in ("dataset", "dataset_split", "eval_dataset", "eval_split"):
        values = [run.config.get(name) for run in runs if run.config]
        if len(different := [*dict.fromkeys(map(str, values))]) > 1:
            raise ValueError(
                f"these runs do not compare: {name} is {' and '.join(different)}; report them one "
                "by one, or pass --any_data"
            )


def write_report(runs: list[RunRecord], folder: Path) -> list[str]:
    """report.html and, where matplotlib is, curves.png; the names of what was written.

    Raises:
        ValueError: the folder cannot be written.
    """
    svg, picture = curves.draw(runs) if curves.can_plot() else (None, b"")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(page(runs, svg), encoding="utf-8")
        if svg is not None:
            (folder / PNG).write_bytes(picture)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): choose another folder with --output"
        ) from error
    return [REPORT, *([PNG] if svg is not None else [])]


def table(runs: list[RunRecord]) -> str:
    """The figures of runs side by side."""
    made = [figures_of(run) for run in runs]
    titles = list(dict.fromkeys(title for figures in made for title in figures))
    width = max([12, *(len(run.name) + 2 for run in runs)])
    lines = [f"{'':<20}" + "".join(f"{run.name:>{width}}" for run in runs)]
    for title in titles:
        lines.append(f"{title:<20}" + "".join(f"{f.get(title, '–'):>{width}}" for f in made))
    if len(runs) > 1:
        for name, values in differing(runs).items():
            cells = (str(v)[: width - 2] for v in values)
            lines.append(f"{name[:19]:<20}" + "".join(f"{c:>{width}}" for c in cells))
    return "\n".join(lines)


# --- the end of a run -----------------------------------------------------------------------------


def finish(
    trainer: Any,
    options: Any,
    recipe: str,
    samples: list[dict[str, str]],
    seconds: float,
    seen: int,
) -> str:
    """Writes what a run leaves beside its model; returns the line that says where.

    Args:
        recipe: text of config.yaml.
        samples: prompts with their completions before and after.
        seconds, seen: as `record.summary_of` takes them.
    """
    summary = record.summary_of(trainer, options, seconds, seen)  # asks all processes
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return ""
    folder = Path(trainer.args.output_dir or ".")
    (folder / CONFIG).write_text(recipe, encoding="utf-8")
    record.write_json(folder / SUMMARY, summary)
    if samples:
        record.write_json(folder / SAMPLES, samples)
    try:
        written = write_report([read_run(folder)], folder)
    except Exception as error:  # hours of training do not fail for a picture
        print(f"no report: {error} (tralign-fast report {folder} tries again)", file=sys.stderr)
        written = []
    names = [*written, SUMMARY, CONFIG, "README.md", "the model"]
    return f"{folder}/: {', '.join(names)}"
