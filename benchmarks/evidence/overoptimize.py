"""Preferences of people, long enough to overoptimize: one arm, and all of them in turn.

An arm is `TRTrainer` as anybody uses it. It is measured at fixed steps; every measured point is
written when it is made, and checkpoints let a killed arm go on between them: the numbers are those
of an arm that nobody killed.
"""

from __future__ import annotations

import copy
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.common import commit
from benchmarks.evidence.cache import key_of, read_json, write_json
from benchmarks.evidence.overoptimize_arms import Arm, Settings
from benchmarks.evidence.overoptimize_material import Material, load_material
from benchmarks.evidence.overoptimize_measure import Diverged, Gauge, turning_point
from benchmarks.evidence.training import make_trainer
from tralign_fast import TRTrainer

Result = dict[str, Any]


class _Watch(TrainerCallback):
    """Measures, keeps the points on disk, saves, and stops the arm when time is up."""

    def __init__(
        self, gauge: Gauge, arm: Arm, settings: Settings, path: Path, points: list[dict[str, Any]],
        deadline: float | None,
    ) -> None:  # fmt: skip
        self.gauge, self.arm, self.settings, self.path = gauge, arm, settings, path
        self.points, self.deadline = points, deadline

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # points after the checkpoint are made again, and come out the same
        self.points[:] = [p for p in self.points if p["step"] <= state.global_step]
        last = self.points[-1]
        self._began = time.perf_counter() - last["seconds"]
        self._cpu_began = time.process_time() - last["cpu_seconds"]

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        step = state.global_step
        if step % self.settings.measure_every == 0 or step == state.max_steps:
            point = {"step": step, **self.gauge(model, self.points[0])}
            point["seconds"] = time.perf_counter() - self._began  # measuring included
            point["cpu_seconds"] = time.process_time() - self._cpu_began
            self.points.append({**point, "lag": None, "loss": None})
            control.should_log = True
        control.should_save = step % self.settings.save_every == 0
        if self.deadline is not None and time.time() > self.deadline and step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        point = self.points[-1]
        if logs and point["step"] == state.global_step and "loss" in logs:
            # rewards are β·ρ: the mean Δ to the reference as it was at each step
            point["lag"] = logs.get("rewards/margins", float("nan")) / self.arm.beta
            point["loss"] = logs["loss"]
            write_json(self.path, self.points)


def run_arm(arm: Arm, material: Material, root: Path, deadline: float | None = None) -> Result:
    """Trains and measures one arm, or goes on with it; from `root` where it is finished.

    Returns:
        points: a dict (`Gauge`) for the start and every measured step; totals; finished: False
        where the deadline came first; diverged: why the arm ended early, or None.
    """
    done = _file_of({"arm": asdict(arm)}, material, root)
    if (found := read_json(done)) is not None:
        return found
    folder = done.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(arm, material, folder / "run")
    gauge = Gauge(copy.deepcopy(trainer.model), material, arm.pairs, arm.seed)
    points = read_json(folder / "points.json")
    start = _start(gauge, arm, material, root)
    if not points:
        points = [{"step": 0, **start, "seconds": 0.0, "cpu_seconds": 0.0,
                   "lag": 0.0, "loss": None}]  # fmt: skip
        write_json(folder / "points.json", points)
    watch = _Watch(gauge, arm, material.settings, folder / "points.json", points, deadline)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    resume = any((folder / "run").glob("checkpoint-*"))
    diverged = None
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except Diverged as error:
        diverged = str(error)
    except ValueError as error:  # what the trainer says of steps without a finite gradient
        if "finite" not in str(error):
            raise
        diverged = str(error).splitlines()[0]
    result = {
        "arm": asdict(arm),
        "points": points,
        "diverged": diverged,
        "material": material.facts.get("policy", ""),
        "finished": diverged is not None or trainer.state.global_step >= material.settings.steps,
        "totals": {
            "seconds": points[-1]["seconds"],
            "cpu_seconds": points[-1]["cpu_seconds"],
            "reference": trainer.reference.name,
            "device": _device_name(material.device),
            "commit": commit(),
        },
    }
    if result["finished"]:
        write_json(done, result)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _start(gauge: Gauge, arm: Arm, material: Material, root: Path) -> dict[str, Any]:
    """The initial policy's figures, measured by the first arm of these pairs and seed."""
    path = _file_of({"start": [arm.pairs, arm.seed]}, material, root)
    found = read_json(path)
    if found is None:
        figures = gauge(gauge.initial)
        found = {"figures": figures, "margins": gauge.start_margins}
        write_json(path, found)
    gauge.start_margins = found["margins"]
    return found["figures"]


