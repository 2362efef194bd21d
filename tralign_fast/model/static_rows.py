"""Packed rows in a few fixed shapes, at fixed addresses: what a CUDA graph can be replayed on.

A row is filled up to the next of sixteen lengths an octave, and what attention reads of it to sizes
that follow from few numbers, so that rows of about one length share a graph. What fills it up is a
sequence of its own, which nobody reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tralign_fast.data.layout import PrefixLayout, VarlenArguments

_STEPS = 16  # lengths of rows an octave: 3% of the tokens are filling, on average
_SHORTEST = 64
# Rows that take the gradients of index entries which stand for nothing: several, since additions to
# one would wait for each other.
_SPARE = 256


class Shape(NamedTuple):
    """Sizes of a static row; rows of one shape run one graph."""

    tokens: int  # T
    sequences: int  # with the filling and with empty ones
    longest: int  # bound of the queries, and of the keys, of a sequence
    again: int  # how often more a prompt's token can stand among the keys: completions less one
    scored: int  # rows that the last MLP runs on

    @property
    def keys(self) -> int:
        return (1 + self.again) * self.tokens


def shape_of(layout: PrefixLayout) -> Shape:
    """The smallest shape that a packed row fits into."""
    arguments, scored = _on_host(layout)
    length = len(arguments.first)
    step = max(_SHORTEST, _power_of_two(length) // (2 * _STEPS))
    tokens = -(-length // step) * step
    quarter = -(-tokens // 4)
    return Shape(
        tokens,
        _power_of_two(len(arguments.cu_seqlens_q)),
        max(256, _power_of_two(max(arguments.max_seqlen_q, arguments.max_seqlen_k))),
        len(arguments.again),
        tokens if layout.every_row else min(tokens, -(-len(scored) // quarter) * quarter),
    )


def _power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << max(number - 1, 0).bit_length()


def _on_host(layout: PrefixLayout) -> tuple[VarlenArguments, Tensor]:
    host = torch.device("cpu")
    return layout.varlen(host), layout.scored_rows(host)


class StaticRow:
    """A packed row of one shape on a device: `fill` gives it other tokens, its tensors stay.

    Attributes:
        input_ids, position_ids: (1, T) int64.
        layout: a layout whose tensors are these.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        T, K, S = shape.tokens, shape.keys, shape.sequences
        sizes = [T, T, K if shape.again else 0, T + _SPARE, *2 * shape.again * [T], shape.scored]
        self.shape = shape
        pin = device.type == "cuda"
        # two buffers, each filled by one copy
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pin)
        self._host_bounds = torch.zeros(2, S + 1, dtype=torch.int32, pin_memory=pin)
        self._device = torch.zeros_like(self._host, device=device)
        self._bounds = torch.zeros_like(self._host_bounds, device=device)
        self._copied = torch.cuda.Event() if pin else None
        self._parts = self._host.split(sizes)
        ids, positions, index, first, *again, scored = self._device.split(sizes)
        self.input_ids, self.position_ids = ids[None], positions[None]
        pairs = tuple(zip(again[::2], again[1::2], strict=True))
        longest = (shape.longest, shape.longest)
        self.layout = PrefixLayout((), every_row=shape.scored == T)
        self.layout._cache[device] = VarlenArguments(
            self._bounds[0], self._bounds[1], *longest, index, first, pairs
        )
        self.layout._cache["scored", device] = scored

    def fill(self, input_ids: Tensor, position_ids: Tensor, layout: PrefixLayout) -> None:
        """Takes over a batch's (1, t) tokens and positions, on the device, and its layout."""
        if self._copied is not None:
            self._copied.synchronize()  # what was written there last has been read
        arguments, scored = _on_host(layout)
        t, T = input_ids.shape[1], self.shape.tokens
        _, _, index, first, *again, rows = self._parts
        first[:t] = arguments.first
        # the filling's own keys come after those of the row
        keys = int(arguments.cu_seqlens_k[-1])
        first[t:T] = torch.arange(keys, keys + T - t)
        first[T:] = 0
        if self.shape.again:
            index[:keys] = arguments.key_index
            index[keys : keys + T - t] = torch.arange(t, T)
            index[keys + T - t :] = 0
        spare = T + torch.arange(T) % _SPARE
        for k, (tokens, places) in enumerate(arguments.again):
            n = len(tokens)
            again[2 * k][:n], again[2 * k][n:] = tokens, spare[n:]
            again[2 * k + 1][:n], again[2 * k + 1][n:] = places, 0
        self._fill_scored(rows, scored)
        for row, bounds, end in (
            (self._host_bounds[0], arguments.cu_seqlens_q, T),
            (self._host_bounds[1], arguments.cu_seqlens_k, keys + T - t),
        ):
            row[: len(bounds)], row[len(bounds) :] = bounds, end
        self._device[2 * T :].copy_(self._host[2 * T :], non_blocking=True)
        self._bounds.copy_(self._host_bounds, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        for own, given in ((self.input_ids, input_ids), (self.position_ids, position_ids)):
            own[:, :t] = given
            own[:, t:] = 0

    def keywords(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords, of this row in place of a batch's."""
        return {
            **kwargs, "input_ids": self.input_ids, "position_ids": self.position_ids,
            "prefix_layout": self.layout, "attention_mask": kwargs["attention_mask"].clone(),
        }  # fmt: skip

    def _fill_scored(self, rows: Tensor, scored: Tensor) -> None:
        """The scored rows, then others up to the number of the shape: none twice, or its gradient
        would be."""
        rows[: len(scored)] = scored
        missing = len(rows) - len(scored)
        if missing:
            others = torch.ones(self.shape.tokens, dtype=torch.bool)
            others[scored] = False
            rows[len(scored) :] = others.nonzero()[:missing, 0]
