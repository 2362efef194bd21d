"""What PEFT trains in a policy, and why its factors are not weights.

A LoRA layer's weight is `W + s·B·A`, a DoRA layer's that with scaled rows. The mean of two such
weights is not the product of the mean factors: `(αB+(1-α)B')·(αA+(1-α)A')` differs from
`αBA+(1-α)B'A'` by `-α(1-α)·(B-B')(A-A')`.
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


# PEFT's kinds whose weight is affine in what they train: `α·W(p) + (1-α)·W(q) = W(α·p + (1-α)·q)`.
_AFFINE = ("ia3", "ln_tuning", "fourierft", "c3a", "shira", "waveft")
# LoRA's variants that are a product `B·A` all the same: on some tokens, or with scaled rows.
_VARIANTS = ("ALoraLinearVariant", "DoraLinearVariant")


def mixes_by_tensor(layer: Any) -> bool:
    """Whether mixing the tensors that a PEFT layer trains mixes its weights."""
    kind = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    return type(layer).__module__.startswith("peft.tuners.") and kind in _AFFINE


def refusal(layer: Any, adapter: str, otherwise: str, variants: bool = True) -> str | None:
    """What a PEFT layer is whose weight is no sum of products `B·A`, and the remedy; None: LoRA.

    Args:
        otherwise: what works for any kind of adapter.
        variants: whether DoRA, aLoRA and embeddings can be held too.
    """
    from peft.tuners.lora import LoraLayer

    # AdaLoRA's layers, P·Λ·Q, are LoRA's to PEFT
    own = isinstance(layer, LoraLayer) and type(layer).__module__.startswith("peft.tuners.lora.")
    kind = type(layer.lora_variant.get(adapter, None)) if own else type(layer)
    known = variants and kind.__name__ in _VARIANTS
    if kind is not type(None) and not known:
        return (
            f"a {kind.__module__}.{kind.__name__}, whose weight is not W + s·B·A; use plain LoRA, "
            f"or {otherwise}"
        )
    if kind.__name__ == "DoraLinearVariant":
        return _why_not_dora(layer)
    linear = adapter in layer.lora_A and type(layer.lora_A[adapter]) is nn.Linear
    if linear or (variants and adapter in layer.lora_embedding_A):
        return None
    return (
        f"LoRA on a layer that is not linear ({type(layer.get_base_layer()).__name__}); leave it "
        "out of target_modules, or train it whole with modules_to_save"
    )


def _why_not_dora(layer: Any) -> str | None:
    if sum(adapter in layer.lora_A for adapter in layer.active_adapters) > 1:
        return "DoRA over another active adapter, whose product it would scale; activate one"
    if layer.get_base_layer().weight.requires_grad:
        return "DoRA on a weight that is trained itself; freeze the base layer"
    return None


def mixed_parameters(policy: nn.Module, schedule: TrustRegion, place: str) -> dict[str, Tensor]:
    """What the policy trains, by name, for a reference that mixes it tensor by tensor.

    What the policy does not train never differs from it: quantised and frozen weights stay put.

    Raises:
        ValueError: soft updates of an adapter's factors, which would not mix weights.
    """
    found = (name for name, _, layer in trained_adapters(policy) if not mixes_by_tensor(layer))
    name = None if schedule.is_frozen or schedule.alpha == 1.0 else next(found, None)
    if name is not None:
        own = ", or a ref_model without an adapter" if place == "resident" else ""
        raise ValueError(
            f"reference={place!r} would mix the factors of {name}, not its weights, with "
            f'ref_model_mixup_alpha={schedule.alpha}; use reference="adapter" (LoRA), or '
            f"ref_model_mixup_alpha=1{own}"
        )
    return {name: p for name, p in named_parameters(policy).items() if p.requires_grad}
