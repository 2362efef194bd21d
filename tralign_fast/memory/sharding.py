"""What one of several GPUs holds under FSDP2: arithmetic on what one alone would hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.trace import decoder_layers
from tralign_fast.memory.workload import Workload


def per_gpu(report: MemoryReport, work: Workload, gpus: int) -> MemoryReport:
    """Weights, gradients, optimizer states and reference are cut into shards; activations and the
    tile of logits are of a GPU's own batch.

    Whole are, at a time, the weights of two decoder layers (one is computed with, the next is on
    its way) and what stands outside the layers (embedding and head), and once more where they get
    gradients. They count as activations.
    """
    if gpus == 1:
        return report
    layer, outside = _sizes(work)
    gathered = 2 * layer + outside
    if work.lora_rank is None:
        gathered += layer + outside
    shards = {
        name: -(-getattr(report, name) // gpus)
        for name in ("parameters", "gradients", "optimizer", "reference")
    }
    values = {
        **shards, "activations": report.activations + gathered, "logits_tile": report.logits_tile
    }  # fmt: skip
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
