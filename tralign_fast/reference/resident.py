"""A second model on the device, run at every step: the baseline that other places must equal."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch
from tralign_fast.ema import ema_update_
from tralign_fast.modeling import sequence_logps
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.lora import mixed_parameters
from tralign_fast.reference.trust_region import TrustRegion


class ResidentReference(ReferencePolicy):
    """Weights: a second model beside the policy. Exact for every schedule.

    Args:
        model: the reference, prepared like the policy (`modeling.prepare_model`); frozen here.
        rounding: how weights in bf16 or fp16 are rounded at a sync (`ema_update_`).
        seed: of the random bits of stochastic rounding.

    Raises:
        ValueError: soft updates of a PEFT adapter (`mixed_parameters`), or a model that lacks what
            the policy trains.
    """

    name = "resident"

    def __init__(
        self,
        policy: nn.Module,
        schedule: TrustRegion,
        model: nn.Module,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__(policy, schedule)
        self.model = model.eval()
        self.rounding = rounding
        self._generator = torch.Generator().manual_seed(seed)
        theirs = dict(model.named_parameters())
        moving = {} if schedule.is_frozen else mixed_parameters(policy, schedule, self.name)
        if other := next((name for name in moving if name not in theirs), None):
            raise ValueError(
                f"ref_model has no {other}, which the policy trains: pass a model built like the "
                "policy (with its adapter), or freeze the reference with sync_ref_model=False"
            )
        self._moving = [(theirs[name], parameter) for name, parameter in moving.items()]
        model.requires_grad_(False)

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Tensor:
        return sequence_logps(self.model, batch)

    def sync(self) -> None:
        ema_update_(
            [ref for ref, _ in self._moving],
            [theta for _, theta in self._moving],
            self.schedule.alpha,
            rounding=self.rounding,  # pyright: ignore[reportArgumentType]
            generator=self._generator,
        )

    def save_weights(self, folder: Path) -> None:
        weights = {name: weight.contiguous() for name, weight in self._weights().items()}
        save_file(weights, folder / "model.safetensors")
        torch.save(self._generator.get_state(), folder / "rounding_rng.pt")

    def load_weights(self, folder: Path) -> None:
        saved = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, weight in self._weights().items():
                weight.copy_(saved[name])
        self._generator.set_state(torch.load(folder / "rounding_rng.pt", weights_only=True))

    def _weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all weights, but for quantised ones, which nobody moves."""
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if p.is_floating_point()}
