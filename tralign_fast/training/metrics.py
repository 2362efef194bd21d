"""Means of metrics over batches and processes, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.packing import PackedBatch
from tralign_fast.ops.preference import METRICS, PackedLoss

# Rows of `token_totals`, under TRL's names, and what they are made of.
TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
_CHUNK = 256  # batches whose tables become one tensor: a GPU's smallest takes 512 bytes


def statistics_of(batch: PackedBatch, use_weighting: bool) -> tuple[str, ...]:
    """What `token_totals` reads, and WPO's weights."""
    names = ("entropy", "mean_logits")
    if batch.is_desirable is None:
        names = (*names, "is_top1")
    return (*names, "log_sum_sq_probs") if use_weighting else names


def token_totals(
    statistics: dict[str, Tensor],  # (grad_tokens,) each
    batch: PackedBatch,
) -> Tensor:
    """(4, 2) float32 sum and count of each of `TOKEN_METRICS`, over the tokens of a batch's own
    completions: all, chosen, rejected, chosen (of pairs alone, as in TRL)."""
    tokens, examples = batch.grad_tokens, len(batch)
    entropy, mean_logits = statistics["entropy"], statistics["mean_logits"]
    if batch.is_desirable is None:
        chosen = torch.arange(tokens, device=entropy.device) < batch.offsets[examples]
        is_top1 = statistics["is_top1"] & chosen
    else:
        lengths = batch.offsets[: examples + 1].diff()
        chosen = batch.is_desirable.repeat_interleave(lengths, output_size=tokens)
        is_top1 = torch.zeros_like(chosen)
    rejected = ~chosen
    sums = torch.stack([
        entropy, torch.where(chosen, mean_logits, 0.0), torch.where(rejected, mean_logits, 0.0),
        is_top1.float(),
    ]).sum(1)  # fmt: skip
    accuracy_of = chosen if batch.is_desirable is None else is_top1
    counts = torch.stack([torch.ones_like(chosen), chosen, rejected, accuracy_of]).sum(1)
    return torch.stack([sums, counts.float()], 1)


class MeanMetrics:
    """Sums and counts by name. Nothing waits for the device until `pop`."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> (2,) float32: sum, count

    def add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        pair = torch.stack([total.float(), torch.as_tensor(count, device=total.device).float()])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes since the last call; a name without values is left out."""
        if not self._totals:
            return {}
        table = accelerator.reduce(torch.stack([*self._totals.values()]), reduction="sum")
        names, self._totals = list(self._totals), {}
        return {n: s / c for n, (s, c) in zip(names, table.tolist(), strict=True) if c > 0}


class PreferenceMetrics(MeanMetrics):
    """TRL's metrics of preference batches: means over the batches of each one's mean, over its
    examples (rewards, log-probs) or tokens (`TOKEN_METRICS`) on all processes."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[Tensor] = []  # (batches, number of names, 2) each
        self._batches: list[Tensor] = []  # (number of names, 2) each
        self._open: Tensor | None = None  # of the parts so far of a batch
        self._share = 0.0  # of that batch

    def record(self, totals: Tensor, tokens: Tensor, share: float) -> None:
        """Adds what `preference_loss` and `token_totals` say of a batch, or of a part that has this
        share of one."""
        if share != 1.0:  # the KL term is that of the whole batch, and counts once
            totals = totals * totals.new_tensor([[share if n == "kl" else 1.0] for n in METRICS])
        table = torch.cat([totals, tokens])
        self._open = table if self._open is None else self._open + table
        self._share += share
        if self._share > 1.0 - 1e-6:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._batches.append(self._open)
        self._open, self._share = None, 0.0
        if len(self._batches) >= _CHUNK:
            self._chunks.append(torch.stack(self._batches))
            self._batches = []

    def pop(self, accelerator: Any) -> dict[str, float]:
        averages = super().pop(accelerator)
        self._close()
        tables = [*self._chunks, *([torch.stack(self._batches)] if self._batches else [])]
        self._chunks, self._batches = [], []
        if not tables:
            return averages
        names = (*METRICS, *TOKEN_METRICS)
        # a process that had fewer batches has nothing to add to the others' last ones
        table = accelerator.pad_across_processes(torch.cat(tables), dim=0)
        sums, counts = accelerator.reduce(table, reduction="sum").double().unbind(2)
        means, present = sums / counts, counts > 0
        averages |= _averages(names, means, present)
        chosen, rejected = names.index("rewards/chosen"), names.index("rewards/rejected")
        if "rewards/margins" not in averages:  # of unpaired examples: in batches that have both
            margins = (means[:, chosen] - means[:, rejected])[:, None]
            both = (present[:, chosen] & present[:, rejected])[:, None]
            averages |= _averages(("rewards/margins",), margins, both)
        return averages


def _averages(
    names: tuple[str, ...],
    means: Tensor,  # (batches, number of names)
    present: Tensor,  # likewise, bool
) -> dict[str, float]:
    totals = torch.where(present, means, 0.0).sum(0)
    table = torch.stack([totals, present.sum(0).double()], 1).tolist()
    return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}


def outputs_of(result: PackedLoss, batch: PackedBatch) -> dict[str, Tensor]:
    """What `compute_loss` returns beside the loss, and evaluation hands to `compute_metrics`."""
    if batch.is_desirable is None:
        predictions = torch.stack(result.rewards.chunk(2), dim=-1)  # (B, 2)
        labels = torch.zeros(len(batch), dtype=torch.int64, device=predictions.device)
    else:
        predictions, labels = result.rewards[: len(batch)], batch.is_desirable.long()
    return {"logps": result.logps, "predictions": predictions, "labels": labels}
