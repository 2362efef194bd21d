"""The moving reference of a PEFT policy: an adapter beside the one that is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.ema import ema_update_

NAME = "ref"  # TRL's trainers use an adapter of this name as the reference
_FACTORS = ("lora_A", "lora_B")


class ReferenceAdapter:
    """An adapter "ref" that follows the active one, exactly: `Δ_ref ← α·Δ_θ + (1-α)·Δ_ref`.

    A hard update copies the trained adapter, of whatever kind. A soft update of LoRA concatenates
    along the rank: with Δ = s·B·A of rank r,

        A_ref ← [A_ref; A_θ]        B_ref ← [(1-α)·B_ref, α·B_θ]

    is the same sum of products, without an approximation and without a matrix of the base's size.
    Blocks whose weight fell under 2⁻²⁴ (fp32 keeps no more) are cut, so the rank stays under
    r·(1 + log 2⁻²⁴ / log(1-α)): 19 r at α = 0.6, 159 r at α = 0.1. The factors are fp32.

    Args:
        model: a `PeftModel`. Its "ref" adapter, if it has one, is where the reference starts;
            else the active adapter as it is now.

    Raises:
        ValueError: several adapters are active, or the active one is called "ref".
    """

    def __init__(self, model: Any) -> None:
        active = model.active_adapters
        if len(active) != 1 or active[0] == NAME:
            raise ValueError(
                f'expected one active adapter, not called "{NAME}" (the reference is), got {active}'
            )
        self.model = model
        self.policy = active[0]
        self._weights: list[float] = [1.0]  # of the blocks of rank r, oldest first; they sum to 1
        self._kind = copy.deepcopy(model.peft_config[self.policy])
        if NAME not in model.peft_config:
            config = copy.deepcopy(self._kind)
            if getattr(config, "lora_dropout", 0.0):
                config.lora_dropout = 0.0  # a reference has no dropout
            model.add_adapter(NAME, config)
            self._copy_()

    @torch.no_grad()
    def move_(self, alpha: float) -> None:
        """One update with the policy's adapter as it is now.

        Raises:
            ValueError: 0 < α < 1 and the adapter is not plain LoRA.
        """
        if alpha == 1.0:
            self._copy_()
        elif alpha > 0.0:
            self.check_soft()
            self._mix_(alpha)

    def check_soft(self) -> None:
        """Raises ValueError where a mixture of two adapters is no adapter of the same kind."""
        config = self._kind
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind == "LORA" and not getattr(config, "use_dora", False):
            odd = [name for _, name, _ in self._pairs() if name.split(".")[-3] not in _FACTORS]
            if config.bias != "none":
                odd.append("trained biases")
            if any(hasattr(theta, "to_local") for _, _, theta in self._pairs()):
                odd.append("weights sharded by FSDP2")
            if not odd:
                return
            kind = f"LoRA with {odd[0]}"
        elif getattr(config, "use_dora", False):
            kind = "DoRA"
        raise ValueError(
            f"a soft update is exact for LoRA on linear layers only, the policy is {kind}: use "
            "alpha=1 (hard updates), which copies any adapter"
        )

    def _pairs(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name of the reference's tensor, name of the policy's, the policy's tensor)."""
        mark = f".{self.policy}."
        for name, parameter in list(self.model.named_parameters()):
            if mark in f"{name}.":
                yield f"{name}.".replace(mark, f".{NAME}.")[:-1], name, parameter

    def _copy_(self) -> None:
        """Also shrinks a reference that soft updates have widened."""
        refs, thetas = [], []
        for ref_name, _, theta in self._pairs():
            owner, leaf = ref_name.rsplit(".", 1)
            ref = self.model.get_parameter(ref_name)
            if ref.shape != theta.shape:
                ref = _frozen(torch.empty_like(theta))
                setattr(self.model.get_submodule(owner), leaf, ref)
            refs.append(ref)
            thetas.append(theta)
        ema_update_(refs, thetas, 1.0)
        self._weights = [1.0]
        self._declare(1)

    def _mix_(self, alpha: float) -> None:
        kept = [w * (1 - alpha) for w in self._weights]
        cut = sum(w < 2.0**-24 for w in kept)
        for layer in self._layers():
            a_ref, b_ref = layer.lora_A[NAME], layer.lora_B[NAME]
            a, b = layer.lora_A[self.policy].weight, layer.lora_B[self.policy].weight
            gone = cut * a.shape[0]
            # scaling["ref"] is that of the policy whatever the rank (`_declare`)
            a_ref.weight = _frozen(torch.cat([a_ref.weight[gone:].float(), a.float()]))
            b_ref.weight = _frozen(
                torch.cat([(1 - alpha) * b_ref.weight[:, gone:].float(), alpha * b.float()], 1)
            )
        self._weights = [*kept[cut:], alpha]
        self._declare(len(self._weights))

    def _layers(self) -> list[Any]:
        return [m for m in self.model.modules() if self.policy in getattr(m, "lora_A", ())]

    def _declare(self, blocks: int) -> None:
        """Writes the rank into the config, so that a saved reference can be opened again."""
        config, own = self.model.peft_config[NAME], self._kind
        if not hasattr(own, "lora_alpha"):
            return
        # scaling is lora_alpha / r, or lora_alpha / sqrt(r)
        grow = blocks**0.5 if getattr(own, "use_rslora", False) else blocks
        config.r, config.lora_alpha = own.r * blocks, own.lora_alpha * grow
        config.rank_pattern = {k: r * blocks for k, r in own.rank_pattern.items()}
        config.alpha_pattern = {k: a * grow for k, a in own.alpha_pattern.items()}
        for layer in self._layers():
            layer.r[NAME] = layer.r[self.policy] * blocks
            layer.lora_alpha[NAME] = layer.lora_alpha[self.policy] * grow
            layer.scaling[NAME] = layer.scaling[self.policy]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
