"""From the log-probs of packed tokens to a preference loss, its gradient and its metrics.

Letters: N scored tokens, S sequences, E examples (pairs, or unpaired completions), ρ the log-ratio
`log π_θ(y|x) - log π_ref(y|x)` of a sequence.

With Triton one launch does all of it (`tralign_kernels.preference`); PyTorch's path is written out
in `_torch_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tralign_fast.ops.backend import pick_backend, warn_once
from tralign_fast.ops.consumption import refuse_second_derivative
from tralign_fast.ops.objective import Objective
from tralign_fast.ops.packed_batch import Batch, checked
from tralign_fast.ops.segments import segment_sums
from tralign_fast.ops.sequence_losses import PreferenceLoss, by_label

# Rows of `PackedLoss.totals`: the metrics of a batch, under TRL's names.
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "kl",
)  # fmt: skip
_MAX_TERMS = 4  # losses that the kernel adds up


class PackedLoss(PreferenceLoss):
    """A `PreferenceLoss`, and what a trainer logs besides; all float32 and detached."""

    rewards: Tensor  # (S,) β·ρ of whole completions; 0 for mismatched ones
    logps: Tensor  # (S,) summed log-probs of the policy
    totals: Tensor  # (7, 2) sum and count of each of `METRICS`


def packed(
    loss: Tensor,
    rewards: Tensor,
    logps: Tensor,
    totals: Tensor,
    is_desirable: Tensor | None,
) -> PackedLoss:
    if is_desirable is None:
        result = PackedLoss(loss, *rewards.chunk(2))
    else:
        result = PackedLoss(loss, *by_label(rewards[: len(is_desirable)], is_desirable))
    result.rewards, result.logps, result.totals = rewards, logps, totals
    return result


def preference_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (S,)
    offsets: Tensor,  # (S + 1,) int64
    *,
    loss: str | Sequence[str] | Objective,
    loss_weights: Sequence[float] | None = None,
    length_normalized: bool | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    is_desirable: Tensor | None = None,  # (E,) bool
    kl: Tensor | None = None,  # ()
    lengths: Tensor | None = None,  # (S,)
    token_weights: Tensor | None = None,  # (N,)
    example_weights: Tensor | None = None,  # (E,)
    nll_tokens: float | None = None,
    backend: str = "auto",
    **options: float,
) -> PackedLoss:
    """A loss of `LOSSES`, or a weighted sum of them, from log-probs of packed tokens.

    Equals, for losses of pairs:

        sums = torch.segment_reduce(logps, "sum", offsets=offsets)
        dpo_loss(*sums.chunk(2), *ref_logps.chunk(2), **options)

    The Triton kernel makes loss, rewards, metrics and the gradient of every token in one launch and
    without the host. For a trainer that holds logits:

        preference_loss(logprobs_from_logits(logits, targets), ref_logps, offsets, loss="dpo", ...)

    reads them once, and the backward overwrites them with their gradient.

    Args:
        logps: log-probs of the policy, (N,) nats; sequence s owns [offsets[s], offsets[s + 1]).
        ref_logps: summed log-probs of the reference, (S,), without gradient.
        offsets: (S + 1,) int64, rising within [0, N]. S = 2E for pairs: E chosen, then E rejected.
            For unpaired losses S = E, or S = 2E: E completions, then as many that do not belong to
            their prompt, of which KTO's KL term is made.
        loss: a name of `LOSSES`; several, to add them up; or an `Objective` with all its options.
        loss_weights, length_normalized: as in `objective_of`; rewards are never divided.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference that losses of
            the difference of scores take: reverse_kl (scores are ρ), forward_kl (1 - exp(-ρ)),
            js_divergence (log 2 + log σ(ρ)), alpha_divergence ((exp((α-1)·ρ) - 1)/(α-1)). Source:
            Wang et al. 2023, arXiv 2309.16240.
        is_desirable: labels of unpaired completions.
        kl: KTO's KL term; None: the mean of ρ over the mismatched completions. Clamped at 0.
        lengths: tokens that a sequence counts for where it is normalized; None: those it owns.
        token_weights: factors of the policy's log-probs in the sums (LD-DPO's α beyond the shorter
            completion's length, arXiv 2409.06411); `ref_logps` are summed with the same. The "sft"
            loss takes none.
        example_weights: factors of an example's loss (those of WPO, arXiv 2406.11827).
        nll_tokens: what the "sft" loss divides its sum by; None: the tokens of the chosen.
        backend: "auto" (Triton on a GPU, else PyTorch), "torch" or "triton". A loss that the kernel
            has not runs in PyTorch, with one notice.
        options: beta, and what the losses take besides.

    Raises:
        ValueError: an unknown loss or option, a value out of range, shapes that do not fit, or
            offsets that fall or lie outside [0, N] (looked for on a CPU; on a GPU, where looking
            would stall, nothing outside is read and the loss is NaN).
    """
    batch, objective = checked(
        logps, ref_logps, offsets, loss, loss_weights=loss_weights,
        length_normalized=length_normalized, f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef, is_desirable=is_desirable, kl=kl,
        lengths=lengths, token_weights=token_weights, example_weights=example_weights,
        nll_tokens=nll_tokens, **options,
    )  # fmt: skip
    if pick_backend(backend, logps.device) == "triton" and _has_kernel(objective):
        return packed(*_fused_loss(batch, objective)[:4], batch.is_desirable)
    return _torch_loss(batch, objective)


def loss_and_gradient(
    batch: Batch, objective: Objective, backend: str, wants_gradient: bool
) -> tuple[PackedLoss, Tensor | None]:
    """(what `preference_loss` returns, without a graph, d loss / d log-probs (N,) if wanted)"""
    if pick_backend(backend, batch.logps.device) == "triton" and _has_kernel(objective):
        *results, gradient = _fused_loss(batch, objective)
        return packed(*results, is_desirable=batch.is_desirable), gradient
    if not wants_gradient:
        return _torch_loss(batch, objective), None
    with torch.enable_grad():
        leaf = batch.logps.detach().requires_grad_()
        result = _torch_loss(replace(batch, logps=leaf), objective)
        (gradient,) = torch.autograd.grad(result.loss, leaf)
    detached = packed(
        result.loss.detach(), result.rewards, result.logps, result.totals, batch.is_desirable
    )
    return detached, gradient


def _has_kernel(objective: Objective) -> bool:
    """Whether the Triton kernel can do it; one notice if not."""
    missing = [
        name for name, spec in zip(objective.names, objective.specs, strict=True) if not spec.kernel
    ]
    if missing:
        reason = f"the kernel has no {', '.join(missing)}"
    elif len(objective.names) > _MAX_TERMS:
        reason = f"the kernel adds up {_MAX_TERMS} losses at most"
    else:
        return True
    warn_once(f"preference_loss runs in PyTorch: {reason}")
    return False


# --- PyTorch --------------------------------------------------------------------------------------


def _torch_loss(batch: Batch, objective: Objective) -> PackedLoss:
    """The loss in plain PyTorch; the gradient is autograd's."""
    beta, offsets = objective.beta, batch.offsets
    weighted = batch.logps
    if batch.token_weights is not None:
        weighted = weighted * batch.token_weights
    sums = segment_sums(weighted, offsets)
    ratio = sums - batch.ref_logps
    lengths = offsets.diff() if batch.lengths is None else batch.lengths
    inputs: dict[str, Tensor] = {}
    kl = None
    if objective.needs_kl:
        kl = ratio[batch.examples :].detach().mean() if batch.kl is None else batch.kl
        inputs["kl"] = kl = kl.clamp(min=0)
    if objective.sums_tokens:
        inputs["nll"] = _nll(batch)
    score = _f_prime(ratio, objective)
    loss = sums.new_zeros(())
    for spec, weight in zip(objective.specs, objective.weights, strict=True):
        share = lengths if objective.normalizes(spec) else None
        each = _each(spec, score, share, batch, {**inputs, **objective.options_of(spec)})
        if batch.example_weights is not None:
            each = each * batch.example_weights
        loss = loss + weight * each.mean()
    rewards = (beta * ratio).detach()
    if batch.is_desirable is not None:
        rewards = torch.cat(
            [rewards[: batch.examples], torch.zeros_like(rewards[batch.examples :])]
        )
    totals = _totals(rewards, sums.detach(), batch.is_desirable, kl)
    return packed(loss, rewards, sums.detach(), totals, batch.is_desirable)


