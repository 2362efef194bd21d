"""The memory of a large CPU tensor goes back to the system while the tensor is still consumed."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

from tralign_fast.ops.backend import device_kind

# Below this size glibc may take memory from its heap, whose pages serve the next tensor and should
# stay (its DEFAULT_MMAP_THRESHOLD_MAX).
_LARGE = 32 << 20


def give_back(buffer: Tensor, start: int, stop: int) -> None:
    """Frees the memory of elements [start, stop) of a contiguous tensor, in whole pages.

    Everything before `stop` must be consumed, and is undefined from here on: without this, memory
    is held until the last element of a tensor is done with. Linux and CPU tensors only; elsewhere,
    and for tensors below 32 MiB, nothing happens.
    """
    # a fake tensor, which is a subclass, has no memory
    if sys.platform != "linux" or type(buffer) is not Tensor:
        return
    if device_kind(buffer.device) != "cpu" or buffer.nbytes <= _LARGE:
        return
    first, size, page = buffer.data_ptr(), buffer.element_size(), mmap.PAGESIZE
    begin = max(-(-first // page) * page, (first + start * size) // page * page)
    end = (first + stop * size) // page * page
    if begin < end:
        _madvise()(begin, end - begin, mmap.MADV_DONTNEED)  # advice: a refusal does no harm


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
