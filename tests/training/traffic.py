"""Bytes that collectives send: counted where PyTorch hands them to a process group."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of `c10d` and `_c10d_functional` by what they do, each with the argument whose size is
# that of the whole: of all-gathers the output, of functional ones what they return.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "all_reduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "broadcast_": ("broadcast", 0),
    "broadcast": ("broadcast", 0),
    "scatter_": ("scatter", 0),
    "gather_": ("gather", 1),
}
_NOTHING = ("barrier", "wait_tensor", "monitored_barrier_", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """Counts, inside a `with`, what this process's collectives move.

        with Traffic() as traffic:
            trainer.train()
        traffic.bytes  # {("step", "all-gather"): 123, ...}

    A collective's bytes are those of the whole tensor that it works on: n of an all-reduce, the
    gathered result of an all-gather, what goes into a reduce-scatter; of a scatter it is what this
    process gets, of a gather what it gives. `least_bytes_sent` says what has to be sent for them.

    Attributes:
        bytes: by (phase, kind of collective); a phase is what `phase` names, "step" outside.
        calls: how many collectives, likewise.
        current: the phase.

    Collectives of objects (`broadcast_object_list`) count with their pickles; others than those of
    the table above raise a ValueError. Not seen are those inside an operator of torch.library, as
    the head's of tensor parallelism: `tests/ops/vocab_parallel_run.py` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.current = "step"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, collectives count under this name."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def of(self, phase: str) -> dict[str, int]:
        """Bytes of a phase by kind."""
        return {kind: n for (name, kind), n in self.bytes.items() if name == phase and n}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.split("::")[1], args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        if name in _NOTHING:
            return
        if name not in _KINDS:
            raise ValueError(f"Traffic does not know the collective {name}; add it to its table")
        kind, place = _KINDS[name]
        tensors = pytree.tree_leaves(result if place is None else args[place])
        size = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        self.bytes[self.current, kind] += size
        self.calls[self.current, kind] += 1


def least_bytes_sent(kind: str, size: int, processes: int) -> float:
    """What each of P processes sends at the least, on average, for a collective of so many bytes as
    `Traffic` counts: (P-1)/P of them, and twice as much for an all-reduce."""
    share = size * (processes - 1) / processes
    return 2 * share if kind == "all-reduce" else share
