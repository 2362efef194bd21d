"""Memory given back before its tensor dies: it is gone, and nothing else is."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.test_logprobs import make, run
from tralign_fast import linear_logprobs
from tralign_fast.ops import head_operator, tiles
from tralign_fast.ops.cpu import pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is given back")


def pages_in_memory(buffer: torch.Tensor) -> tuple[int, int]:
    """Of the pages that lie inside the tensor: how many are in memory, and how many there are."""
    first = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    count = (buffer.data_ptr() + buffer.nbytes - first) // mmap.PAGESIZE
    states = (ctypes.c_ubyte * count)()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(first, count * mmap.PAGESIZE, states) == 0, ctypes.get_errno()
    return sum(state & 1 for state in states), count


def test_consumed_elements_leave_memory_and_the_others_stay():
    buffer = torch.ones(16 << 20)  # 64 MiB
    resident, count = pages_in_memory(buffer)
    assert resident == count
    step = 3 << 20  # elements
    for start in range(0, 4 * step, step):
        pages.give_back(buffer, start + 7, start + step + 7)  # ends inside a page
        resident, count = pages_in_memory(buffer)
        gone = (start + step + 7) * 4 // mmap.PAGESIZE
        assert count - resident == pytest.approx(gone, abs=1)
        assert bool((buffer[start + step + 7 :] == 1).all())


def test_small_tensors_views_and_fake_ones_are_left_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    small = torch.ones(1 << 20)
    pages.give_back(small, 0, small.numel())
    assert bool((small == 1).all())
    with FakeTensorMode():
        fake = torch.empty(16 << 20)
    pages.give_back(fake, 0, fake.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_logits_that_stay(dtype, monkeypatch):
    """Kept logits of 40 MiB in tiles that end inside pages, given back and not."""
    hidden, weight, targets, grad = make(101, 8, (40 << 20) // (101 * dtype.itemsize), dtype)
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", {2: 6_000_000, 4: 3_000_000})
    given = []

    def counting(buffer, start, stop):
        given.append(stop - start)
        pages.give_back(buffer, start, stop)

    monkeypatch.setattr(head_operator, "give_back", counting)
    ours = run(linear_logprobs, (hidden, weight), targets, grad)
    assert sum(given) == 101 * weight.shape[0]
    assert len(given) > 5
    monkeypatch.setattr(head_operator, "give_back", lambda *_: None)
    stays = run(linear_logprobs, (hidden, weight), targets, grad)
    for a, b in zip(ours, stays, strict=True):
        assert torch.equal(a, b)


ONE_OF_BOTH = """
import psutil, torch
from tests.ops.test_logprobs import make, run
from tralign_fast import linear_logprobs
from tralign_fast.ops import tiles

def resident_mb():
    return psutil.Process().memory_info().rss / 2**20

peak, original = 0.0, tiles.product_into_

def watched(*arguments):
    global peak
    original(*arguments)
    peak = max(peak, resident_mb())

tiles.product_into_ = watched
inputs = make(8, 256, 128, torch.float32)
run(linear_logprobs, inputs[:2], *inputs[2:])  # what a first call loads
inputs = make(256, 256, 65536, torch.float32)  # logits and the weight's gradient: 64 MiB each
peak, before = 0.0, resident_mb()
run(linear_logprobs, inputs[:2], *inputs[2:])
print(peak - before)
"""


def test_logits_and_gradient_share_their_time_in_memory():
    """Resident memory while the weight's gradient is written: one of both, not the sum."""
    out = subprocess.run(  # where no memory that is free lies about
        [sys.executable, "-c", ONE_OF_BOTH], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert 64 <= float(out.stdout) < 64 + 40  # with both it is 128 and a tile
