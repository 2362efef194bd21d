"""A second model beside the policy: the two are apart and alike; where their weights differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.ops.ema import is_quantised, local_shard


def refuse_shared(ref: nn.Module, policy: nn.Module) -> None:
    """A reference that shares a trained weight with the policy would move with it.

    PEFT puts its layers into the base model: that one is the policy, too.

    Raises:
        ValueError: `ref` has a parameter that the policy trains, or one in the same memory.
    """
    trained = {_memory(p) for p in policy.parameters() if p.requires_grad}
    if any(_memory(p) in trained for p in ref.parameters()):
        raise ValueError(
            "ref_model is the policy itself, or shares weights with it: pass a model of its own, "
            "such as copy.deepcopy(model) from before training"
        )


def _memory(parameter: Tensor) -> int:
    """What tells the storage of a parameter, or the parameter where there is none to ask."""
    if hasattr(parameter, "ds_tensor") or is_quantised(parameter):
        return id(parameter)
    return local_shard(parameter).untyped_storage()._cdata


def check_alike(ref: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the parameters of a reference, by name, are no policy's; packed
    weights of a quantised one have a shape of their own."""
    for name, tensor in ref.items():
        own = policy.get(name)
        if own is None:
            raise ValueError(
                f"policy and reference are different models (only the reference has {name}): "
                "expected one architecture"
            )
        mine, other = _shape(own), _shape(tensor)
        if mine != other and not (is_quantised(own) or is_quantised(tensor)):
            raise ValueError(
                f"{name} is {other} in ref_model and {mine} in the policy: expected one "
                "architecture and one vocabulary (resize_token_embeddings), as the reference moves "
                "or changes places with the policy; a frozen one may differ with "
                'reference="resident"'
            )


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def apart(ref: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> set[str]:
    """The names of frozen weights that are others in the reference, as far as this process has
    them; quantised ones are left out."""
    return {
        name
        for name, own in policy.items()
        if name in ref and not own.requires_grad and _differ(ref[name], own)
    }


def _differ(ref: Tensor, own: Tensor) -> bool:
    if is_quantised(ref) or is_quantised(own):
        return False
    mine, other = local_shard(own), local_shard(ref)
    return mine.shape != other.shape or not torch.equal(mine.to(other), other)
