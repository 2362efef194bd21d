"""Memory of a group that P processes hold pieces of, on one of them, without the processes.

    python -m benchmarks.context_memory [--model llama-3.1-8b] [--tokens 65536] [--layers 32]

One pair of so many tokens, half of it prompt, forward and backward of its log-probs with LoRA
r = 64 and gradient checkpointing, on fake tensors that take a GPU's paths: the peak of activations,
the logits' tile among them. Collectives of torch's `fake` backend return tensors of the right size.
Allocator fragmentation and kernel workspaces are not seen. Prints a table; writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.memory import as_on_gpu as gpu
from tralign_fast.memory.live import LiveTensors
from tralign_fast.memory.presets import MODELS
from tralign_fast.memory.trace import quietly
from tralign_fast.memory.workload import Workload
from tralign_fast.model.cut_attention import mesh_of
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps


def peak(config: Any, tokens: int, processes: int, checkpointing: bool = True) -> tuple[int, int]:
    """(bytes of activations at the peak, tokens of the row) of the first of some processes."""
    work = Workload(config, pairs=1, tokens=tokens, lora_rank=64)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_fake_group(processes)) if processes > 1 else None
        for context in (quietly(), gpu.as_on_gpu(), gpu.fake_tensors()):
            stack.enter_context(context)
        live = stack.enter_context(LiveTensors(fake=True))
        model = work.build()
        prepare_model(model, probe=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        live.tag([*model.parameters(), *model.buffers()], "parameters")
        gc.collect()
        live.start()
        division = None if group is None else (0, processes)
        batch = PreferenceCollator(paired=True, division=division, cut_over=group)(work.rows()[:1])
        assert isinstance(batch, PackedBatch)
        sequence_logps(model, batch).sum().backward()
        found = live.report()
        return found.activations + found.logits_tile, batch.num_tokens


@contextlib.contextmanager
def _fake_group(processes: int) -> Any:
    """A process group of which this process is the first, and nobody else is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    name: str = dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
    mesh_of(name, "cpu")  # which reads the data of its tensors
    try:
        yield name
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(MODELS))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--no-checkpointing", action="store_true")
    options = parser.parse_args()
    sizes = dict(MODELS[options.model][1])
    kind = sizes.pop("model_type")
    if options.layers is not None:
        sizes["num_hidden_layers"] = options.layers
    torch.manual_seed(0)
    print("| processes | tokens of a row | activations, GiB | of one process's |")
    print("|---|---|---|---|")
    whole = None
    for processes in options.processes:
        config = AutoConfig.for_model(kind, **sizes)
        found, tokens = peak(config, options.tokens, processes, not options.no_checkpointing)
        whole = whole or found
        size = f"{found / 2**30:.2f} | {found / whole:.0%}"
        print(f"| {processes} | {tokens:,} | {size} |", flush=True)


if __name__ == "__main__":
    main()
