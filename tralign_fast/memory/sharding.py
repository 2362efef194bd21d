"""What one of several GPUs holds under FSDP2: traced, or by arithmetic from one alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from tralign_fast.memory.layers import trace_deep
from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.trace import decoder_layers
from tralign_fast.memory.workload import Workload

# What versions of PyTorch, transformers and accelerate that are put together otherwise than those
# that were tested may end in. A ValueError is none of it: the work cannot be trained.
OTHERWISE = (
    RuntimeError, AttributeError, TypeError, KeyError, AssertionError, ImportError,
)  # fmt: skip


def trace_rank(work: Workload) -> tuple[MemoryReport, str | None]:
    """What each GPU holds, traced; where that cannot be had, by arithmetic, and then why.

    Raises:
        ValueError: as `trace`.
    """
    if work.gpus == 1:
        return trace_deep(work), None
    try:
        return trace_deep(work), None
    except OTHERWISE as error:
        lines = str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
    return per_gpu(trace_deep(dataclasses.replace(work, gpus=1)), work), why


def per_gpu(report: MemoryReport, work: Workload) -> MemoryReport:
    """What each of `work.gpus` holds, by arithmetic, if one alone would hold `report`.

    Weights, gradients, optimizer states and reference are cut into shards; activations and the
    tile of logits are of a GPU's own batch. Gathered are, at a time, the weights of two decoder
    layers (one is computed with, the next is on its way) and what stands outside the layers
    (embedding and head), and once more where they get gradients.
    """
    if work.gpus == 1:
        return report
    layer, outside = _sizes(work)
    gathered = 2 * layer + outside
    if work.lora_rank is None:
        gathered += layer + outside
    shards = {
        name: -(-getattr(report, name) // work.gpus)
        for name in ("parameters", "gradients", "optimizer", "reference")
    }
    own = {"activations": report.activations, "logits_tile": report.logits_tile}
    values = {**shards, **own, "gathered": gathered}
    return MemoryReport(**values, peak=sum(values.values()))


def _sizes(work: Workload) -> tuple[int, int]:
    """Bytes of the weights of a decoder layer, and of what is outside the layers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(work.model)
    width = 2 if work.dtype == "bfloat16" else 4
    layers = decoder_layers(model)
    few = 4.13 / 8 if work.base_bits == 4 else width
    largest = max((_count(layer) for layer in layers), default=0)
    rest = _count(model) - sum(_count(layer) for layer in layers)
    return int(largest * few), int(rest * width)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
