"""Liger's fused preference losses on this library's ops: change the import, keep the call.

Letters: S sequences (B pairs: the chosen first, then the rejected), T positions, H hidden,
V vocabulary, N scored positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.ops.backend import warn_once
from tralign_fast.ops.logprobs import linear_logprobs
from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import Range, objective_of
from tralign_fast.ops.sequence_losses import kto_loss

# losses of pairs whose log-ratios are all they need
LOSS_TYPES = tuple(name for name, spec in LOSSES.items() if spec.paired and not spec.inputs)
# losses whose label_smoothing Liger 0.8 ignores
_UNSMOOTHED = ("dpo", "sigmoid", "sigmoid_norm")
# the options of DPO that not every loss_type looks at
_RANGES = {
    "alpha": Range(0.0, math.inf),
    "label_smoothing": Range(0.0, 1.0),
    "discopop_tau": Range(0.0, math.inf, open_low=True),
}


class _FusedLinearLoss(nn.Module):
    """The options that both losses have, and the log-probs that both start from."""

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        compiled: bool,
        use_ref_model: bool,
        average_log_prob: bool,
        chunk_size: int,
    ) -> None:
        super().__init__()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index: expected an int, got {ignore_index!r}")
        _check_flags(use_ref_model=use_ref_model, average_log_prob=average_log_prob)
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def _logps(
        self,
        hidden: Tensor,  # (S, T, H)
        weight: Tensor,  # (V, H)
        target: Tensor,  # (S, T)
        bias: Tensor | None,  # (V,)
    ) -> Tensor:
        """(S,) float32 summed log-probs of the scored positions."""
        parts = {"hidden states": hidden, "weight": weight, "target": target, "bias": bias}
        for name, part in parts.items():
            if not isinstance(part, Tensor) and not (name == "bias" and part is None):
                raise ValueError(f"{name}: expected a tensor, got {type(part).__name__}")
        if hidden.dim() != 3 or target.shape != hidden.shape[:2]:
            raise ValueError(
                f"expected hidden states (S, T, H) and targets (S, T), got {tuple(hidden.shape)} "
                f"and {tuple(target.shape)}"
            )
        scored = target != self.ignore_index
        logps = linear_logprobs(hidden[scored], weight, target[scored], bias=bias)
        return logps.new_zeros(target.shape).masked_scatter(scored, logps).sum(1)

    @torch.no_grad()
    def _ref_logps(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        target: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """As `_logps`; zeros without a reference."""
        if not self.use_ref_model:
            return torch.zeros(len(target), dtype=torch.float32, device=target.device)
        if hidden is None or weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        return self._logps(hidden, weight, target, bias)


class FusedLinearDPOLoss(_FusedLinearLoss):
    """`LigerFusedLinearDPOLoss` of Liger 0.8: same options, arguments and return values, and IPO.

    Log-probs come from `linear_logprobs`: only positions that are scored pass the head, and the
    gradients are made in the backward, where they are wanted, not in the forward.

    Args:
        ignore_index: target of positions that are not scored.
        beta: β.
        alpha: weight of the mean NLL of the chosen, if `compute_nll_loss`.
        compiled, chunk_size: accepted and without effect; `linear_logprobs` tiles by memory.
        use_ref_model: subtract the log-probs of the reference.
        average_log_prob: mean over the scored positions instead of their sum ("ipo" takes means
            in the loss whatever this says, as its authors and TRL do).
        loss_type: one of `LOSS_TYPES`.
        label_smoothing: ε of "robust" and "exo_pair"; discopop_tau: τ of "discopop".

    Raises:
        ValueError: an unknown loss_type, a number out of its range (α is ≥ 0), or tensors that do
            not fit.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size)
        _check_flags(compute_nll_loss=compute_nll_loss)
        numbers = {"label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
        for name, value in {"alpha": alpha, **numbers}.items():
            if value not in _RANGES[name]:
                raise ValueError(f"{name}: expected a number {_RANGES[name]}, got {value!r}")
        if loss_type in LOSSES and loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {loss_type!r}"
            )
        if label_smoothing and loss_type in _UNSMOOTHED:
            warn_once(
                f"label_smoothing={label_smoothing:g}: Liger's {loss_type} loss ignores it, and so "
                'does this one; loss_type="robust" takes it'
            )
        taken = {o.name for o in LOSSES[loss_type].options} if loss_type in LOSSES else set()
        taken -= {"label_smoothing"} if loss_type in _UNSMOOTHED else set()
        options = {name: value for name, value in numbers.items() if name in taken}
        self.objective = objective_of(LOSSES, loss_type, options={"beta": beta, **options})
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (S, T, H), S = 2B
        target: Tensor,  # (S, T) int64
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (S, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (chosen_logps (B,), rejected_logps (B,), mean logit of the chosen (), of the
        rejected (), NLL of the chosen (), chosen_rewards (B,), rejected_rewards (B,))); all but
        the loss without gradient, fp32.
        """
        if target.shape[0] % 2:
            raise ValueError(
                f"expected the chosen and then as many rejected, got {target.shape[0]} sequences"
            )
        sums = self._logps(_input, lin_weight, target, bias)
        ref_sums = self._ref_logps(ref_input, ref_weight, target, ref_bias)
        lengths = (target != self.ignore_index).sum(1)
        logps = sums / lengths if self.average_log_prob else sums
        ratios = sums - ref_sums
        mean_ratios = ratios / lengths
        own = mean_ratios if self.average_log_prob else ratios
        (spec,) = self.objective.specs
        taken = mean_ratios if spec.length_normalized else own
        loss = spec.function(*taken.chunk(2), **self.objective.options).mean()
        nll = torch.zeros((), dtype=torch.float32, device=loss.device)
        if self.compute_nll_loss:
            nll = -sums.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
            loss = loss + self.alpha * nll
        logits = _logit_sums(_input, lin_weight, bias) / (target.shape[1] * lin_weight.shape[0])
        return loss, (
            *logps.detach().chunk(2),
            *(part.mean() for part in logits.chunk(2)),
            nll.detach(),
            *(self.beta * own.detach()).chunk(2),
        )


class FusedLinearKTOLoss(_FusedLinearLoss):
    """`LigerFusedLinearKTOLoss` of Liger 0.8: same options, arguments and return values.

    Args:
        ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size: as in
            `FusedLinearDPOLoss`; here `use_ref_model` is False by default, as Liger has it.

    Raises:
        ValueError: tensors that do not fit, no preference_labels or others than bool, or a `kl`
            that is not one finite number.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size)

    def forward(
        self,
        _input: Tensor,  # (S, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (S, T) int64
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (S,) bool
        ref_input: Tensor | None = None,  # (S, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | float | None = None,  # () or (1,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, sums over the desirable and over the undesirable of: log-probs, logits, rewards).

        `kl` is taken as it is: the caller clamps it (`kto_loss` does so itself).
        """
        desirable = _check_labels(preference_labels, target)
        # in front of the ratio, where kto_loss does not clamp it
        shift = _check_kl(kl)
        logps = self._logps(_input, lin_weight, target, bias)
        ref_logps = self._ref_logps(ref_input, ref_weight, target, ref_bias)
        if self.average_log_prob:
            lengths = (target != self.ignore_index).sum(1)
            logps, ref_logps = logps / lengths, ref_logps / lengths
        zero = torch.zeros((), dtype=torch.float32, device=logps.device)
        loss = kto_loss(logps - shift, ref_logps, desirable, zero, beta=self.beta).loss
        logits = _logit_sums(_input, lin_weight, bias)
        sums = [
            values[label].sum()
            for values in (logps.detach(), logits, self.beta * (logps.detach() - ref_logps))
            for label in (desirable, ~desirable)
        ]
        return loss, tuple(sums)


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if isinstance(value, str) or value not in (True, False, None):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def _check_labels(labels: Any, target: Any) -> Tensor:
    """(S,) bool, as Liger wants them: numbers might be 0 and 1, or -1 and 1."""
    wanted = f"expected bool preference_labels ({len(target)},), got"
    if not isinstance(labels, Tensor):
        raise ValueError(f"{wanted} {None if labels is None else type(labels).__name__}")
    if labels.shape != target.shape[:1] or labels.dtype != torch.bool:
        raise ValueError(f"{wanted} {labels.dtype} {tuple(labels.shape)}")
    return labels


def _check_kl(kl: Any) -> Tensor | float:
    if kl is None:
        return 0.0
    if isinstance(kl, Tensor) and kl.dtype != torch.bool:
        if kl.numel() != 1:
            raise ValueError(
                f"kl: expected one number, the mean over sequences, got {tuple(kl.shape)}"
            )
        return kl.detach().float().reshape(())
    if kl not in Range(-math.inf, math.inf):
        raise ValueError(f"kl: expected a tensor of one number, or a finite number, got {kl!r}")
    return float(kl)


@torch.no_grad()
def _logit_sums(
    hidden: Tensor,  # (S, T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
) -> Tensor:
    """(S,) the sum of a sequence's logits, all T positions: `h·ΣW + Σb` needs no logits."""
    column_sum = weight.sum(0, dtype=torch.float32)
    sums = hidden.sum(1, dtype=torch.float32) @ column_sum
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)
