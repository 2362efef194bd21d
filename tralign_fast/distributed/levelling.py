"""Even work for all processes, and means over examples where they have unequal numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor

from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.data.sampling import LevelledBatches
from tralign_fast.data.tokenization import row_lengths


def level_tokens(loader: Any, rows: Any, accelerator: Accelerator) -> None:
    """Lets a dataloader of several processes deal the rows of a global batch out by tokens, where
    accelerate deals out whole batches and the lengths of the rows are known."""
    shards: Any = getattr(loader, "batch_sampler", None)
    if not isinstance(shards, BatchSamplerShard) or shards.num_processes == 1:
        return
    if shards.split_batches or (lengths := row_lengths(rows)) is None:
        return
    levelled: Any = LevelledBatches(shards.batch_sampler, lengths, shards.num_processes)
    shards.batch_sampler = levelled


class CountWeights:
    """What a micro-batch's mean counts in the mean over all examples of a step.

    A step averages micro-batches and processes, as if all had as many examples. Where an order of
    rows gives them unequal numbers (`train_sampling_strategy="batch_rebalance"`), a micro-batch of
    B examples counts B·P·G/ΣB, for P processes and G micro-batches.
    """

    def __init__(self, accelerator: Accelerator, unequal: bool) -> None:
        self._accelerator, self._unequal = accelerator, unequal
        self._scale: Tensor | None = None  # (): P·G/ΣB of the step

    def start(self, batches: Sequence[PackedBatch | SplitBatch]) -> None:
        """Before a step; all processes call, with as many micro-batches each."""
        if not self._unequal or not batches:
            return
        device = self._accelerator.device
        count = sum(part.own_examples for batch in batches for part in batch.parts)
        own = torch.tensor(count, dtype=torch.float32, device=device)
        total: Any = self._accelerator.reduce(own, reduction="sum")
        self._scale = self._accelerator.num_processes * len(batches) / total

    def weigh(self, loss: Tensor, batch: PackedBatch, training: bool) -> Tensor:
        """The loss of a micro-batch, or of the part of one that `share` says; of a process that
        divides batches with others, by its `weight`."""
        if self._scale is not None and training and batch.share > 0:
            return loss * (batch.own_examples * self._scale)
        scale = batch.share * batch.weight
        return loss if scale == 1.0 else loss * scale


def mean_of_all(accelerator: Accelerator, mean: Tensor, count: int) -> Tensor:
    """() the mean over the examples of all processes, from each one's mean over `count` of them."""
    if accelerator.num_processes == 1:
        return mean
    sums: Any = torch.stack([mean * count, mean.new_full((), count)])
    total, number = accelerator.reduce(sums, reduction="sum").unbind()  # pyright: ignore[reportAttributeAccessIssue]
    return total / number
