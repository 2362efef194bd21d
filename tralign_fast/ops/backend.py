"""Which implementation runs: Triton kernels where they can, plain PyTorch everywhere else.

Code that takes another path on a GPU asks here what a device is. A trace of a GPU's memory on a
machine without one pretends (`pretend_gpu`), and all of the library follows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def warn_once(message: str) -> None:
    """Every fallback says why, once."""
    warnings.warn(message, stacklevel=3)


_pretending = False


def device_kind(device: torch.device) -> str:
    """The type of a device, "cpu" or "cuda" or another; inside `pretend_gpu`, a CPU's is "cuda"."""
    return "cuda" if _pretending and device.type == "cpu" else device.type


def is_pretending() -> bool:
    """Whether this runs inside `pretend_gpu`: real kernels of a GPU cannot be called."""
    return _pretending


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take the code paths of tensors on a GPU.

    For fake tensors: a Triton kernel, which writes in place what was allocated before it, does
    nothing.
    """
    global _pretending
    before, _pretending = _pretending, True
    try:
        yield
    finally:
        _pretending = before


def kernel(name: str) -> Callable[..., Any]:
    """A launcher of `tralign_kernels` that works in place."""
    if _pretending:
        return _do_nothing
    import tralign_kernels

    return getattr(tralign_kernels, name)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def pick_backend(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """ "torch" or "triton" for tensors on `device`.

    Args:
        dtype: of the arithmetic; fp64 is PyTorch's, for the kernels compute in fp32.

    Raises:
        ValueError: an unknown backend, or "triton" where Triton is not installed or for fp64.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    exact = dtype == torch.float64
    if exact and backend == "triton":
        raise ValueError('backend="triton" takes fp32, bf16 and fp16, got fp64; use "torch"')
    kind = device_kind(device)
    if not (HAS_TRITON or _pretending):
        if backend == "triton":
            raise ValueError('backend="triton" needs the triton package; use backend="torch"')
        warn_once("Triton is not installed: tralign-fast runs its PyTorch backend")
        return "torch"
    if backend == "auto":
        if exact and kind == "cuda":
            warn_once("fp64 has no Triton kernels: it runs in PyTorch")
        return "triton" if kind == "cuda" and not exact else "torch"
    if backend == "triton" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('backend="triton" runs on a GPU (or, for tests, with TRITON_INTERPRET=1)')
    return backend
