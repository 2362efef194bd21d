"""Saved tensors that a backward overwrites: used once, or refused.

Autograd finds out by itself that a saved tensor was changed in place, unless hooks of saved tensors
stand between (`torch.autograd.graph.save_on_cpu`, activation offloading), which may hand back the
very tensor that was changed, or a copy from before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Consumption:
    """The state of a tensor at the time that it was saved."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._version = tensor._version

    def check(self, tensor: Tensor, message: str) -> None:
        """Of what came back: the same memory, changed since.

        Raises:
            RuntimeError: with the message.
        """
        # a copy that a hook made has another storage, and may be used again and again
        same = self._storage() is tensor.untyped_storage()
        if same and tensor._version != self._version:
            raise RuntimeError(message)


def saved_tensors(ctx: Any, message: str) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, with our message where autograd finds one changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(message) from error


def refuse_second_derivative(name: str) -> None:
    """Called in a backward, which runs in grad mode where its own graph is wanted.

    Raises:
        RuntimeError: a graph of this backward is wanted.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, and its backward no graph: create_graph=True is not "
            "supported"
        )
