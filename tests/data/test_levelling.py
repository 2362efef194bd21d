"""Rows of a global batch are dealt out to processes by their tokens."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, IterableDataset
from torch.utils.data import BatchSampler, SequentialSampler

from benchmarks.levelling import imbalance
from tralign_fast.data.sampling import level
from tralign_fast.distributed.levelling import CountWeights, level_tokens


def lengths_of(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, generator=generator).mul(0.6).exp() * 100).long().add(1).tolist()


def test_shares_are_even_in_rows_and_tokens():
    lengths = lengths_of(640)
    rows = list(range(640))
    shares = level(rows[:32], lengths, 8)
    assert sorted(row for share in shares for row in share) == rows[:32]
    assert {len(share) for share in shares} == {4}
    assert shares == level(rows[:32], lengths, 8)
    assert all(share == sorted(share) for share in shares)
    before, after = (imbalance(lengths, rows, 8, 4, levelled) for levelled in (False, True))
    assert sum(before) / len(before) > 1.5
    # a process that has the longest row cannot do with less than the three shortest beside it
    least = []
    for start in range(0, 640, 32):
        own = sorted(lengths[start : start + 32])
        least.append(max(1.0, (own[-1] + sum(own[:3])) * 8 / sum(own)))
    assert sum(least) <= sum(after) < 1.05 * sum(least)
    # a row that has more than a share's tokens by itself stands beside the shortest
    assert [0, 1, 2, 3] not in level([0, 1, 2, 3, 4, 5], [100, 1, 1, 1, 1, 1], 3)


def loader_of(rows: int, index: int, processes: int, size: int) -> Any:
    batches = BatchSampler(SequentialSampler(range(rows)), size, drop_last=False)
    shard = BatchSamplerShard(batches, processes, index)
    return SimpleNamespace(batch_sampler=shard)


@pytest.mark.parametrize("count", [64, 61])  # the last batches are filled up, and stay as they are
def test_global_batches_keep_their_rows(count):
    lengths = lengths_of(count)
    rows = Dataset.from_dict({"prompt_ids": [[0] * n for n in lengths]})
    accelerator: Any = SimpleNamespace()
    plain = [list(loader_of(count, i, 4, 2).batch_sampler) for i in range(4)]
    dealt = []
    for i in range(4):
        loader = loader_of(count, i, 4, 2)
        level_tokens(loader, rows, accelerator)
        dealt.append(list(loader.batch_sampler))
        assert len(dealt[-1]) == len(plain[i]) == len(loader.batch_sampler)
    changed = 0
    for before, after in zip(zip(*plain, strict=True), zip(*dealt, strict=True), strict=True):
        assert sorted(chain(*before)) == sorted(chain(*after))
        assert {len(batch) for batch in after} == {2}
        changed += before != after
    assert changed > 4


def test_what_has_no_lengths_is_left_alone():
    loader = loader_of(64, 0, 4, 2)
    before = loader.batch_sampler.batch_sampler
    accelerator: Any = SimpleNamespace()
    level_tokens(loader, IterableDataset.from_generator(lambda: iter(())), accelerator)
    assert loader.batch_sampler.batch_sampler is before
    level_tokens(SimpleNamespace(batch_sampler=before), None, accelerator)  # one process


class Part:
    """As a `PackedBatch`, of which nothing but the number of examples is asked."""

    share = weight = 1.0

    def __init__(self, examples: int) -> None:
        self.own_examples = examples
        self.parts = (self,)


def test_a_mean_over_examples_of_unequal_micro_batches():
    accelerator: Any = SimpleNamespace(
        num_processes=1, device=torch.device("cpu"), reduce=lambda t, reduction: t
    )
    batches: list[Any] = [Part(3), Part(1)]
    weights = CountWeights(accelerator, unequal=True)
    weights.start(batches)
    losses = [torch.tensor(1.0), torch.tensor(5.0)]
    weighed = (weights.weigh(loss, p, True) for loss, p in zip(losses, batches, strict=True))
    mean = sum(weighed) / 2
    assert float(mean) == pytest.approx((3 * 1.0 + 1 * 5.0) / 4)
