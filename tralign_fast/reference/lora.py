"""What PEFT trains in a policy, and why its factors are not weights.

A LoRA layer's weight is `W + s·B·A`. The mean of two such weights is not the product of the mean
factors: `(αB+(1-α)B')·(αA+(1-α)A')` differs from `αBA+(1-α)B'A'` by `-α(1-α)·(B-B')(A-A')`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tralign_fast.reference.sharding import named_parameters
from tralign_fast.reference.trust_region import TrustRegion


def trained_adapters(policy: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(module's name, adapter's name, PEFT layer) wherever an active adapter is trained."""
    try:
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for name, layer in policy.named_modules():
        # rows of an embedding are weights
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            for adapter in layer.active_adapters:
                if any(p.requires_grad for p in _parameters(layer, adapter)):
                    yield name, adapter, layer


def _parameters(layer: Any, adapter: str) -> Iterator[nn.Parameter]:
    for part in (getattr(layer, name) for name in layer.adapter_layer_names):
        if adapter in part:
            held = part[adapter]
            yield from [held] if isinstance(held, nn.Parameter) else held.parameters()


def refusal(layer: Any, adapter: str, otherwise: str) -> str | None:
    """What a PEFT layer is whose weight is not `W + s·B·A`, and the remedy; None: plain LoRA.

    Args:
        otherwise: what works for any kind of adapter.
    """
    from peft.tuners.lora import LoraLayer

    kind = None if isinstance(layer, LoraLayer) else type(layer)
    kind = kind or type(layer.lora_variant.get(adapter, None))
    if kind is not type(None):
        return (
            f"a {kind.__module__}.{kind.__name__}, whose weight is not W + s·B·A; use plain LoRA, "
            f"or {otherwise}"
        )
    # stacked experts share a pair of factors in a layer of their own kind
    linear = adapter in layer.lora_A and type(layer.lora_A[adapter]) is nn.Linear
    if linear and type(layer).__name__ != "ParamWrapper":
        return None
    return (
        f"LoRA on a layer that is not linear ({type(layer.get_base_layer()).__name__}); leave it "
        "out of target_modules, or train it whole with modules_to_save"
    )


def mixed_parameters(policy: nn.Module, schedule: TrustRegion, place: str) -> dict[str, Tensor]:
    """What the policy trains, by name, for a reference that mixes it tensor by tensor.

    What the policy does not train never differs from it: quantised and frozen weights stay put.

    Raises:
        ValueError: soft updates of an adapter's factors, which would not mix weights.
    """
    found = next(trained_adapters(policy), None)
    if found is not None and not schedule.is_frozen and schedule.alpha < 1.0:
        raise ValueError(
            f"reference={place!r} would mix the factors of {found[0]}, not its weights, with "
            f'ref_model_mixup_alpha={schedule.alpha}; use reference="adapter" (LoRA), or '
            "ref_model_mixup_alpha=1"
        )
    return {name: p for name, p in named_parameters(policy).items() if p.requires_grad}
