"""Rows of like length in one batch, in an order that each epoch knows; even batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from tralign_fast.data.division import deal_out


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


class LevelledBatches:
    """The batches of several processes, one behind the other as accelerate deals them out, whose
    rows have changed places so that all processes compute about as many tokens.

    A global batch keeps its rows, and every process its number of them: what is trained on is the
    same. Batches that are not enough for all processes stay as they are.

    Args:
        batches: torch's `BatchSampler`, of rows of the data set.
        lengths: tokens of every row.
        processes: how many batches are trained on at the same time.
    """

    def __init__(self, batches: Any, lengths: Sequence[int], processes: int) -> None:
        self.batches, self.lengths, self.processes = batches, lengths, processes

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        while group := list(islice(batches, self.processes)):
            sizes = {len(batch) for batch in group}
            if len(group) == self.processes and len(sizes) == 1:
                yield from level(
                    [row for batch in group for row in batch], self.lengths, len(group)
                )
            else:
                yield from group

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:  # batch_size, drop_last, sampler: accelerate's reads
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)


def level(rows: Sequence[int], lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Rows in shares of equal number and about equal tokens.

    Inside a share rows keep their order, and shares stand in the order of their first rows: none is
    always the one with the longest row.
    """
    held = deal_out([lengths[row] for row in rows], shares, room=len(rows) // shares)
    return [[rows[place] for place in own] for own in sorted(held, key=min)]
