"""A loss of `LOSSES` from the log-probs of packed tokens; with Triton in one launch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tralign_fast.ops.backend import pick_backend
from tralign_fast.ops.losses import LOSSES, PreferenceLoss, by_label, check_smoothing


def preference_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (S,)
    offsets: Tensor,  # (S + 1,) int64
    *,
    loss: str,
    length_normalized: bool = False,
    is_desirable: Tensor | None = None,  # (S,) bool
    kl: Tensor | None = None,  # ()
    backend: str = "auto",
    **options: float,
) -> PreferenceLoss:
    """A loss of `LOSSES` from log-probs of packed tokens; with Triton in one launch.

    Equals, for "dpo" and "ipo":

        sums = torch.segment_reduce(logps, "sum", offsets=offsets)
        dpo_loss(*sums.chunk(2), *ref_logps.chunk(2), **options)

    The Triton kernel makes loss, rewards and the gradient of every token in one launch and without
    the host; the torch backend is the lines above. For a trainer that holds logits:

        preference_loss(logprobs_from_logits(logits, targets), ref_logps, offsets, loss="dpo", ...)

    reads them once, and the backward overwrites them with their gradient.

    Args:
        logps: log-probs of the policy, (N,) nats; sequence s owns [offsets[s], offsets[s + 1]).
        ref_logps: summed log-probs of the reference, (S,), without gradient.
        offsets: (S + 1,) int64, rising. S = 2B: B chosen, then B rejected; S completions for KTO.
        loss: a name of `LOSSES`.
        length_normalized: log-probs are divided by the tokens of their sequence (rewards are not).
        is_desirable, kl: as `kto_loss` takes them.
        options: what the loss takes besides: beta, and label_smoothing or the weights of KTO.

    Raises:
        ValueError: an unknown loss or option, or shapes that do not fit.
    """
    spec = LOSSES.get(loss)
    if spec is None or not set(options) <= set(spec.options):
        raise ValueError(
            f"preference_loss: loss must be one of {', '.join(LOSSES)} with its options, got "
            f"{loss!r} with {sorted(options)}"
        )
    if (
        logps.dim() != 1
        or offsets.shape != (len(ref_logps) + 1,)
        or offsets.dtype != torch.int64
        or (spec.paired and len(ref_logps) % 2)
    ):
        raise ValueError(
            "preference_loss: expected logps (N,), ref_logps (S,) and int64 offsets (S + 1,), S "
            f"even for pairs, got {tuple(logps.shape)}, {tuple(ref_logps.shape)}, "
            f"{tuple(offsets.shape)} {offsets.dtype}"
        )
    if not spec.paired and (is_desirable is None or kl is None):
        raise ValueError(f"preference_loss: {loss} needs is_desirable and kl")
    ref_logps = ref_logps.detach().float()
    labels = () if is_desirable is None or kl is None else (is_desirable, kl)
    if pick_backend(backend, logps.device) == "triton":
        check_smoothing(options.get("label_smoothing", 0.0))
        name = spec.function.__name__.removesuffix("_loss")
        return _fused_loss(
            logps, ref_logps, offsets, labels, name, length_normalized, spec.paired, options
        )
    sums = torch.segment_reduce(logps.float(), "sum", offsets=offsets)
    lengths = offsets.diff() if length_normalized else torch.ones_like(ref_logps)
    sums, ref_logps = sums / lengths, ref_logps / lengths
    if not spec.paired:
        result = spec.function(sums, ref_logps, *labels, **options)
        return PreferenceLoss(result.loss, *(lengths * r for r in result[1:]))
    result = spec.function(*sums.chunk(2), *ref_logps.chunk(2), **options)
    chosen, rejected = lengths.chunk(2)
    return PreferenceLoss(
        result.loss, chosen * result.chosen_rewards, rejected * result.rejected_rewards
    )


def _fused_loss(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    labels: tuple[Tensor, ...],
    loss: str,
    length_normalized: bool,
    paired: bool,
    options: dict[str, float],
) -> PreferenceLoss:
    is_desirable, kl = (None, None) if paired else (labels[0], labels[1].detach().float())
    names = ("beta", "label_smoothing", "desirable_weight", "undesirable_weight")
    numbers = [float(options.get(name, 1.0 if "weight" in name else 0.0)) for name in names]
    value, rewards, _ = _preference_op(
        logps.float(), ref_logps, offsets, is_desirable, kl, loss, length_normalized, numbers
    )
    if is_desirable is None:
        return PreferenceLoss(value, *rewards.chunk(2))
    return PreferenceLoss(value, *by_label(rewards, is_desirable))


@torch.library.custom_op("tralign_fast::preference_loss", mutates_args=())
def _preference_op(
    logps: Tensor,  # (N,) float32
    ref_logps: Tensor,  # (S,) float32
    offsets: Tensor,  # (S + 1,) int64
    is_desirable: Tensor | None,  # (S,) bool
    kl: Tensor | None,  # () float32
    loss: str,
    length_normalized: bool,
    numbers: list[float],  # β, label smoothing, weights of desirable and undesirable
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), rewards (S,), d loss / d logps (N,))"""
    from tralign_kernels import preference_forward

    beta, smoothing, desirable_weight, undesirable_weight = numbers
    result = preference_forward(
        logps, ref_logps, offsets, loss=cast("Any", loss), beta=beta, label_smoothing=smoothing,
        length_normalized=length_normalized, is_desirable=is_desirable, kl=kl,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
    )  # fmt: skip
    return result.loss, result.rewards, result.gradient


@_preference_op.register_fake
def _(logps, ref_logps, offsets, is_desirable, kl, loss, length_normalized, numbers):
    return logps.new_empty(()), torch.empty_like(ref_logps), torch.empty_like(logps)


def _preference_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _preference_backward(ctx, grad, *_):
    (gradient,) = ctx.saved_tensors
    return (None if grad is None else grad * gradient, *(None,) * 7)


_preference_op.register_autograd(_preference_backward, setup_context=_preference_setup)
