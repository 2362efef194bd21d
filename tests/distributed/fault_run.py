"""What every process of `tests/distributed/test_faults.py` runs.

    torchrun --nproc_per_node 2 -m tests.distributed.fault_run FOLDER [FAULT]

FAULT is what goes wrong in process 1: "dies" at its fifth step, unless torchrun has started it
again; "version" or "rows" differ from those of process 0; its "file" has nothing; it is "slow".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

from transformers import TrainerCallback

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tests.training.distributed_run import HARD, rows_of
from tests.training.test_trainer import make
from tralign_fast.distributed import alike, pace

SNAPSHOT = {"reference": "snapshot", **HARD}
RANK = int(os.environ.get("RANK", "0"))


class Dies(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if RANK == 1 and state.global_step == 4 and not again:
            os.kill(os.getpid(), signal.SIGKILL)


class Clock:
    """Time that a busy machine does not stretch: 1 ms passes at each look."""

    now = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        self.wait(0.001)
        return self.now


def train(folder: Path, batch: int, fault: str = "", resume: str | bool | None = None) -> list:
    rows = rows_of("dpo")
    if RANK == 1 and fault == "version":
        alike._version = lambda name: version(name) + ("+other" if name == "transformers" else "")
    elif RANK == 1 and fault == "rows":
        rows = rows.select(range(20))
    elif RANK == 1 and fault == "file":
        rows = rows.select([])
    tokenizer = make_small_tokenizer()
    trainer = make(
        make_tiny_llama(tokenizer), tokenizer, folder, "dpo", rows, max_steps=6,
        per_device_train_batch_size=batch, save_strategy="steps",
        save_steps=3, **({**HARD, "reference": "resident"} if fault == "slow" else SNAPSHOT),
    )  # fmt: skip
    clock = Clock()
    if fault == "slow":
        pace.time = clock  # pyright: ignore[reportAttributeAccessIssue]
    if RANK == 1 and fault == "slow":
        collate = trainer.data_collator
        trainer.data_collator = lambda examples: (clock.wait(0.3), collate(examples))[1]
    if fault == "dies":
        trainer.add_callback(Dies())
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    into = Path(sys.argv[1])
    found = train(into, 2, *sys.argv[2:])
    if RANK == 0:
        (into / "losses.json").write_text(json.dumps(found))
