"""Memory on the host for past adapters, and the way back to the device in few copies."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 26  # bytes pinned at a time: torch rounds pinned memory up to a power of two
_ALIGNED = 256  # bytes: where a tensor may begin


class Room:
    """Tensors cut from large pieces of host memory, pinned beside a GPU, that are given back and
    taken again.

    Pinning takes 0.3 ms a MB, a move's copies a twentieth of that. What follows each other in
    `take` lies side by side, so that a `Stage` copies it in one piece.

    Args:
        chunk: bytes of a piece.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._last: Tensor | None = None  # the piece that is taken from, and how much is
        self._taken = 0
        self._is_pinned = False
        self._ready: list[Tensor] = []  # pieces that a thread has made
        self._maker: threading.Thread | None = None
        self._coefficients: dict[tuple[Any, ...], Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
        """A tensor without content."""
        free = self._free.get((tuple(shape), dtype))
        if free:
            return free.pop()
        size = math.prod(shape) * dtype.itemsize
        used = -(-size // _ALIGNED) * _ALIGNED
        piece, begin = self._last, self._taken
        if piece is None or len(piece) - begin < used or self._is_pinned != pinned:
            piece, begin = self._piece(used, pinned), 0
        self._last, self._taken, self._is_pinned = piece, begin + used, pinned
        # one operator in place of two slices and two views, which a trace of fake tensors feels
        taken = torch.empty(0, dtype=dtype, device=piece.device)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return taken.set_(piece.untyped_storage(), begin // dtype.itemsize, [*shape], strides)

    def give(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._free.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)

    def reserve(self, size: int) -> None:
        """Pins so many bytes more in a thread of its own, beside the steps until the next move."""
        pieces = -(-size // self._chunk) - len(self._ready)
        if pieces <= 0 or self._maker is not None:
            return

        def make() -> None:
            with contextlib.suppress(RuntimeError):  # `take` will meet it again, and say so
                for _ in range(pieces):  # one after the other: nobody waits long for the driver
                    self._ready.append(_allocate(self._chunk, True))

        self._maker = threading.Thread(target=make, name="tralign-pinned", daemon=True)
        self._maker.start()

    def coefficients(self, weights: Sequence[float], rank: int, device: torch.device) -> Tensor:
        """(len(weights)·rank,) float32: each weight for its ranks, one tensor for all layers."""
        key = (*weights, rank, device)
        if key not in self._coefficients:
            if any(known[:-2] != key[:-2] for known in self._coefficients):
                self._coefficients.clear()  # of before the move
            spread = torch.tensor(weights, dtype=torch.float32).repeat_interleave(rank)
            self._coefficients[key] = spread.to(device)
        return self._coefficients[key]

    def _piece(self, size: int, pinned: bool) -> Tensor:
        if pinned and self._maker is not None:
            self._maker.join()
            self._maker = None
        if pinned and self._ready and size <= self._chunk:
            return self._ready.pop()
        return _allocate(max(size, self._chunk), pinned)


def _allocate(size: int, pinned: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class Stage:
    """What layers hold on the host, on the device while they run.

    Layers come in groups that follow each other. One group at a time is there, and neighbours in
    memory come in one copy. Where a single group holds all, it stays for the whole sweep.

    Args:
        limit: bytes of a group, if it has more than one layer.
        copies: tensors that are on the device already are copied: where a trace has one device,
            and takes it for both.
    """

    def __init__(self, limit: float, *, copies: bool = False) -> None:
        self._limit, self._copies = limit, copies
        self._groups: list[dict[Any, list[Tensor]]] = []
        self._group_of: dict[Any, int] = {}
        self._bytes = 0
        self._here: dict[Any, Any] = {}

    def add(self, owner: Any, tensors: list[Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        if not self._groups or self._bytes + size > self._limit:
            self._groups.append({})
            self._bytes = 0
        self._bytes += size
        self._groups[-1][owner] = tensors
        self._group_of[owner] = len(self._groups) - 1

    def get(
        self, owner: Any, device: torch.device, join: Callable[[Any, list[Tensor]], Any]
    ) -> Any:
        """`join(owner, its tensors on the device)`, made once while its group is there."""
        key = (owner, device)
        if key not in self._here:
            self._here = {}  # first, so that its memory can be had again
            group = self._groups[self._group_of[owner]]
            held = [tensor for own in group.values() for tensor in own]
            moved = iter(to_device(held, device, copies=self._copies))
            for member, own in group.items():
                self._here[member, device] = join(member, [next(moved) for _ in own])
        return self._here[key]


def to_device(
    tensors: Sequence[Tensor], device: torch.device, *, copies: bool = False
) -> list[Tensor]:
    """The tensors there; those that a `Room` has laid side by side come in one copy.

    Args:
        copies: as of `Stage`.
    """
    if not copies and all(tensor.device == device for tensor in tensors):
        return list(tensors)
    found = list(tensors)
    for run in _runs(tensors):
        begin, there = _begin(tensors[run[0]]), None
        if len(run) > 1:
            piece = _bytes_from(tensors[run[0]], tensors[run[-1]])
            there = piece.to(device, non_blocking=True, copy=copies)
        for index in run:
            own = tensors[index]
            if there is None:
                found[index] = own.to(device, non_blocking=True, copy=copies)
            else:
                offset = _begin(own) - begin
                cut = there[offset : offset + own.nbytes]
                found[index] = cut.view(own.dtype).view(own.shape)
    return found


def _begin(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize


def _bytes_from(first: Tensor, last: Tensor) -> Tensor:
    """What lies in their storage from the one to the end of the other."""
    begin, end = _begin(first), _begin(last) + last.nbytes
    flat = torch.empty(0, dtype=torch.uint8, device=first.device)
    return flat.set_(first.untyped_storage(), begin, (end - begin,), (1,))


def _runs(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of contiguous tensors that follow each other in one storage, but for alignment."""
    places = [(t.untyped_storage()._cdata, _begin(t)) for t in tensors]  # a fake one has no address
    runs: list[list[int]] = []
    for index in sorted(range(len(tensors)), key=places.__getitem__):
        own = tensors[index]
        if runs and own.is_contiguous():
            last = runs[-1][-1]
            gap = places[index][1] - places[last][1] - tensors[last].nbytes
            same = places[index][0] == places[last][0] and tensors[last].is_contiguous()
            if same and 0 <= gap < _ALIGNED:
                runs[-1].append(index)
                continue
        runs.append([index])
    return runs
