"""Means of metrics over batches and processes, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.packing import PackedBatch
from tralign_fast.ops.losses import PreferenceLoss


class MeanMetrics:
    """Sums and counts by name. Nothing waits for the device until `pop`."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> (2,) float32: sum, count

    def add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        pair = torch.stack([total.float(), torch.as_tensor(count, device=total.device).float()])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def add_mean(self, name: str, values: Tensor) -> None:
        """Adds (n,) values; NaN counts as absent."""
        present = ~values.isnan()
        self.add(name, values.nansum(), present.sum())

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes since the last call; a name without values is left out."""
        if not self._totals:
            return {}
        names = list(self._totals)
        table = accelerator.reduce(torch.stack([self._totals[n] for n in names]), reduction="sum")
        self._totals = {}
        return {n: s / c for n, (s, c) in zip(names, table.tolist(), strict=True) if c > 0}


class PreferenceMetrics(MeanMetrics):
    """TRL's metrics of preference batches: rewards, log-probs, accuracy, KTO's KL term."""

    def record(
        self,
        batch: PackedBatch,
        logps: Tensor,  # (S,)
        result: PreferenceLoss,
        kl: Tensor | None,  # ()
    ) -> None:
        if batch.is_desirable is None:
            chosen, rejected = logps.chunk(2)
            margins = result.chosen_rewards - result.rejected_rewards
            self.add_mean("rewards/accuracies", (margins > 0).float())
            self.add_mean("rewards/margins", margins)
        else:
            own = logps[: len(batch)]
            chosen = own.masked_fill(~batch.is_desirable, float("nan"))
            rejected = own.masked_fill(batch.is_desirable, float("nan"))
        self.add_mean("rewards/chosen", result.chosen_rewards)
        self.add_mean("rewards/rejected", result.rejected_rewards)
        self.add_mean("logps/chosen", chosen)
        self.add_mean("logps/rejected", rejected)
        if kl is not None:
            self.add("kl", kl * batch.share, batch.share)

    def pop(self, accelerator: Any) -> dict[str, float]:
        averages = super().pop(accelerator)
        if {"rewards/chosen", "rewards/rejected"} <= averages.keys():
            margin = averages["rewards/chosen"] - averages["rewards/rejected"]
            averages.setdefault("rewards/margins", margin)  # of unpaired examples
        return averages