def _each(
    spec: Any,
    score: Tensor,  # (S,)
    lengths: Tensor | None,  # (S,): what the scores are divided by
    batch: Batch,
    keywords: dict[str, Any],
) -> Tensor:
    """(E,) the loss of each example."""
    ref = batch.ref_logps
    if lengths is not None:
        score, ref = score / lengths, ref / lengths
    if "ref_margin" in spec.inputs:
        ref_chosen, ref_rejected = ref.chunk(2)
        keywords["ref_margin"] = ref_chosen - ref_rejected
    wanted = {o.name for o in spec.options} | set(spec.inputs)
    keywords = {name: value for name, value in keywords.items() if name in wanted}
    if spec.paired:
        return spec.function(*score.chunk(2), **keywords)
    return spec.function(score[: batch.examples], batch.is_desirable, **keywords)


def _f_prime(ratio: Tensor, objective: Objective) -> Tensor:
    """f'(π_θ/π_ref) of the f-divergence, from log-ratios (arXiv 2309.16240, table 1)."""
    divergence, alpha = objective.f_divergence, objective.f_alpha
    # beyond exp(80) fp32 would end soon
    if divergence == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=80))
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * ratio).clamp(max=80)) / (alpha - 1)
    return ratio


def _nll(batch: Batch) -> Tensor:
    """() the mean negative log-likelihood of the chosen completions' tokens."""
    sums = segment_sums(batch.logps, batch.offsets)[: batch.examples]
    tokens = batch.nll_tokens
    if tokens is None:
        return -sums.sum() / (batch.offsets[batch.examples] - batch.offsets[0])
    return -sums.sum() / tokens


