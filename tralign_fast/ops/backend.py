"""Which implementation runs: Triton kernels where they can, plain PyTorch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def warn_once(message: str) -> None:
    """Every fallback says why, once."""
    warnings.warn(message, stacklevel=3)


def pick_backend(backend: str, device: torch.device) -> str:
    """ "torch" or "triton" for tensors on `device`.

    Raises:
        ValueError: an unknown backend, or "triton" where Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not HAS_TRITON:
        if backend == "triton":
            raise ValueError('backend="triton" needs the triton package; use backend="torch"')
        warn_once("Triton is not installed: tralign-fast runs its PyTorch backend")
        return "torch"
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('backend="triton" runs on a GPU (or, for tests, with TRITON_INTERPRET=1)')
    return backend
