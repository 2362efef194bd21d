"""How long a save blocks training, with `async_save` and without, in one run and in turn.

    python -m benchmarks.saving [--saves 7] [--hidden 512] [--layers 4]
    torchrun --nproc_per_node 2 -m benchmarks.saving --layout fsdp2-shards    # or fsdp2, ddp

A Llama with random weights, AdamW, a resident reference; every other save is written in the
background. Printed are, of each kind, the medians of the seconds that `_save_checkpoint` takes and
of the steps until the next save, and their ratios. No save waits for another: the one before is
waited for beside the clock. The first of each kind is a warm-up, in which buffers are made.

The gate: both kinds write files of the same names and sizes.

On CPUs the thread that writes takes its time from the training, and FSDP2 is opened as the tests
open it; both are otherwise what runs on GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import environment, format_table
from benchmarks.kill import make_rows, make_tokenizer
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.memory.one_rank import sharding_on_cpus

BETWEEN = 4  # steps from one save to the next
OWN = ("training_args.bin", "trainer_state.json", "manifest.json")  # of a time, or of a step
SHARDED = {"fsdp2": "FULL_STATE_DICT", "fsdp2-shards": "SHARDED_STATE_DICT"}
LAYOUTS = ("ddp", *SHARDED)


class Measured(TRTrainer):
    """Saves in the background in turn, and takes the times."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.blocked: dict[bool, list[float]] = {False: [], True: []}
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        self.files: dict[bool, dict[str, int]] = {}
        self._later = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._await_writing()
        self.accelerator.wait_for_everyone()
        background, self._later = self._background, not self._later
        self._background = background if self._later else None
        before = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.blocked[self._later].append(time.perf_counter() - before)
        self._background = background

    def _await_writing(self) -> None:
        super()._await_writing()
        last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step - BETWEEN}"
        if last.exists():
            self.files[self._later] = {
                str(path.relative_to(last)): path.stat().st_size
                for path in last.rglob("*")
                if path.is_file() and path.name not in OWN
            }

    def training_step(self, *args: Any, **options: Any) -> Any:
        before = time.perf_counter()
        loss = super().training_step(*args, **options)
        if self.blocked[False]:
            self.steps[self._later].append(time.perf_counter() - before)
        return loss


def run(layout: str, saves: int, hidden: int, layers: int, folder: Path) -> Measured:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16 * hidden, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    extra: dict[str, Any] = {}
    if layout in SHARDED:
        extra = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": SHARDED[layout],
            },
        }  # fmt: skip
    args = TRConfig(
        output_dir=str(folder), max_steps=2 * saves * BETWEEN + 1, save_strategy="steps",
        save_steps=BETWEEN, save_total_limit=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=not torch.cuda.is_available(), reference="resident", ref_model_sync_steps=8,
        async_save=True, disable_tqdm=True, logging_steps=1000, gradient_checkpointing=False,
        **extra,
    )  # fmt: skip
    trainer = Measured(
        LlamaForCausalLM(config), args=args, train_dataset=make_rows("dpo"),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="ddp")
    parser.add_argument("--saves", type=int, default=7, help="of each kind")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    args = parser.parse_args(arguments)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with contextlib.ExitStack() as stack:
        if args.layout in SHARDED and not torch.cuda.is_available():
            stack.enter_context(sharding_on_cpus())
        own = stack.enter_context(tempfile.TemporaryDirectory())
        folder = args.folder or Path(os.environ.get("TRALIGN_SAVING", own))
        trainer = run(args.layout, args.saves, args.hidden, args.layers, folder)
        if not trainer.is_world_process_zero():
            return
        assert trainer.files[False] == trainer.files[True], trainer.files
        blocked, steps = (
            {kind: median(times[1:]) for kind, times in found.items()}
            for found in (trainer.blocked, trainer.steps)
        )
        rows = [
            ["waits", f"{blocked[False]:.3f}", f"{steps[False]:.3f}", "", ""],
            [
                "async_save", f"{blocked[True]:.3f}", f"{steps[True]:.3f}",
                f"{blocked[True] / blocked[False]:.2f}", f"{steps[True] / steps[False]:.2f}",
            ],
        ]  # fmt: skip
        size = sum(trainer.files[True].values()) / 2**20
        print(f"{args.layout}, {processes} processes, {size:.0f} MiB a checkpoint, {args.saves} of")
        print("each kind;", ", ".join(f"{k} {v}" for k, v in environment().items()))
        print(format_table(["save", "blocked, s", "a step after it, s", "ratio", "ratio"], rows))


if __name__ == "__main__":
    main()
