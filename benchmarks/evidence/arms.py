"""What the sentiment experiment compares, and where its finished parts are kept.

Every arm has the settings of its experiment and differs in loss, schedule of the reference, β and
seed alone. Nothing was tuned for any arm: the data are those of `make demo`, the learning rate is
constant and large enough to come far from the start in a CPU's time, and every schedule of a loss
shares one β. Only the frozen arms get further values of it, smaller ones, so that they come as far
from the start as the moving ones do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 2  # of what is kept: raised when the experiment's code changes its numbers

# β of all schedules, and further ones of the frozen reference. IPO's log-probs are per token
# (TRL's and the trainer's default): its target 1/(2β) is a gap in nats per token.
BETAS: dict[str, tuple[float, ...]] = {
    "dpo": (0.1, 0.03, 0.01),
    "ipo": (1.0, 0.3, 0.1),
    "kto": (0.1, 0.03, 0.01),
}


@dataclass(frozen=True)
class Settings:
    """The same for all arms of an experiment; as they stand, those of the full run.

    36 arms of these take about two hours on two CPU cores.
    """

    steps: int = 40
    pairs: int = 2  # in an optimizer step; KTO takes the same completions, unpaired
    learning_rate: float = 5e-5
    warmup_steps: int = 4
    every: int = 8  # τ of the hard and of the hybrid schedule
    max_length: int = 80  # tokens of a prompt (about 42) and a completion
    measure_every: int = 10
    prompts: int = 16  # held out; each is answered by two fresh samples
    new_tokens: int = 32
    held_out: int = 16  # pairs

    def schedule(self, name: str) -> dict[str, Any]:
        """Fields of `TRConfig`."""
        return {
            "frozen": {"sync_ref_model": False},
            "soft": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1},
            "hard": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": self.every},
            "hybrid": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": self.every},
        }[name]


@dataclass(frozen=True)
class Arm:
    loss: str
    schedule: str
    beta: float
    seed: int

    def __str__(self) -> str:
        return f"{self.loss} {self.schedule} β={self.beta:g} seed {self.seed}"


FULL = Settings()
# Minutes on two CPU cores.
QUICK = Settings(steps=24, warmup_steps=2, max_length=72, measure_every=8, new_tokens=24)


def full_arms(seeds: int = 2) -> list[Arm]:
    """Seed by seed, so that a run that is cut short has whole comparisons."""
    return [
        Arm(loss, schedule, beta, seed)
        for seed in range(seeds)
        for loss, betas in BETAS.items()
        for schedule in ("frozen", "soft", "hard", "hybrid")
        for beta in (betas if schedule == "frozen" else betas[:1])
    ]


def quick_arms(seeds: int = 1) -> list[Arm]:
    beta = BETAS["dpo"][0]
    return [Arm("dpo", s, beta, seed) for seed in range(seeds) for s in ("frozen", "soft", "hard")]


def cached(folder: Path, config: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make()` returned when it was last called with this configuration, from a file.

    The file's name is a hash of the configuration. It is moved into its place when it is whole: a
    run that was killed leaves nothing that the next one would take for a result.
    """
    config = {"format": FORMAT, **config}
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text())["result"]
    text = json.dumps({"config": config, "result": make()}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
    return json.loads(text)["result"]  # as it will be read: tuples are lists
