"""Whether a model's masks are those that packed rows assume, at lengths that nobody runs.

Prefix-shared attention builds no mask: every layer is causal, with the window that it passes as
`sliding_window`. A model may give its layers another mask (PhiMoE and Qwen2-MoE have a window there
alone, Llama 4 chunks, remote code whatever it likes), and a window of 4,096 tokens changes nothing
in a short try. transformers makes its masks from a function of query and key positions, which is
asked here for positions up to a million; a mask that was not made so is not known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Implementations whose attention is told by its mask what a query sees: flash attention is told by
# `sliding_window`, as packed rows are.
_MASKED = ("sdpa", "eager", "flex_attention")
_watch: MaskWatch | None = None


class MaskWatch:
    """Compares the masks that layers get in a forward with what a packed row would have there."""

    def __init__(self) -> None:
        self.reason: str | None = None  # why a layer's mask is another one
        # masks by identity, held so that no other one gets it
        self._made: dict[int, tuple[Any, Callable[..., Tensor]]] = {}
        self._seen: dict[tuple[int, int | None], bool] = {}

    def made(self, mask: Any, function: Callable[..., Tensor]) -> None:
        self._made[id(mask)] = mask, function

    def given(self, layer: Any, mask: Any, window: int | None) -> None:
        if mask is None:
            known, same = True, window is None
        else:
            known, key = id(mask) in self._made, (id(mask), window)
            if known and key not in self._seen:
                self._seen[key] = _is_causal(self._made[id(mask)][1], window, _device_of(mask))
            same = known and self._seen[key]
        if not same and self.reason is None:
            what = "a mask that its attention is not told" if known else "a mask of its own"
            self.reason = f"{type(layer).__name__} has {what}"


@contextlib.contextmanager
def watch_masks() -> Iterator[MaskWatch]:
    """Inside, padded batches through prefix-shared attention are watched."""
    global _watch
    before, _watch = _watch, MaskWatch()
    try:
        yield _watch
    finally:
        _watch = before


def make_mask(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mask function of transformers' `AttentionMaskInterface`, seen by the watch."""
    mask = original(*args, **kwargs)
    if _watch is not None and mask is not None and "mask_function" in kwargs:
        _watch.made(mask, kwargs["mask_function"])
    return mask


def check_mask(implementation: str, layer: Any, mask: Any, window: int | None) -> None:
    """Tells the watch, where there is one, what a layer's attention was given."""
    if _watch is not None and implementation in _MASKED:
        _watch.given(layer, mask, window)


def _is_causal(function: Callable[..., Tensor], window: int | None, device: torch.device) -> bool:
    """Whether a mask function lets query i see the keys in (i - window, i], and no other."""
    numbers = {p + d for p in (1 << k for k in range(1, 21)) for d in (-1, 0, 1)} | {0}
    if window is not None:
        numbers |= {n * window + d for n in (1, 2, 5) for d in (-1, 0, 1)}
    positions = torch.tensor(sorted(numbers), device=device)
    query, key = positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1)
    expected = key <= query
    if window is not None:
        expected &= key > query - window
    zero = positions.new_zeros((1, 1, 1, 1))
    try:
        seen = function(zero, zero, query, key)
    except Exception:  # of whoever wrote the mask: one that depends on more than positions
        return False
    return bool((seen == expected).all())


def _device_of(mask: Any) -> torch.device:
    return mask.device if isinstance(mask, Tensor) else mask.kv_num_blocks.device
