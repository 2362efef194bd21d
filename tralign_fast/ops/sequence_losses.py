"""The losses as functions of per-sequence log-probabilities, for trainers that hold those.

Letters: B pairs, S sequences, β the strength of the pull towards the reference, Δ the difference of
the two log-ratios `log π_θ(y|x) - log π_ref(y|x)` of a pair. The equations are in `ops.losses`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import objective_of


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
        label_smoothing: ε in [0, 0.5). TRL 1.16's sigmoid loss has none.

    Raises:
        ValueError: the four tensors differ in shape, or β or ε is out of range.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with a moving reference,
    Gorbatovski et al. 2024, arXiv 2404.09656, eq. 4. Smoothing: E. Mitchell, "A note on DPO with
    noisy preferences".
    """
    return pair_loss(
        "dpo", chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
        beta=beta, label_smoothing=label_smoothing,
    )  # fmt: skip


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
        ValueError: the four tensors differ in shape, or β is out of range.

    Source: Azar et al. 2023, arXiv 2310.12036, eq. 17; with a moving reference, arXiv 2404.09656.
    """
    return pair_loss(
        "ipo", chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )


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
        ValueError: tensors differ in shape, `is_desirable` is not bool, `kl` is not one number, or
            an option is out of range.

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
    options = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    objective = objective_of(LOSSES, "kto", options=options)
    ratio = logps.float() - ref_logps.detach().float()
    loss = LOSSES["kto"].function(
        ratio, is_desirable, kl=check_kl(kl).detach().float(), **objective.options
    )
    rewards = (beta * ratio).detach()
    return PreferenceLoss(loss.mean(), *by_label(rewards, is_desirable))


def pair_loss(
    name: str,
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    **options: float,
) -> PreferenceLoss:
    """Any loss of pairs of `LOSSES` that needs their log-probs alone (not "sft").

    Args:
        name: of the loss.
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: as for `dpo_loss`;
            divided by the completion's tokens where the loss is length-normalized.
        options: beta, and what the loss takes besides.

    Raises:
        ValueError: an unknown loss or option, a value out of range, or tensors of several shapes.
    """
    objective = objective_of(LOSSES, name, options=options)
    if len(objective.specs) != 1:
        raise ValueError(f"pair_loss: expected one loss, got {name!r}; preference_loss adds up")
    spec = objective.specs[0]
    if not spec.paired or "nll" in spec.inputs:
        raise ValueError(f"pair_loss: {name} is no loss of pairs alone; use preference_loss")
    tensors = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"expected four log-prob tensors of one shape (B,), got {shapes}")
    ref_chosen, ref_rejected = (
        ref_chosen_logps.detach().float(),
        ref_rejected_logps.detach().float(),
    )
    chosen, rejected = chosen_logps.float() - ref_chosen, rejected_logps.float() - ref_rejected
    known = {"ref_margin": ref_chosen - ref_rejected}
    inputs = {key: known[key] for key in spec.inputs}
    loss = spec.function(chosen, rejected, **inputs, **objective.options)
    beta = objective.beta
    return PreferenceLoss(loss.mean(), (beta * chosen).detach(), (beta * rejected).detach())


def by_label(rewards: Tensor, is_desirable: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) rewards of the desirable and of the undesirable, NaN at those of the other label."""
    nan = float("nan")
    return rewards.masked_fill(~is_desirable, nan), rewards.masked_fill(is_desirable, nan)


def check_kl(kl: Tensor) -> Tensor:
    """() of `kl`, which may be (1,).

    Raises:
        ValueError: not one number.
    """
    if not isinstance(kl, Tensor) or kl.numel() != 1:
        shape = tuple(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
        raise ValueError(f"kl: expected one number, the mean over completions, got {shape}")
    return kl.reshape(())
