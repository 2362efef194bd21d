"""What is seen while `train` runs: a bar in a terminal, and a row of a table for every log.

In a terminal rich draws the bar (without rich, tqdm), with loss, margin, accuracy and the step at
which the reference moves next; sweeps of the reference and evaluations show in the same bar. Where
there is no terminal only the rows are printed, one line each.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from tralign_fast.reference.window import WindowedReference

# title, width, the log's name, how it is written
_COLUMNS: tuple[tuple[str, int, str, str], ...] = (
    ("loss", 9, "loss", "{:.4f}"),
    ("margin", 9, "rewards/margins", "{:+.4f}"),
    ("accuracy", 9, "rewards/accuracies", "{:.1%}"),
    ("chosen", 9, "logps/chosen", "{:.2f}"),
    ("rejected", 9, "logps/rejected", "{:.2f}"),
    ("grad norm", 10, "grad_norm", "{:.3g}"),
    ("rate", 9, "learning_rate", "{:.2e}"),
    ("moves", 6, "tr/syncs", "{:d}"),
)


def header() -> str:
    return "".join(["        step", *(f"{title:>{width}}" for title, width, *_ in _COLUMNS)])


def row(step: int, logs: dict[str, Any], prefix: str = "") -> str:
    """One line of the table; what a log has not is left empty."""
    cells = [f"{prefix:<6}{step:>6}"]
    for _, width, name, style in _COLUMNS:
        value = logs.get(f"{prefix}_{name}" if prefix else name)
        if value is not None and style == "{:d}":
            value = int(value)
        cells.append(f"{'' if value is None else style.format(value):>{width}}")
    if logs.get("tr/skipped_steps"):
        cells.append(f"  skipped {int(logs['tr/skipped_steps'])}")
    return "".join(cells).rstrip()


def figures(logs: dict[str, Any]) -> str:
    """The three numbers beside the bar."""
    shown = {"loss": _COLUMNS[0], "margin": _COLUMNS[1], "accuracy": _COLUMNS[2]}
    found = [(n, c[3], logs[c[2]]) for n, c in shown.items() if c[2] in logs]
    return "  ".join(f"{name} {style.format(value)}" for name, style, value in found)


def next_move(step: int, every: float, frozen: bool, last: int) -> str:
    """When the reference moves next, after a step."""
    if frozen:
        return "reference frozen"
    due = (step // int(every) + 1) * int(every)
    return f"reference moves at {due}" if due <= last else "no more moves"


class Show(TrainerCallback):
    """The bar and the table of a run; in other processes than the first it is silent.

    Args:
        trainer: whose callbacks of transformers it takes the place of.
        bar: of `make_bar`.
        write: prints a line, past the bar.
    """

    def __init__(self, trainer: Any, bar: Any, write: Callable[[str], None]) -> None:
        self.reference, self.bar, self.write = trainer.reference, bar, write
        self._figures = ""
        self._evaluated = 0
        self.seen = 0
        if isinstance(self.reference, WindowedReference):
            self.reference.make_bar = self._window_bar
        for theirs in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.seen = state.num_input_tokens_seen  # before this start of the run
        if state.is_world_process_zero:
            self.write(header())
            self.bar.start(state.max_steps, state.global_step)
            self._show(state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._show(state)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._figures = figures(logs)
            self.write(row(state.global_step, logs))
            self._show(state)
        elif "eval_loss" in logs:
            self._evaluated = 0
            self.write(row(state.global_step, logs, "eval"))
            self._show(state)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        self._evaluated += 1
        with contextlib.suppress(TypeError):  # a stream has no length
            self.bar.show(None, f"evaluation {self._evaluated}/{len(eval_dataloader or ())}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()

    def _show(self, state: Any) -> None:
        schedule = self.reference.schedule
        move = next_move(state.global_step, schedule.every, schedule.is_frozen, state.max_steps)
        self.bar.show(state.global_step, "  ".join(t for t in (self._figures, move) if t))

    @contextlib.contextmanager
    def _window_bar(self, desc: str = "", total: int | None = None, **_: Any) -> Iterator[Any]:
        yield _Sweep(self.bar, desc, total)


class _Sweep:
    """A sweep of the reference, in the run's bar."""

    def __init__(self, bar: Any, desc: str, total: int | None) -> None:
        self.bar, self.desc, self.total, self.done = bar, desc, total, 0

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.total is not None:
            self.bar.show(None, f"{self.desc} {self.done}/{self.total}")


# --- bars -----------------------------------------------------------------------------------------


class NoBar:
    def start(self, total: int, done: int) -> None: ...
    def show(self, done: int | None, text: str) -> None: ...
    def close(self) -> None: ...


class RichBar(NoBar):
    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.console = Console(file=stream)
        self.progress = Progress(
            BarColumn(None), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"),
            console=self.console, transient=True,
        )  # fmt: skip
        self.task: Any = None

    def start(self, total: int, done: int) -> None:
        self.progress.start()
        self.task = self.progress.add_task("", total=total, completed=done)

    def show(self, done: int | None, text: str) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done, description=text)

    def write(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


class TqdmBar(NoBar):
    def __init__(self, stream: Any) -> None:
        self.stream, self.bar = stream, None

    def start(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, initial=done, file=self.stream, dynamic_ncols=True, leave=False
        )

    def show(self, done: int | None, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(0 if done is None else done - self.bar.n)

    def write(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def make_bar(wanted: bool = True) -> tuple[Any, Callable[[str], None]]:
    """(the bar, what prints a line past it) for the streams of this process.

    Args:
        wanted: False: no bar, whatever the terminal.
    """
    stream = next((s for s in (sys.stdout, sys.stderr) if s.isatty()), None)
    if not wanted or stream is None:
        return NoBar(), lambda line: print(line, flush=True)
    bar = RichBar(stream) if find_spec("rich") else TqdmBar(stream)
    if stream is sys.stdout:
        return bar, bar.write
    return bar, lambda line: print(line, file=sys.stdout, flush=True)


def show(trainer: Any) -> Show:
    """Puts the bar and the table into a trainer, in the place of those of transformers."""
    from transformers.utils import logging

    bar, write = make_bar(not trainer.args.disable_tqdm and trainer.is_world_process_zero())
    logging.disable_progress_bar()  # one for every checkpoint's files
    return Show(trainer, bar, write)