def _file_of(what: dict[str, Any], material: Material, root: Path) -> Path:
    """Where a finished result is; what an arm makes on the way lies in a folder of its stem."""
    config = {**what, "material": material.folder.name, "settings": asdict(material.settings)}
    return root / f"{next(iter(what))}-{key_of(config)}.json"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _trainer(arm: Arm, material: Material, folder: Path) -> TRTrainer:
    settings = material.settings
    return make_trainer(
        arm, settings, arm.reference(), material.policy(), material.tokenizer,
        material.pairs[arm.pairs], folder, "_ids",
        # of an arm that was killed before its first checkpoint
        overwrite_output_dir=not any(folder.glob("checkpoint-*")),
        bf16=settings.bf16,
        use_cpu=material.device == "cpu",
        logging_steps=settings.steps,  # the callback asks for a log at every measured step
        logging_first_step=False,
        save_strategy="steps",
        save_steps=settings.steps,  # … and for checkpoints
        save_total_limit=1,
        disable_tqdm=True,
    )  # fmt: skip


_material = functools.lru_cache(load_material)  # of a worker: read once for all its arms


def _in_worker(
    arm: Arm, source: str, settings: Settings, root: Path, device: str, deadline: float | None
) -> Result:
    torch.set_num_threads(1)
    return run_arm(arm, _material(source, settings, root, device), root, deadline)


def facts(source: str, settings: Settings, root: Path, device: str) -> dict[str, Any]:
    """Of the material: sizes of its parts, accuracies of the golds."""
    return load_material(source, settings, root, device).facts


def in_a_line(result: Result) -> str:
    """Where an arm turned over and where it ended, or why it ended early."""
    best, last = turning_point(result["points"]), result["points"][-1]
    ended = "" if result["finished"] else ", not finished"
    text = (
        f"gold {best['height']:.2f} at step {best['step']} and KL {best['kl']:.1f}, "
        f"{last['gold']:.2f} at step {last['step']} and KL {last['kl']:.1f}{ended}"
    )
    return f"{text}; diverged: {result['diverged']}" if result["diverged"] else text


def run(
    arms: Sequence[Arm],
    source: str,
    settings: Settings,
    root: Path,
    device: str,
    workers: int = 1,
    deadline: float | None = None,
    load: Callable[..., Material] = load_material,
) -> Iterator[tuple[Arm, Result]]:
    """Every arm with its result as it ends; those that have theirs come first and cost nothing.

    On a card several arms run at once, each in a process of its own: steps of so small a model
    leave most of it idle. An arm that stops by an error of its own is named, and the others go on.

    Raises:
        ValueError: what `load_material` refuses; a process that was killed, or lost its card.
    """
    material = load(source, settings, root, device)  # made once, before any worker needs it
    left = []
    for arm in arms:
        if (found := read_json(_file_of({"arm": asdict(arm)}, material, root))) is not None:
            yield arm, found
        else:
            left.append(arm)
    if workers <= 1:
        for arm in left:
            if deadline is not None and time.time() > deadline:
                return
            yield arm, run_arm(arm, material, root, deadline)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[Result], Arm] = {
            pool.submit(_in_worker, arm, source, settings, root, device, deadline): arm
            for arm in left
        }
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                arm = waiting.pop(future)
                if (error := future.exception()) is None:
                    yield arm, future.result()
                elif isinstance(error, BrokenProcessPool):
                    raise ValueError(
                        f"a process ended in mid-arm ({arm}, or another of its time); finished "
                        "arms and checkpoints are kept: the same command goes on"
                    ) from error
                else:  # its checkpoints are kept; the other arms go on
                    said = (str(error).splitlines() or [""])[0]
                    print(f"{arm}: stopped: {type(error).__name__}: {said}", file=sys.stderr)
            if deadline is not None and time.time() > deadline:
                for future in [f for f in waiting if f.cancel()]:
                    del waiting[future]


def records(results: dict[Arm, Result]) -> list[dict[str, Any]]:
    """CSV rows: one for each measured step of each arm."""
    left_out = ("samples", "golds", "checks")
    return [
        {
            **asdict(arm), "schedule": arm.schedule,
            **{
                "train_loss" if key == "loss" else key: value  # `loss` is the arm's
                for key, value in point.items() if key not in left_out
            },
            "diverged": result["diverged"] or "",
            **{f"total_{key}": value for key, value in result["totals"].items()},
        }
        for arm, result in results.items()
        for point in result["points"]
    ]  # fmt: skip
