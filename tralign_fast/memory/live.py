"""The counter: which storages are alive, what for, and how many bytes they are at the peak."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tralign_fast.ops import head_operator

CATEGORIES = (
    "parameters", "gradients", "optimizer", "reference", "activations", "logits tile", "gathered",
)  # fmt: skip
HOST = "host"  # counted nowhere
_aten = torch.ops.aten


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of tensors at the moment of the peak, by what they are for; they add up to `peak`."""

    parameters: int
    gradients: int
    optimizer: int  # states, and temporaries of its step
    reference: int
    activations: int  # and everything else
    logits_tile: int
    gathered: int  # whole weights and gradients of what FSDP2 shards, and its buffers for them
    peak: int


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that come from an operator inside, until they are freed.

    Args:
        fake: the tensors are fake. What the program reads of their data (`.item()`, a bool mask as
            index, `nonzero`) is answered with 1 and "all of them".
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self.fake = fake
        self.tag_now = "activations"  # what is allocated is tagged so, until `tag` says better
        self.weight_shapes: set[tuple[int, ...]] = set()
        self._events: list[tuple[int, int]] = []  # (serial number, ± bytes)
        self._tags: dict[int, str] = {}
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._sizes: dict[int, int] = {}  # by serial number, of now
        self._start = 0
        self._paused = False
        self._marks: list[tuple[int, Any]] = []  # (events by then, what begins)

    def add(self, tensor: Tensor) -> int:
        """Counts a tensor's storage, once; returns its serial number."""
        if tensor.layout != torch.strided:  # a tied embedding's gradient on a CPU
            self.add(tensor._indices())
            return self.add(tensor._values())
        tensor = getattr(tensor, "_local_tensor", tensor)  # a shard's
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        size, serial = storage.nbytes(), len(self._tags)

        def freed(reference: weakref.ref[Any]) -> None:
            self._events.append((serial, -self._sizes[serial]))
            entry = self._live.get(key)
            if entry is not None and entry[0] is reference:
                del self._live[key]

        self._live[key] = (weakref.ref(storage, freed), serial)
        self._sizes[serial] = size
        self._events.append((serial, size))
        tag = self.tag_now
        if tag == "logits tile" and tuple(tensor.shape) in self.weight_shapes:
            tag = "gradients"  # of the LM head, or TRL's fp32 sum of it
        self._tags[serial] = tag
        return serial

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size than when it was counted."""
        known = self._live.get(storage._cdata)
        if known is not None and known[0]() is storage:
            serial, size = known[1], storage.nbytes()
            self._events.append((serial, size - self._sizes[serial]))
            self._sizes[serial] = size

    def tag(self, tensors: Any, tag: str) -> None:
        """Says what storages are for, from their beginning."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor):
                self._tags[self.add(tensor)] = tag

    @contextlib.contextmanager
    def tagging(self, tag: str) -> Iterator[None]:
        before, self.tag_now = self.tag_now, tag
        try:
            yield
        finally:
            self.tag_now = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what comes from operators is not counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def start(self) -> None:
        """The peak is looked for from here on."""
        self._start = len(self._events)

    def mark(self, label: Any) -> None:
        """A segment of the run begins here."""
        self._marks.append((len(self._events), label))

    def report(self) -> MemoryReport:
        """The peak since the start."""
        return max(self._peaks([]), key=lambda found: found[1].peak)[1]

    def segments(self) -> list[tuple[Any, MemoryReport]]:
        """(its label, the peak in it) of every segment since the start; the first has None."""
        return self._peaks(self._marks)

    def _peaks(self, marks: list[tuple[int, Any]]) -> list[tuple[Any, MemoryReport]]:
        sums: dict[str, int] = dict.fromkeys((*CATEGORIES, HOST), 0)
        starts = iter([(i, label) for i, label in marks if i >= self._start])
        bound, label = next(starts, (None, None))
        found: list[tuple[Any, MemoryReport]] = []
        current, total, peak, at_peak = None, 0, -1, sums
        for index, (serial, size) in enumerate(self._events):
            while index == bound:
                if peak >= 0:
                    found.append((current, _report(at_peak, peak)))
                current, peak = label, -1
                if index >= self._start:  # what is alive as it begins
                    peak, at_peak = total, sums.copy()
                bound, label = next(starts, (None, None))
            tag = self._tags[serial]
            sums[tag] += size
            total += 0 if tag == HOST else size
            if index >= self._start - 1 and total > peak:
                peak, at_peak = total, sums.copy()
        return [*found, (current, _report(at_peak, peak))]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # what is done to its shard comes back here
        body = _BODIES.get(func)
        if body is not None:
            # the operator's own code, so that what it allocates inside is seen
            with self, self.tagging("logits tile"), torch.no_grad():
                return body(*args, **kwargs)
        if self.fake:
            if func in (_aten.item.default, _aten._local_scalar_dense.default):
                return _one(args[0].dtype)
            if func is _aten.nonzero.default:
                func, args = _aten.new_zeros.default, (args[0], [args[0].numel(), args[0].dim()])
                kwargs = {"dtype": torch.int64}
            if func is _aten.index.Tensor and args[1][0].dtype == torch.bool:
                func, args = _aten.clone.default, (args[0].flatten(0, args[1][0].dim() - 1),)
        output = func(*args, **kwargs)
        if self._paused:
            return output
        for tensor in (output,) if isinstance(output, Tensor) else tree_iter(output):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return output


def _report(sums: dict[str, int], peak: int) -> MemoryReport:
    return MemoryReport(**{name.replace(" ", "_"): sums[name] for name in CATEGORIES}, peak=peak)


_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.tralign_fast.linear_logprobs.default: head_operator.linear_logprobs_op._init_fn,
    torch.ops.tralign_fast.linear_logprobs_backward.default: (
        head_operator.linear_logprobs_backward_op._init_fn
    ),
}


def _one(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
