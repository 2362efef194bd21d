"""What the loss of a micro-batch needs to know beyond it: of its other parts, of all processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.distributed.levelling import mean_of_all
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.training.load_balance import with_slopes


def whole_batch_terms(
    trainer: Any, model: nn.Module, inputs: PackedBatch | SplitBatch
) -> tuple[PackedBatch, ...]:
    """The parts of a batch, each with what the loss needs to know of the whole: KTO's KL term,
    which is computed first, and the tokens that an SFT term is a mean over."""
    parts = trainer.parts_of(inputs)
    if len(parts) == 1:
        return parts
    if trainer.aux_loss_enabled:
        parts = with_slopes(trainer, model, parts)
    objective = trainer._objective
    if objective.sums_tokens:
        tokens = sum(sum(p.scored_lengths[: len(p)]) for p in parts if p.share > 0)
        counts = ((p.nll_tokens or tokens * p.share) if p.share > 0 else None for p in parts)
        parts = tuple(
            dataclasses.replace(p, nll_tokens=n) for p, n in zip(parts, counts, strict=True)
        )
    if not objective.needs_kl:
        return parts
    total: Any = 0.0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for part in (part.to(trainer.args.device) for part in parts):
            gap = sequence_logps(model, part) - trainer.reference.logps(part)
            total = total + part.share * gap[len(part) :].mean()
    total = mean_of_all(trainer.accelerator, total, sum(p.own_examples for p in parts))
    return tuple(dataclasses.replace(part, kl=total) for part in parts)


def mean_kl(trainer: Any, batch: PackedBatch, logps: Tensor, ref_logps: Tensor) -> Tensor | None:
    """() KTO's KL term of all processes; None: there is none, or the loss makes it itself."""
    if not trainer._objective.needs_kl or batch.kl is not None:
        return batch.kl
    if trainer.accelerator.num_processes == 1:
        return None
    gap = batch.sum_per_sequence(logps.detach()) - ref_logps
    return mean_of_all(trainer.accelerator, gap[len(batch) :].mean(), batch.own_examples)
