"""Preference losses: pure functions of per-sequence log-probabilities, in fp32.

Letters: B pairs, S sequences, β the strength of the pull towards the reference, Δ the difference of
the two log-ratios `log π_θ(y|x) - log π_ref(y|x)` of a pair.

To add a loss, write one function here and name it in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tralign_fast._backend import pick_backend


class PreferenceLoss(NamedTuple):
    """What a loss returns. Rewards are detached."""

    loss: Tensor  # () float32, the mean over pairs (or over sequences for KTO)
    chosen_rewards: Tensor  # (B,) float32, β·(log π_θ - log π_ref) of the chosen
    rejected_rewards: Tensor  # (B,) float32, of the rejected


def dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """`-log σ(β·Δ)`, averaged over pairs.

    With `label_smoothing` ε: `-(1-ε)·log σ(β·Δ) - ε·log σ(-β·Δ)`, the conservative DPO loss for
    labels that are flipped with probability ε.

    Args:
        chosen_logps, rejected_logps: summed log-probabilities of the policy, (B,), nats.
        ref_chosen_logps, ref_rejected_logps: the same of the reference, without gradient.
        beta: β > 0.
        label_smoothing: ε in [0, 0.5).

    Raises:
        ValueError: the four tensors differ in shape, or ε is out of range.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with a moving reference,
    Gorbatovski et al. 2024, arXiv 2404.09656, eq. 4. Smoothing: E. Mitchell, "A note on DPO with
    noisy preferences".
    """
    _check_smoothing(label_smoothing)
    chosen, rejected = _log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    scaled = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(scaled)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-scaled)
    return _result(loss, beta * chosen, beta * rejected)


def ipo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    """`(Δ - 1/(2β))²`, averaged over pairs.

    Summed log-probabilities give the loss of the paper. Log-probabilities divided by the
    completion's length (policy and reference alike) give the length-normalised form that the
    authors of IPO use in practice and that TRL and `TRTrainer` take by default.

    Args:
        chosen_logps, rejected_logps: log-probabilities of the policy, (B,), nats or nats per token.
        ref_chosen_logps, ref_rejected_logps: the same of the reference, without gradient.
        beta: β > 0, called τ in the paper.

    Raises:
        ValueError: the four tensors differ in shape.

    Source: Azar et al. 2023, arXiv 2310.12036, eq. 17; with a moving reference, arXiv 2404.09656.
    """
    chosen, rejected = _log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return _result(loss, beta * chosen, beta * rejected)


def kto_loss(
    logps: Tensor,  # (S,)
    ref_logps: Tensor,  # (S,)
    is_desirable: Tensor,  # (S,) bool
    kl: Tensor,  # ()
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """`λ_y - λ_y·σ(±β·(r - KL))`, averaged over sequences, with r the log-ratio of a completion.

    The sign is + for desirable completions (weight `desirable_weight`) and - for undesirable ones
    (`undesirable_weight`). The reference point KL is detached and clamped at 0 here; the caller
    averages it over completions that do not belong to their prompt, and over processes.

    Args:
        logps, ref_logps: summed log-probabilities, (S,), nats.
        is_desirable: (S,) bool.
        kl: scalar, the mean of `log π_θ - log π_ref` over mismatched completions.
        beta: β > 0.

    Returns:
        Rewards of shape (S,), NaN at the sequences of the other label, so that shapes are static
        and nothing waits for the device; `torch.nanmean` averages them.

    Raises:
        ValueError: tensors differ in shape, or `is_desirable` is not bool.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7-8; with a moving reference,
    arXiv 2404.09656.
    """
    if (
        not (logps.shape == ref_logps.shape == is_desirable.shape)
        or is_desirable.dtype != torch.bool
    ):
        raise ValueError(
            "kto_loss: expected logps, ref_logps and a bool is_desirable of one shape (S,), got "
            f"{tuple(logps.shape)}, {tuple(ref_logps.shape)}, {tuple(is_desirable.shape)} "
            f"{is_desirable.dtype}"
        )
    log_ratio = logps.float() - ref_logps.detach().float()
    kl = kl.detach().float().clamp(min=0)
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight)
    loss = weight * (1 - torch.sigmoid(beta * sign * (log_ratio - kl)))
    return _result(loss, *_by_label(beta * log_ratio, is_desirable))


@dataclass(frozen=True)
class LossSpec:
    """How a trainer feeds a loss.

    `options` are the names of the `TRConfig` fields that the function takes as keywords.
    """

    function: Callable[..., PreferenceLoss]
    # True: (chosen, rejected, ref_chosen, ref_rejected); False: (logps, ref, label, kl)
    paired: bool
    options: tuple[str, ...]
    length_normalized: bool = False  # divide log-probs by the completion's length first


LOSSES: dict[str, LossSpec] = {
    "dpo": LossSpec(dpo_loss, paired=True, options=("beta", "label_smoothing")),
    "ipo": LossSpec(ipo_loss, paired=True, options=("beta",), length_normalized=True),
    "kto": LossSpec(
        kto_loss, paired=False, options=("beta", "desirable_weight", "undesirable_weight")
    ),
}
LOSSES["sigmoid"] = LOSSES["dpo"]  # TRL's name


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
        _check_smoothing(options.get("label_smoothing", 0.0))
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
    return PreferenceLoss(value, *_by_label(rewards, is_desirable))


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


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def _by_label(rewards: Tensor, is_desirable: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) rewards of the desirable and of the undesirable, NaN at those of the other label."""
    nan = float("nan")
    return rewards.masked_fill(~is_desirable, nan), rewards.masked_fill(is_desirable, nan)


def _log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) log π_θ - log π_ref of the chosen and of the rejected, fp32."""
    shapes = [tuple(t.shape) for t in (chosen, rejected, ref_chosen, ref_rejected)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"expected four log-prob tensors of one shape (B,), got {shapes}")
    return (
        chosen.float() - ref_chosen.detach().float(),
        rejected.float() - ref_rejected.detach().float(),
    )


def _result(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PreferenceLoss:
    return PreferenceLoss(loss.mean(), chosen_rewards.detach(), rejected_rewards.detach())
