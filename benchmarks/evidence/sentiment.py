"""Controlled sentiment with SmolLM2-135M-Instruct: what an arm does, and all of them in turn.

The rows are the demo's (the model's own samples, ranked by VADER), the gold reward is VADER, and an
arm is `TRTrainer` as anybody uses it: packed batches, prompts computed once, reference="auto". An
arm runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from benchmarks.common import commit
from benchmarks.evidence.arms import Arm, Settings, cached
from benchmarks.evidence.measure import Gauge
from benchmarks.evidence.training import make_trainer


@dataclass
class Material:
    """What an arm starts from."""

    model: Any
    tokenizer: Any
    train_rows: list[dict[str, Any]]
    test_rows: list[dict[str, Any]]
    gold: Callable[[str], float]


def load_material() -> Material:
    from tralign_fast.demo.rows import test_rows, train_rows
    from tralign_fast.demo.run import gold_reward
    from tralign_fast.demo.smollm2 import load_smollm2

    return Material(*load_smollm2(), train_rows(), test_rows(), gold_reward())


class _Measure(TrainerCallback):
    """Points of an arm's curve, and the time that they took: wall clock and CPU, seconds."""

    def __init__(self, gauge: Gauge, every: int) -> None:
        self.gauge, self.every = gauge, every
        self.points: list[dict[str, Any]] = []
        self.seconds = self.cpu_seconds = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            started, cpu_started = time.perf_counter(), time.process_time()
            self.points.append({"step": state.global_step, **self.gauge(model)})
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu_started


def run_arm(
    arm: Arm, settings: Settings, folder: Path, load: Callable[[], Material] = load_material
) -> dict[str, Any]:
    """Trains and measures one arm. What it shares with other arms, the start, is kept in `folder`.

    Returns:
        points: a dict (`Gauge`) for the start and for every measured step; totals: steps, tokens,
        seconds, peak memory, the place of the reference.
    """
    material = load()
    prompts = {row["prompt"][-1]["content"]: row["prompt"] for row in material.test_rows}
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(
            arm, settings, settings.schedule(arm.schedule), material.model, material.tokenizer,
            material.train_rows, output_dir,
            bf16=False,  # the same numbers on every device
            logging_steps=settings.measure_every,
            save_strategy="no",
        )  # fmt: skip
        gauge = Gauge(
            copy.deepcopy(trainer.model), material.tokenizer, list(prompts.values()),
            material.test_rows, material.gold, settings, arm.seed,
        )  # fmt: skip
        start = cached(
            folder,
            {"start": arm.seed, "settings": asdict(settings)},
            lambda: gauge(gauge.initial),
        )
        measure = _Measure(gauge, settings.measure_every)
        trainer.add_callback(measure)
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = time.perf_counter() - started - measure.seconds
        cpu_seconds = time.process_time() - cpu_started - measure.cpu_seconds
    return {
        "points": [{"step": 0, **start}, *measure.points],
        "totals": {
            "steps": settings.steps,
            "tokens": trainer.state.num_input_tokens_seen,
            "train_s": seconds,
            "train_cpu_s": cpu_seconds,  # a busy machine does not lengthen it
            "measure_s": measure.seconds,
            "peak_memory_mb": _peak_memory_mb(),
            "reference": trainer.reference.name,
            "device": str(trainer.args.device),
            "threads": torch.get_num_threads(),
            "commit": commit(),  # an arm may be older than the run that finds it in the cache
        },
    }


def _peak_memory_mb() -> float:
    """Of the accelerator where there is one, else of this process; MiB, models included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    from tralign_fast.demo.run import peak_memory_gib

    return peak_memory_gib() * 2**10


def in_own_process(arm: Arm, settings: Settings, folder: Path) -> dict[str, Any]:
    """`run_arm` in a fresh interpreter; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_arm, arm, settings, folder).result()


def run(
    arms: Sequence[Arm],
    settings: Settings,
    folder: Path,
    execute: Callable[[Arm, Settings, Path], dict[str, Any]] = in_own_process,
    on_result: Callable[[dict[Arm, dict[str, Any]]], None] = lambda results: None,
) -> dict[Arm, dict[str, Any]]:
    """All arms in turn; those that `folder` has already cost nothing.

    `on_result` is given all results so far after each arm: a long run may be cut short.
    """
    results: dict[Arm, dict[str, Any]] = {}
    with tqdm(arms, desc="sentiment", unit="arm") as progress:
        for arm in progress:
            progress.set_postfix_str(str(arm))
            config = {"arm": asdict(arm), "settings": asdict(settings)}
            results[arm] = cached(folder, config, lambda arm=arm: execute(arm, settings, folder))
            on_result(results)
    return results


def records(results: dict[Arm, dict[str, Any]]) -> list[dict[str, Any]]:
    """CSV rows, one for each measured step of each arm; totals are the whole arm's."""
    return [
        {
            **asdict(arm),
            **{key: value for key, value in point.items() if key != "samples"},
            **{f"total_{key}": value for key, value in result["totals"].items()},
        }
        for arm, result in results.items()
        for point in result["points"]
    ]
