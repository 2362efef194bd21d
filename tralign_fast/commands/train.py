"""`tralign-fast train`: from options to a run, its model, its card and its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tralign_fast.command_line import Given
from tralign_fast.commands.progress import show
from tralign_fast.commands.report import finish
from tralign_fast.commands.resolved import recipe_of
from tralign_fast.commands.samples import Samples
from tralign_fast.training.option_types import shown as brief
from tralign_fast.training.train_options import (
    TrainOptions,
    adapter_of,
    columns_given,
    loading_of,
    quantization_of,
)

# evaluations of a run to which a set is given, and nothing said of when
EVALUATIONS = 10


def run_train(arguments: list[str]) -> int:
    """Trains as the options say; returns the exit code.

    Raises:
        ValueError: options, rows or a model that cannot be.
    """
    from tralign_fast.commands import launch
    from tralign_fast.training.config import TRConfig

    launch.quieten_other_ranks()
    given = Given("train", [TrainOptions, TRConfig], arguments)
    _follow(given)
    if launch.is_asked_for(given.num_processes, given.parallel):
        return launch.launch(given.num_processes or 1, given.parallel or "ddp", arguments)
    launch.check_processes(given.num_processes, given.parallel)
    for name, value in launch.options_of(given.parallel).items():
        given.default(name, value)
    options, config = given.built()
    return _run(options, config)


def _follow(given: Given) -> None:
    """Defaults that other options decide: an evaluation set is evaluated on."""
    if given.eval_dataset is None and "eval_split" in given.names:
        given.default("eval_dataset", given.dataset)
    if given.eval_dataset is not None:
        if "eval_strategy" not in given.names:
            given.default("eval_steps", 1 / EVALUATIONS)
        given.default("eval_strategy", "steps")


def _run(options: TrainOptions, config: Any) -> int:
    from tralign_fast import TRTrainer
    from tralign_fast.training.checkpoints import check_output_dir, check_writable
    from tralign_fast.training.option_conflicts import check_evaluation, check_trackers
    from tralign_fast.training.runs import resume_of

    # before hours of loading
    checkpoint = checkpoint_of(options.resume, config.resume_from_checkpoint)
    check_trackers(config.report_to)
    check_evaluation(config, options.eval_dataset)
    check_writable(config.output_dir)
    bits, adapter = quantization_of(options), adapter_of(options)
    config.model_init_kwargs = loading_of(options, config)
    goes_on = resume_of(Path(config.output_dir or "."), checkpoint)
    if not goes_on and not config.overwrite_output_dir:
        check_output_dir(config.output_dir)
    rows, held_out = load_sets(options)
    trainer = TRTrainer(
        options.model, args=config, train_dataset=rows, eval_dataset=held_out,
        peft_config=adapter, quantization_config=bits,
    )  # fmt: skip
    recipe = recipe_of(options, config)  # of all processes' arguments the first one's are written
    samples = Samples(trainer, options)
    shown = show(trainer)
    samples.take("before")
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        shown.bar.close()
    seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.create_model_card()
    samples.take("after")
    if line := finish(trainer, options, recipe, samples.rows, seconds, shown.seen):
        shown.write(line)
    return 0


def load_sets(options: Any) -> tuple[Any, Any]:
    """(rows to train on, held-out rows or None), under the library's names of columns.

    Raises:
        ValueError: no such rows, or no such columns.
    """
    from tralign_fast.data import load_rows

    columns = columns_given(options.columns)
    rows = load_rows(options.dataset, options.dataset_split, options.dataset_config)
    rows = renamed(rows, columns, options.dataset)
    if not options.eval_dataset:
        return rows, None
    same = options.eval_dataset == options.dataset
    config = options.dataset_config if same else None
    held_out = load_rows(options.eval_dataset, options.eval_split, config)
    if same or {*columns.values()} <= {*held_out.column_names}:
        held_out = renamed(held_out, columns, options.eval_dataset)
    return rows, held_out


def renamed(rows: Any, columns: dict[str, str], source: str) -> Any:
    """The rows with columns under other names; a column whose name is taken over goes.

    Raises:
        ValueError: there is no such column.
    """
    changes = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    for theirs in columns.values():
        if theirs not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise ValueError(f"columns: {source} has no column {brief(theirs)}; found {found}")
    if not changes:
        return rows
    replaced = [name for name in changes.values() if name in rows.column_names]
    return rows.remove_columns([n for n in replaced if n not in changes]).rename_columns(changes)


def checkpoint_of(resume: bool, given: str | bool | None) -> str | bool | None:
    """What to go on from: a folder, True for the newest whole checkpoint, "auto" for that one if
    there is any, None for nothing."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    named = words.get(given.lower(), given) if isinstance(given, str) else given
    if resume and named is False:
        raise ValueError("resume: expected one answer, got true, and resume_from_checkpoint false")
    if isinstance(named, str) and named != "auto" and not Path(named).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: expected true, auto or a checkpoint's folder, got {named!r}"
        )
    return named or (True if resume else None)