def _totals(
    rewards: Tensor,  # (S,)
    logps: Tensor,  # (S,)
    is_desirable: Tensor | None,
    kl: Tensor | None,
) -> Tensor:
    """(7, 2) sum and count of each of `METRICS`."""
    zero = rewards.new_zeros(())
    if is_desirable is None:
        (chosen, rejected), (own, other) = rewards.chunk(2), logps.chunk(2)
        right, margin = (chosen > rejected).float().sum(), (chosen - rejected).sum()
        sums = [chosen.sum(), rejected.sum(), right, margin, own.sum(), other.sum(), zero]
        count = zero + len(chosen)
        counts = [count] * 6 + [zero]
    else:
        size = len(is_desirable)
        rewards, logps = rewards[:size], logps[:size]
        good = is_desirable.float()
        bad, count = 1 - good, good.sum()
        sums = [
            (rewards * good).sum(), (rewards * bad).sum(), zero, zero,
            (logps * good).sum(), (logps * bad).sum(), zero if kl is None else kl,
        ]  # fmt: skip
        counts = [count, size - count, zero, zero, count, size - count, zero + (kl is not None)]
    return torch.stack([torch.stack(sums), torch.stack(counts)], 1)


# --- Triton ---------------------------------------------------------------------------------------


def _fused_loss(
    batch: Batch, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), rewards (S,), log-probs (S,), totals (7, 2), d loss / d log-probs (N,))"""
    options = objective.options
    numbers = [
        options.get("beta", 0.0), options.get("label_smoothing", 0.0),
        options.get("discopop_tau", 1.0), options.get("desirable_weight", 1.0),
        options.get("undesirable_weight", 1.0), objective.f_alpha,
    ]  # fmt: skip
    return _preference_op(
        batch.logps, batch.ref_logps, batch.offsets, batch.is_desirable, batch.kl, batch.lengths,
        batch.token_weights, batch.example_weights, batch.nll_tokens,
        ",".join(objective.names), list(objective.weights),
        [objective.normalizes(spec) for spec in objective.specs],
        objective.f_divergence, numbers,
    )  # fmt: skip


@torch.library.custom_op("tralign_fast::preference_loss", mutates_args=())
def _preference_op(
    logps: Tensor,  # (N,) float32
    ref_logps: Tensor,  # (S,) float32
    offsets: Tensor,  # (S + 1,) int64
    is_desirable: Tensor | None,  # (E,) bool
    kl: Tensor | None,  # () float32
    lengths: Tensor | None,  # (S,) float32
    token_weights: Tensor | None,  # (N,) float32
    example_weights: Tensor | None,  # (E,) float32
    nll_tokens: float | None,
    losses: str,  # names with commas between
    weights: list[float],
    normalized: list[bool],
    f_divergence: str,
    numbers: list[float],  # β, ε, discopop's τ, weights of desirable and undesirable, f's α
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), rewards (S,), log-probs (S,), totals (7, 2), d loss / d logps (N,))"""
    from tralign_kernels import PreferenceOptions, Term, preference_forward

    *options, f_alpha = numbers
    terms = [
        Term(name, weight, normal)
        for name, weight, normal in zip(losses.split(","), weights, normalized, strict=True)
    ]
    result = preference_forward(
        logps, ref_logps, offsets, terms=terms,
        options=PreferenceOptions(*options, f_divergence=f_divergence, f_alpha=f_alpha),
        is_desirable=is_desirable, kl=kl, lengths=lengths, token_weights=token_weights,
        example_weights=example_weights, nll_tokens=nll_tokens,
    )  # fmt: skip
    return result.loss, result.rewards, result.logps, result.totals, result.gradient


@_preference_op.register_fake
def _(logps, ref_logps, *_):
    per_sequence = torch.empty_like(ref_logps)
    totals = logps.new_empty((len(METRICS), 2))
    return (
        logps.new_empty(()), per_sequence, torch.empty_like(ref_logps), totals,
        torch.empty_like(logps),
    )  # fmt: skip


def _preference_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[4])


def _preference_backward(ctx, grad, *_):
    refuse_second_derivative("preference_loss")
    (gradient,) = ctx.saved_tensors
    return (None if grad is None else grad * gradient, *(None,) * 13)


_preference_op.register_autograd(_preference_backward, setup_context=_preference_setup)
