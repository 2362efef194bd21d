"""Rows of like length in one batch, in an order that each epoch knows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochLengthSampler(LengthGroupedSampler):
    """Draws from a seed and the epoch instead of torch's global state.

    A window that reads ahead into an epoch sees the order in which it will be trained on, and so
    does a resumed run. Rows of like length make up a step of all processes: runs whose steps are
    as large have one order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, processes: int = 1) -> None:
        super().__init__(sampler.batch_size * processes, lengths=sampler.lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
