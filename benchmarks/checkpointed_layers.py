"""What checkpointing fewer layers holds and takes: `python -m benchmarks.checkpointed_layers`.

Peaks of Llama-3.1-8B, traced as `tralign-fast plan` does, with the seconds of a step by its model;
`--cpu` times steps of a small model on this machine instead, all numbers of layers in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

WORKS: dict[str, dict[str, Any]] = {
    "LoRA 64": {"lora_rank": 64, "lora_dtype": "bfloat16"},
    "full": {},
}


def peaks(card: str) -> None:
    from tralign_fast.memory.layers import by_layers, checkpointing, trace_deep
    from tralign_fast.memory.plan_options import PlanOptions, workload
    from tralign_fast.memory.step_flops import sizes_of
    from tralign_fast.memory.time_model import rates_of, step_time

    for name, options in WORKS.items():
        work = workload(PlanOptions("llama-3.1-8b", alpha=1.0, **options))
        between = by_layers(work)
        assert between is not None
        sizes = sizes_of(work.model)
        for layers in (32, 24, 16, 8, 0):
            some = checkpointing(work, layers)
            report = between(layers) if 0 < layers < 32 else trace_deep(some)
            seconds = step_time(some, sizes, rates_of(card)).total
            print(f"{name}, {layers} layers: {report.peak / 2**30:.2f} GiB, {seconds:.3f} s")


def steps(turns: int) -> None:
    """Seconds of CPU time of three steps, the median over turns."""
    from transformers import LlamaConfig

    from tralign_fast.memory import Workload
    from tralign_fast.memory.trace import quietly
    from tralign_fast.memory.trainers import make_trainer

    config = LlamaConfig(
        vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    found: dict[int, list[float]] = {layers: [] for layers in (8, 4, 0)}
    for _ in range(turns):
        for layers, times in found.items():
            options = {"gradient_checkpointing_layers": layers, "bf16": False, "max_steps": 3,
                       "ref_model_mixup_alpha": 1.0, "sync_ref_model": True}  # fmt: skip
            work = Workload(config, pairs=2, tokens=256, dtype="float32", options=options)
            with tempfile.TemporaryDirectory() as folder, quietly():
                trainer = make_trainer(work, folder)
                start = time.process_time()
                trainer.train()
                times.append(time.process_time() - start)
    for layers, times in found.items():
        share = statistics.median(times) / statistics.median(found[8])
        print(f"{layers} of 8 layers: {statistics.median(times):.2f} s, {share:.3f} of all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--card", default="h200")
    options = parser.parse_args()
    if options.cpu:
        steps(options.turns)
    else:
        peaks(options.card)


if __name__ == "__main__":
    main()
