"""Log-probabilities of target tokens from logits that are there already.

Letters: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tralign_fast.ops.backend import pick_backend
from tralign_fast.ops.checks import FLOAT_NAMES, FLOATS, check_targets, refuse_forward_mode
from tralign_fast.ops.consumption import Consumption, refuse_second_derivative, saved_tensors
from tralign_fast.ops.tile_ops import log_probs, new_logsumexp, tile_ops
from tralign_fast.ops.transform import LogitTransform


@torch.library.custom_op("tralign_fast::logprobs_from_logits", mutates_args=())
def _from_logits_op(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,)
    transform: list[float],  # `LogitTransform.numbers()`
    backend: str,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    check_targets(targets, logits.shape[1])
    logsumexp = new_logsumexp(len(targets), logits.device)
    target_logit = torch.full(
        targets.shape, float("nan"), dtype=torch.float32, device=logits.device
    )
    if targets.numel():
        forward_, _ = tile_ops(backend, LogitTransform.of(transform))
        forward_(logits, targets, 0, logsumexp, target_logit)
    return log_probs(target_logit, logsumexp), logsumexp


@_from_logits_op.register_fake
def _(logits, targets, transform, backend, inplace):
    per_row = logits.new_empty(targets.shape, dtype=torch.float32)
    return per_row, logits.new_empty((*targets.shape, 2), dtype=torch.float32)


@torch.library.custom_op("tralign_fast::logprobs_from_logits_backward_", mutates_args=("logits",))
def _from_logits_backward_op(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    transform: list[float],  # `LogitTransform.numbers()`
    backend: str,
) -> None:
    if targets.numel():
        _, backward_ = tile_ops(backend, LogitTransform.of(transform))
        backward_(logits, targets, 0, logsumexp, grad)


@_from_logits_backward_op.register_fake
def _(grad, logits, targets, logsumexp, transform, backend):
    return None


def _from_logits_setup(ctx, inputs, output) -> None:
    logits, targets, ctx.transform, ctx.backend, inplace = inputs
    ctx.inplace = inplace and not _overlaps(logits)
    ctx.consumption = Consumption(logits)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _from_logits_backward(ctx, grad, _):
    refuse_second_derivative("logprobs_from_logits")
    message = (
        "logprobs_from_logits: the logits were overwritten before this backward, by an earlier "
        "backward or another operation; pass inplace=False to keep them"
    )
    logits, targets, logsumexp = saved_tensors(ctx, message)
    if grad is None:
        return (None,) * 5
    ctx.consumption.check(logits, message)
    buffer = (
        logits.detach()
        if ctx.inplace
        else logits.detach().clone(memory_format=torch.contiguous_format)
    )
    _from_logits_backward_op(grad.float(), buffer, targets, logsumexp, ctx.transform, ctx.backend)
    return (buffer, None, None, None, None)


_from_logits_op.register_autograd(_from_logits_backward, setup_context=_from_logits_setup)


def _is_view_of_leaf(logits: Tensor) -> bool:
    """Whether the memory is a leaf's, the caller's own."""
    return (logits if logits._base is None else logits._base).is_leaf


def _overlaps(logits: Tensor) -> bool:  # (N, V)
    """Whether two elements may share memory, as those of an expanded tensor do."""
    (small, inner), (large, outer) = sorted(zip(logits.stride(), logits.shape, strict=True))
    return (inner > 1 and small == 0) or (outer > 1 and large < small * (inner - 1) + 1)


def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    backend: str = "auto",
    inplace: bool = True,
) -> Tensor:
    """`log_softmax(logits.float() / temperature, -1).gather(-1, targets[..., None])[..., 0]`.

    Memory: nothing of the size of the logits. The backward overwrites the logits with their
    gradient (but not a leaf tensor, the caller's own, nor a view of one, nor an expanded tensor);
    `inplace=False` takes a copy instead. Transposed logits are copied for the Triton backend.

    Args:
        logits: (..., V) fp32, bf16 or fp16 (fp64 on the torch backend).
        targets: (...) int64 in [0, V).

    Returns:
        (...) float32.

    Raises:
        ValueError: shapes do not fit, or a target lies outside the vocabulary (NaN on a GPU).
        RuntimeError: backward after the logits were overwritten, or with create_graph=True.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logprobs_from_logits: logits {tuple(logits.shape)} need targets of shape "
            f"{tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if logits.dtype not in FLOATS:
        raise ValueError(f"logprobs_from_logits: expected {FLOAT_NAMES}, got {logits.dtype}")
    refuse_forward_mode("logprobs_from_logits", logits)
    transform = LogitTransform(temperature=temperature)
    backend = pick_backend(backend, logits.device, logits.dtype)
    flat = logits.reshape(-1, logits.shape[-1])
    if backend == "triton" and flat.shape[1] > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    inplace = inplace and not _is_view_of_leaf(
        flat
    )  # here, where a compiler sees the tensor itself
    logps, _ = _from_logits_op(flat, targets.reshape(-1), transform.numbers(), backend, inplace)
    return logps.view(targets.shape)
