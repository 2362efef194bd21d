"""Means of metrics over batches and processes, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
