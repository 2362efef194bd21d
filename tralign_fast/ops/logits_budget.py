"""How many logits may exist at once: as asked, or by the memory that a GPU has left.

Logits that are kept spare the backward a fourth product. Where nothing is asked, 1 GiB of them may
exist. Where a batch has more, the GPU is asked before each head: up to 4 GiB, and half of what is
free at most, as gradients and their fp32 sum come on top. Kept logits are gone before any other
layer's gradient is made.

The answer is one of few sizes, so that runs that differ by a little in what is free are cut into
the same tiles. Asking costs a call of the driver and one of the allocator, no wait for the device;
a batch that fits the standard asks nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

STANDARD_MB = 1024
_LARGER_MB = (4096, 2048)
_SHARE = 0.5  # of what is free


def budget_bytes(
    asked_mb: float | None,
    wanted: int,  # bytes of all logits that a backward would read
    hidden: Tensor,  # whose device it is
) -> int:
    """Bytes of logits that may exist at once."""
    if asked_mb is not None:
        return int(asked_mb * 2**20)
    standard = STANDARD_MB * 2**20
    if wanted <= standard or not _can_ask(hidden):
        return standard
    allowed = _SHARE * free_bytes(hidden.device)
    return next((mb * 2**20 for mb in _LARGER_MB if mb * 2**20 <= allowed), standard)


def _can_ask(hidden: Tensor) -> bool:
    """Not in a trace, whose graph would keep the answer, nor where a CUDA graph is captured."""
    if hidden.device.type != "cuda" or isinstance(hidden, FakeTensor):
        return False
    return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def free_bytes(device: torch.device) -> int:
    """What PyTorch can give out on a GPU: free there, or held by its allocator in blocks that are
    free as a whole, and within the share of the card that the process was given."""
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    held = stats.get("reserved_bytes.all.current", 0)
    used = stats.get("allocated_bytes.all.current", 0)
    split = stats.get("inactive_split_bytes.all.current", 0)  # free parts of blocks in use
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device)) - held
    return max(0, min(free, limit) + held - used - split)
