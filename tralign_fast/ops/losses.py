"""Preference losses: pure functions of per-sequence log-probabilities, in fp32.

Letters: B pairs, S sequences, β the strength of the pull towards the reference, Δ the difference of
the two log-ratios `log π_θ(y|x) - log π_ref(y|x)` of a pair.

To add a loss, write one function here and name it in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    check_smoothing(label_smoothing)
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
    return _result(loss, *by_label(beta * log_ratio, is_desirable))


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


def check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def by_label(rewards: Tensor, is_desirable: Tensor) -> tuple[Tensor, Tensor]:
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
