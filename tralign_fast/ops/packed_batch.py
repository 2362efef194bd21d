"""The arguments of a preference loss of packed tokens: their checks, and what is left of them.

Letters: N scored tokens, S sequences, E examples (pairs, or unpaired completions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import Objective, Range, objective_of
from tralign_fast.ops.sequence_losses import check_kl


@dataclass(frozen=True)
class Batch:
    """The tensors of one call; log-probs are float32."""

    logps: Tensor  # (N,)
    ref_logps: Tensor  # (S,)
    offsets: Tensor  # (S + 1,)
    is_desirable: Tensor | None  # (E,)
    kl: Tensor | None  # ()
    lengths: Tensor | None  # (S,)
    token_weights: Tensor | None  # (N,)
    example_weights: Tensor | None  # (E,)
    nll_tokens: float | None

    @property
    def examples(self) -> int:
        return len(self.ref_logps) // 2 if self.is_desirable is None else len(self.is_desirable)


def checked(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    loss: str | Sequence[str] | Objective,
    *,
    loss_weights: Sequence[float] | None = None,
    length_normalized: bool | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    is_desirable: Tensor | None = None,
    kl: Tensor | None = None,
    lengths: Tensor | None = None,
    token_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    nll_tokens: float | None = None,
    **options: float,
) -> tuple[Batch, Objective]:
    """The arguments of `preference_loss`, or its errors."""
    objective = _objective(
        loss, loss_weights, options, f_divergence_type, f_alpha_divergence_coef, length_normalized
    )
    kl = None if kl is None else check_kl(kl).detach().float()
    _check_tensors(
        logps=logps, ref_logps=ref_logps, offsets=offsets, is_desirable=is_desirable, kl=kl,
        lengths=lengths, token_weights=token_weights, example_weights=example_weights,
    )  # fmt: skip
    batch = Batch(
        logps.float(), ref_logps.detach().float(), offsets, is_desirable, kl, _numbers(lengths),
        _numbers(token_weights), _numbers(example_weights), nll_tokens,
    )  # fmt: skip
    _check_batch(batch, objective)
    return batch, objective


def _objective(
    loss: str | Sequence[str] | Objective,
    weights: Sequence[float] | None,
    options: dict[str, float],
    f_divergence: str,
    f_alpha: float,
    length_normalized: bool | None,
) -> Objective:
    if not isinstance(loss, Objective):
        return objective_of(
            LOSSES, loss, weights, options, f_divergence=f_divergence, f_alpha=f_alpha,
            length_normalized=length_normalized,
        )  # fmt: skip
    given = [weights, length_normalized, f_divergence, f_alpha]
    if options or given != [None, None, "reverse_kl", 0.5]:
        raise ValueError("preference_loss: an Objective has its options; expected no others")
    return loss


def _numbers(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _check_tensors(**tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"preference_loss: expected a tensor {name}, got {type(tensor)}")
    for name in ("logps", "ref_logps"):
        if not given[name].is_floating_point():
            raise ValueError(f"preference_loss: {name} must be real, got {given[name].dtype}")
    devices = {name: str(tensor.device) for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"preference_loss: expected tensors on one device, got {devices}")


def _check_batch(batch: Batch, objective: Objective) -> None:
    tokens, sequences = len(batch.logps) if batch.logps.dim() else 0, batch.ref_logps.numel()
    offsets, desirable = batch.offsets, batch.is_desirable
    if (
        batch.logps.dim() != 1
        or batch.ref_logps.dim() != 1
        or offsets.shape != (sequences + 1,)
        or offsets.dtype != torch.int64
        or (objective.paired and sequences % 2)
        or not sequences
    ):
        raise ValueError(
            "preference_loss: expected logps (N,), ref_logps (S,) and int64 offsets (S + 1,), S "
            f"even for pairs and not 0, got {tuple(batch.logps.shape)}, "
            f"{tuple(batch.ref_logps.shape)}, {tuple(offsets.shape)} {offsets.dtype}"
        )
    if objective.paired and (desirable is not None or batch.kl is not None):
        raise ValueError(
            f"preference_loss: {' + '.join(objective.names)} takes pairs, no is_desirable and no kl"
        )
    if not objective.paired:
        _check_labels(batch, objective)
    expected = {
        "lengths": (batch.lengths, sequences),
        "token_weights": (batch.token_weights, tokens),
        "example_weights": (batch.example_weights, batch.examples),
    }
    for name, (tensor, size) in expected.items():
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(
                f"preference_loss: expected {name} ({size},), got {tuple(tensor.shape)}"
            )
    if batch.example_weights is not None and not objective.weighs_examples:
        raise ValueError(
            f"preference_loss: {' + '.join(objective.names)} sorts the examples of a batch or is a "
            "mean over its tokens, and takes no weights of single examples"
        )
    if batch.nll_tokens is not None and batch.nll_tokens not in Range(0, math.inf, open_low=True):
        raise ValueError(f"preference_loss: nll_tokens must be positive, got {batch.nll_tokens}")
    _check_offsets(batch, objective, tokens)


def _check_labels(batch: Batch, objective: Objective) -> None:
    names, sequences = " + ".join(objective.names), batch.ref_logps.numel()
    if batch.is_desirable is None:
        raise ValueError(f"preference_loss: {names} needs is_desirable")
    if batch.is_desirable.dtype != torch.bool or batch.is_desirable.dim() != 1:
        raise ValueError(
            f"preference_loss: expected a bool is_desirable (E,), got {batch.is_desirable.dtype} "
            f"{tuple(batch.is_desirable.shape)}"
        )
    if sequences not in (batch.examples, 2 * batch.examples):
        raise ValueError(
            "preference_loss: expected as many sequences as labels, or twice as many (mismatched "
            f"completions after them), got {sequences} sequences and {batch.examples} labels"
        )
    if objective.needs_kl and batch.kl is None and sequences != 2 * batch.examples:
        raise ValueError(
            f"preference_loss: {names} needs kl, or mismatched completions after the own ones to "
            "make it of"
        )


def _check_offsets(batch: Batch, objective: Objective, tokens: int) -> None:
    offsets = batch.offsets
    if offsets.device.type != "cpu" or type(offsets) is not Tensor:
        return  # looking would stall a GPU; fake tensors have nothing to look at
    bounds = offsets.tolist()
    if bounds[0] < 0 or bounds[-1] > tokens or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            f"preference_loss: offsets must rise within [0, {tokens}], the number of log-probs, "
            f"got {bounds[:20]}"
        )
    if any(objective.normalizes(spec) for spec in objective.specs):
        lengths = [b - a for a, b in pairwise(bounds)]
        lengths = lengths if batch.lengths is None else batch.lengths.tolist()
        if min(lengths[: 2 * batch.examples if objective.paired else batch.examples]) <= 0:
            raise ValueError(
                "preference_loss: a length-normalized loss needs sequences of one token or more, "
                f"got lengths {lengths[:20]}"
            )
