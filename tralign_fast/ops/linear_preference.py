"""The LM head and a preference loss as one node of autograd: hidden states to loss and back.

Letters: N scored tokens, S sequences, H hidden size, V vocabulary.

The forward makes the log-probs (`ops.logprobs`), then the loss and at once its gradient by every
token's log-prob (`ops.preference`): the coefficient that the head's backward takes, times whatever
the loss itself is multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops.consumption import refuse_second_derivative
from tralign_fast.ops.head_operator import HeadNode, HeadOptions, linear_logprobs_op
from tralign_fast.ops.logprobs import checked_options, is_cut, linear_logprobs, wants_grad
from tralign_fast.ops.objective import Objective
from tralign_fast.ops.packed_batch import Batch, checked
from tralign_fast.ops.preference import PackedLoss, loss_and_gradient, packed, preference_loss
from tralign_fast.ops.transform import LogitTransform


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (N,)
        bias: Tensor | None,  # (V,)
        batch: Batch,  # without log-probs
        objective: Objective,
        options: HeadOptions,
        backend: str,  # of the loss
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss (), rewards (S,), log-probs (S,), totals (7, 2))"""
        inputs = (hidden, weight, targets, bias)
        logps, logsumexp, kept, _ = linear_logprobs_op(*inputs, *options)
        result, gradient = loss_and_gradient(
            replace(batch, logps=logps), objective, backend, wants_gradient
        )
        if wants_gradient:
            assert gradient is not None
            HeadNode.save(ctx, inputs, options, logps, logsumexp, kept, gradient)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.rewards, result.logps, result.totals)
        return result.loss, result.rewards, result.logps, result.totals

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("linear_preference_loss")
        *saved, gradient = HeadNode.saved(ctx)
        nothing = (None,) * 5
        if grad is None:
            return (None, None, None, None, *nothing)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        d_hidden, d_weight, d_bias = HeadNode.gradients(ctx, tuple(saved), grad * gradient, needs)
        return (d_hidden, d_weight, None, d_bias, *nothing)


def linear_preference_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    offsets: Tensor,  # (S + 1,) int64
    ref_logps: Tensor,  # (S,)
    *,
    loss: str | Sequence[str] | Objective,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
    **preference: Any,
) -> PackedLoss:
    """A loss of `LOSSES` from hidden states, head and loss in one node of autograd.

    Equals

        logps = linear_logprobs(hidden, weight, targets, bias=bias, ...)
        preference_loss(logps, ref_logps, offsets, loss=loss, **preference)

    with the same kernels, one node fewer and no log-probs of tokens for the caller. The forward
    makes the loss's gradient by every log-prob too, which the head's backward takes times the
    gradient of the loss: the loss may be scaled, or be part of a sum. Memory and products as in
    `linear_logprobs`. Where something stands between log-probs and loss (a KL term of several
    processes, weights made of the log-probs), the two calls are the way.

    Args:
        hidden, weight, targets, bias: as in `linear_logprobs`.
        softcap, logit_scale, temperature, logits_budget_mb, vocab_filter, kept: likewise.
        offsets, ref_logps, loss: as in `preference_loss`; sequence s owns the tokens
            [offsets[s], offsets[s + 1]).
        backend: of both: "auto" (Triton on a GPU, else PyTorch), "torch" or "triton".
        preference: beta, and every other keyword of `preference_loss`.

    Returns:
        What `preference_loss` returns; the loss alone has a gradient.

    Raises:
        ValueError: as both.
        RuntimeError: a second backward through logits that the first one has overwritten, or one
            with create_graph=True.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    if is_cut(weight):  # by a node of its own, which several processes run
        logps = linear_logprobs(
            hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale,
            temperature=temperature, backend=backend, logits_budget_mb=logits_budget_mb,
            vocab_filter=vocab_filter, kept=kept,
        )  # fmt: skip
        return preference_loss(logps, ref_logps, offsets, loss=loss, backend=backend, **preference)
    options = checked_options(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter,
        kept=kept,
    )  # fmt: skip
    # checked before the head's work; the log-probs that belong there come from it
    place = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    batch, objective = checked(place, ref_logps, offsets, loss, **preference)
    results = _LinearPreference.apply(
        hidden, weight, targets, bias, batch, objective, options, backend,
        wants_grad(hidden, weight, bias),
    )  # fmt: skip
    return packed(*results, is_desirable=batch.is_desirable)
