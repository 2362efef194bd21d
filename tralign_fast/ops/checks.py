"""What the log-prob ops check of their arguments."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tralign_fast.ops.backend import device_kind

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "floating point (fp64, fp32, bf16 or fp16)"


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, enabled=False)


def logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of both, or of autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_logprobs: hidden is {hidden.dtype}, weight {weight.dtype}; expected one dtype"
        )
    return hidden.dtype


def check_targets(targets: Tensor, vocab: int) -> None:
    if device_kind(targets.device) != "cpu" or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        row = int((targets == bad).nonzero()[0, 0])
        raise ValueError(f"target {bad} of row {row} is outside the vocabulary [0, {vocab})")


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """torch gives an operator without such a derivative a tangent of zeros.

    Raises:
        RuntimeError: an argument has a tangent (`torch.func.jvp`, `forward_ad.make_dual`).
    """
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (jvp): take the gradient of a backward"
        )


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_filter: float | None,
    logits_budget_mb: float | None = None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_logprobs: expected hidden (N, H) and weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_logprobs: expected int64 targets ({hidden.shape[0]},), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_logprobs: expected bias ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    devices = {t.device for t in (hidden, weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"linear_logprobs: tensors on several devices: {sorted(map(str, devices))}"
        )
    dtypes = [t.dtype for t in (hidden, weight, bias) if t is not None]
    if not set(dtypes) <= set(FLOATS):
        raise ValueError(
            f"linear_logprobs: expected {FLOAT_NAMES}, got hidden {hidden.dtype}, weight "
            f"{weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        )
    if logits_budget_mb is not None and not 0.0 <= logits_budget_mb < math.inf:
        raise ValueError(
            f"linear_logprobs: logits_budget_mb must be finite and ≥ 0, got {logits_budget_mb}"
        )
    if vocab_filter is not None and not 0.0 <= vocab_filter < 1.0:
        raise ValueError(f"linear_logprobs: vocab_filter must lie in [0, 1), got {vocab_filter}")
