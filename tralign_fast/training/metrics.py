"""Means of metrics over batches and processes, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops.preference import METRICS


class MeanMetrics:
    """Sums and counts by name. Nothing waits for the device until `pop`."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> (2,) float32: sum, count
        self._tables: dict[tuple[str, ...], Tensor] = {}  # names -> (len(names), 2) float32

    def add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        pair = torch.stack([total.float(), torch.as_tensor(count, device=total.device).float()])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def add_table(self, names: tuple[str, ...], table: Tensor) -> None:
        """Adds (len(names), 2) sums and counts at once."""
        known = self._tables.get(names)
        self._tables[names] = table if known is None else known + table

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes since the last call; a name without values is left out."""
        names = [*self._totals, *(name for names in self._tables for name in names)]
        if not names:
            return {}
        tables = [*(total[None] for total in self._totals.values()), *self._tables.values()]
        table = accelerator.reduce(torch.cat(tables), reduction="sum")
        self._totals, self._tables = {}, {}
        return {n: s / c for n, (s, c) in zip(names, table.tolist(), strict=True) if c > 0}


class PreferenceMetrics(MeanMetrics):
    """TRL's metrics of preference batches: rewards, log-probs, accuracy, KTO's KL term."""

    def record(self, totals: Tensor, share: float) -> None:
        """Adds what `preference_loss` says of a batch, or of a part that has this share of one."""
        if share != 1.0:  # the KL term is that of the whole batch, and counts once
            totals = totals * totals.new_tensor([[share if n == "kl" else 1.0] for n in METRICS])
        self.add_table(METRICS, totals)

    def pop(self, accelerator: Any) -> dict[str, float]:
        averages = super().pop(accelerator)
        if {"rewards/chosen", "rewards/rejected"} <= averages.keys():
            margin = averages["rewards/chosen"] - averages["rewards/rejected"]
            averages.setdefault("rewards/margins", margin)  # of unpaired examples
        return averages
