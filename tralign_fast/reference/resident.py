"""A second model on the device, run at every step: the baseline that other places must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch
from tralign_fast.model.patching import unwrapped
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.ema import ema_update_, is_quantised, local_shard
from tralign_fast.reference.base import (
    ReferenceOptions,
    ReferencePolicy,
    load_generator,
    save_generator,
)
from tralign_fast.reference.lora import mixed_parameters
from tralign_fast.reference.merged import follow_merged_, has_adapters, merged_weights
from tralign_fast.reference.second import apart, check_alike
from tralign_fast.reference.sharding import is_sharded, named_parameters
from tralign_fast.reference.trust_region import TrustRegion


class ResidentReference(ReferencePolicy):
    """Weights: a second model beside the policy. Exact for every schedule.

    A whole model follows the merged weights of a policy that trains an adapter (`follow_merged_`).

    Args:
        model: the reference, prepared like the policy (`model.prepare.prepare_model`); frozen here.
        rounding: how weights in bf16 or fp16 are rounded at a sync (`ema_update_`).
        seed: of the random bits of stochastic rounding.

    Raises:
        ValueError: soft updates of a model with a PEFT adapter (`mixed_parameters`), a model that
            lacks what the policy trains, or an adapter that it cannot follow (`merged_weights`).
    """

    name = "resident"
    needs_second_model = True

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
        self.model = model
        model.eval()  # DeepSpeed's engine returns None
        self.rounding = rounding
        self._generator = torch.Generator().manual_seed(seed)
        theirs = named_parameters(model)
        self._merges = has_adapters(policy) and not has_adapters(model)
        moving = {}
        if self._merges and not schedule.is_frozen:
            merged_weights(list(theirs.items()), policy)  # what it refuses
        elif not schedule.is_frozen:
            moving = mixed_parameters(policy, schedule, self.name)
        if other := next((name for name in moving if name not in theirs), None):
            raise ValueError(
                f"ref_model has no {other}, which the policy trains: pass a model built like the "
                "policy (with its adapter), or freeze the reference with sync_ref_model=False"
            )
        if moving:
            check_alike(theirs, named_parameters(policy))
        # what of the policy may differ from this: all that it has trained, and other frozen weights
        self._mixed: set[str] | None = None
        model.requires_grad_(False)

    @classmethod
    def build(
        cls, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
    ) -> ReferencePolicy:
        assert start is not None
        rounding = {"rounding": args.ema_rounding, "seed": args.seed}
        return cls(policy, args.trust_region, start, **rounding)

    @torch.no_grad()
    def as_model(self) -> Any:
        return unwrapped(self.model)

    def logps(self, batch: PackedBatch) -> Tensor:
        if self._merges and not self.schedule.is_frozen and is_sharded(self.policy):
            raise ValueError(
                "ref_model follows an adapter whose factors are whole: leave it out, or train with "
                "DDP or ZeRO-2"
            )
        return sequence_logps(self.model, batch)

    def sync(self) -> None:
        # looked up here: FSDP2 puts other parameters into the policy when training starts
        theirs = named_parameters(self.model)
        options = {"rounding": self.rounding, "generator": self._generator}
        if self._merges:
            names = list(theirs.items())
            follow_merged_(names, self.policy, self.schedule.alpha, **options)  # pyright: ignore[reportArgumentType]
            return
        ours = named_parameters(self.policy)
        if self._mixed is None:
            self._mixed = apart(theirs, ours)
        self._mixed |= {name for name, p in ours.items() if p.requires_grad}
        moving = {name: p for name, p in ours.items() if name in self._mixed}
        ema_update_(
            [theirs[name] for name in moving],
            list(moving.values()),
            self.schedule.alpha,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def save_weights(self, folder: Path) -> None:
        self._save_tensors(folder, "model.safetensors", self._weights())
        save_generator(self._generator, folder)

    def load_weights(self, folder: Path) -> None:
        saved = self._load_tensors(folder, "model.safetensors")
        with torch.no_grad():
            for name, weight in self._weights().items():
                local_shard(weight).copy_(saved[name])
        load_generator(self._generator, folder)

    def _cut_alike(self) -> dict[str, nn.Parameter]:
        return named_parameters(self.model)

    def _weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all weights, but for quantised ones, which nobody moves."""
        named = named_parameters(self.model).items()
        return {name: p for name, p in named if not is_quantised(p)}
