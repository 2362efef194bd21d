"""The trainer's side of the load-balancing loss (`tralign_fast.model.router`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tralign_fast.data.packing import PackedBatch
from tralign_fast.model.router import asked_for_counts, slopes_of
from tralign_fast.model.scoring import balance_alone


def with_slopes(trainer: Any, model: Any, parts: Sequence[PackedBatch]) -> tuple[PackedBatch, ...]:
    """Parts of a batch, each with the slopes of the whole: their losses, weighed by their shares,
    add up to the loss of the whole. Runs the decoder once more on every part, without gradient.
    """
    total: Any = 0.0
    with trainer.compute_loss_context_manager():
        for part in parts:
            counts = balance_alone(model, asked_for_counts(part.to(trainer.args.device)))
            if counts is None:
                trainer.aux_loss_enabled = False
                return tuple(parts)
            total = total + counts * (part.share > 0)  # what fills up a process's parts is no part
    slopes = slopes_of(total)
    return tuple(
        dataclasses.replace(p, router_slopes=slopes / p.share if p.share > 0 else slopes * 0.0)
        for p in parts
    )


def add_balance(trainer: Any, loss: Tensor, batch: PackedBatch) -> Tensor:
    """The loss and that of the batch's routers, which is logged as TRL logs it.

    A model that has no answer is not asked again.
    """
    if batch.balance is None:
        return loss
    aux = batch.balance.answer
    if aux is None:
        trainer.aux_loss_enabled = False
        return loss
    if batch.share > 0:
        mode = "train" if trainer.model.training else "eval"
        share = aux.detach().new_full((), batch.share)  # filled there: no copy waits for the device
        trainer._means[mode].add("aux_loss", aux.detach() * share, share)
    return loss + trainer.router_aux_loss_coef * aux.to(loss.device)
