"""What a run leaves behind beside its model: config.yaml, summary.json, samples.json and the logs
in trainer_state.json, read again as a `RunRecord`."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG, SUMMARY, SAMPLES, STATE = (
    "config.yaml", "summary.json", "samples.json", "trainer_state.json"
)  # fmt: skip
_PACKAGES = ("tralign-fast", "torch", "triton", "transformers", "accelerate", "peft")


@dataclass
class RunRecord:
    """A run as its folder has it; what is not there is empty."""

    folder: Path
    name: str
    history: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)

    @property
    def moves(self) -> list[int]:
        """Steps after which the reference moved."""
        every = self.summary.get("every") or 0
        last = max((log.get("step", 0) for log in self.history), default=0)
        return list(range(every, last + 1, every)) if every and self.summary.get("alpha") else []


def read_run(folder: str | Path) -> RunRecord:
    """The run in a folder, also one that was stopped: then of its newest checkpoint.

    Raises:
        ValueError: no such folder, or none of a run.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that tralign-fast train wrote")
    states = [path / STATE, *sorted(path.glob(f"checkpoint-*/{STATE}"), key=_step, reverse=True)]
    state = next((file for file in states if file.is_file()), None)
    if state is None:
        raise ValueError(
            f"{folder}: no run: expected {STATE} or checkpoints, as tralign-fast train writes them"
        )
    saved = _json(state)
    config = {}
    if (path / CONFIG).is_file():
        config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")) or {}
    summary = _json(path / SUMMARY) if (path / SUMMARY).is_file() else _sparse(config, saved)
    samples = _json(path / SAMPLES) if (path / SAMPLES).is_file() else []
    return RunRecord(path, path.name, saved.get("log_history", []), config, summary, samples)


def _step(file: Path) -> int:
    number = file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); it is written by a run's end") from None


def _sparse(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run that has not ended."""
    every = config.get("ref_model_sync_steps") or 0
    every = every if every >= 1 else -(-every * saved.get("max_steps", 0) // 1)
    moving = config.get("sync_ref_model", True)
    return {
        "steps": saved.get("global_step"), "alpha": config.get("ref_model_mixup_alpha", 0),
        "every": int(every) if moving else 0, "unfinished": True,
    }  # fmt: skip


def summary_of(trainer: Any, options: Any, seconds: float, seen: int) -> dict[str, Any]:
    """The figures of a run that has ended.

    Args:
        seconds: of training, evaluations and checkpoints included.
        seen: tokens that were trained on before this start of the run, in this process.
    """
    config, state, schedule = trainer.args, trainer.state, trainer.reference.schedule
    history = state.log_history
    train = next((log for log in reversed(history) if "loss" in log), {})
    held_out = next((log for log in reversed(history) if "eval_loss" in log), {})
    tokens = trainer._tokens_seen()
    share = 1 - seen / max(1, state.num_input_tokens_seen)
    moving = not schedule.is_frozen
    return {
        "method": ("TR-" if moving else "") + config.objective.title,
        "model": options.model,
        "dataset": options.dataset,
        "eval_dataset": options.eval_dataset,
        "adapter": "lora" if getattr(trainer.model, "peft_config", None) else None,
        "train_rows": _length(trainer.train_dataset),
        "steps": state.global_step,
        "alpha": schedule.alpha if moving else 0,
        "every": int(schedule.every) if moving else 0,
        "moves": state.global_step // int(schedule.every) if moving else 0,
        "reference": trainer.reference.name,
        "beta": config.objective.beta,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "train": {k: v for k, v in train.items() if k not in ("step", "epoch")},
        "held_out": {k: v for k, v in held_out.items() if k not in ("step", "epoch")},
        "tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens * share / max(seconds, 1e-9),
        "processes": config.world_size,
        **memory(),
        "device": device_name(config.device),
        "versions": versions(),
        "ended": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _length(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:  # a stream
        return None


def memory() -> dict[str, float]:
    """GiB: tensors' peak on the GPU, and the process's on the host."""
    from tralign_fast.demo.run import peak_memory_gib

    found = {"peak_host_gib": peak_memory_gib()}
    if torch.cuda.is_available():
        found["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or device.type


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    file.write_text(text + "\n", encoding="utf-8")
