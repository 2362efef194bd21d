"""What each of several processes runs for `tests/memory/test_ranks.py`.

    torchrun --nproc_per_node 2 -m tests.memory.ranks_run FOLDER CASE...

Writes FOLDER/memory-RANK.json: case -> what was alive at the peak of real steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from transformers import LlamaConfig

from tralign_fast.memory import Workload
from tralign_fast.memory.trace import count_training, traced

HARD = {"ref_model_mixup_alpha": 1.0}
RELEASE = {**HARD, "gradient_release": True, "max_grad_norm": 0.0}


def tiny(**extra: Any) -> LlamaConfig:
    """Rows that neither 2 nor 4 divides, and weights that outweigh activations."""
    return LlamaConfig(**{
        "vocab_size": 3001, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **extra,
    })  # fmt: skip


def work(**fields: Any) -> Workload:
    return Workload(**{"model": tiny(), "tokens": 64, "pairs": 2, "options": HARD, **fields})


CASES = {
    "adamw": work(),
    "mixed": work(dtype="float32"),  # fp32 weights, gathered and computed with in bf16
    "release-adafactor": work(options={**RELEASE, "optim": "adafactor"}),
    "release-adamw": work(options={**RELEASE, "optim": "adamw_torch_fused"}),
    "resident": work(options={"reference": "resident"}),
    "offloaded": work(options={"reference": "offloaded"}),
    "kto": work(options={**HARD, "loss_type": "kto"}),
    "lora": work(lora_rank=4, options={**HARD, "gradient_checkpointing": False}),
    "lora-mixed": work(
        lora_rank=4, lora_dtype="float32", options={"reference": "adapter", "bf16": True}
    ),
    "tied": work(model=tiny(tie_word_embeddings=True)),
    "longer": work(tokens=1024, options={**HARD, "logits_budget_mb": 1}),
}  # fmt: skip


@contextlib.contextmanager
def as_nccl(live: Any) -> Iterator[None]:
    """Inside, nothing is seen of two habits of gloo's: a thread of it holds a collective's tensors
    for a moment after it has ended, and it reduces a copy of what it scatters."""

    def let_go(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with live.paused():
                work = function(*args, **kwargs)
            time.sleep(0.005)
            return work

        return call

    names = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
             "reduce_scatter_tensor", "all_reduce")  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name in names:
            if hasattr(dist, name):  # torch 2.13 has new names, and warns of the older ones
                stack.enter_context(mock.patch.object(dist, name, let_go(getattr(dist, name))))
        yield


def main(folder: Path, cases: list[str]) -> None:
    found = {}
    for case in cases:
        own = dataclasses.replace(CASES[case], gpus=int(os.environ["WORLD_SIZE"]))
        with traced(own, as_on_gpu=False, fake=False) as (live, trainer), as_nccl(live):
            count_training(live, trainer)
            found[case] = dataclasses.asdict(live.report())
    (folder / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
