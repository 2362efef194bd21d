"""Gradient checkpointing of a decoder's first layers alone; the others keep their activations.

A backward begins at the last layer: what that one kept is used up and freed first, so that nothing
is left of the kept layers when the first ones are computed again.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tralign_fast.model.patching import decoder_of

FIRST = "_tralign_first_layers"  # of a causal LM: the `FirstLayers` that hold; None or none: all
_LEFT_OUT = "_tralign_left_out"  # of a layer: a checkpointing of all was switched on, not its own


def how_many(layers: float, count: int, name: str) -> int:
    """Layers that are checkpointed of `count`: so many, or under 1 a share of them, rounded up.

    Raises:
        ValueError: more than there are in what has that name.
    """
    found = int(layers) if layers >= 1 else math.ceil(layers * count - 1e-9)  # 0.1 · 30 is 3
    if found > count:
        raise ValueError(
            f"gradient_checkpointing_layers={layers:g}: expected at most {count}, the layers of "
            f"{name}"
        )
    return found


class FirstLayers:
    """Which layers of a causal LM are checkpointed where checkpointing is switched on.

    A layer may be in a wrapper (PEFT's of `modules_to_save`, a compiled module).

    Args:
        causal_lm: a transformers model.
        layers: how many of the decoder's layers, from the first on, or under 1 a share of them.

    Raises:
        ValueError: no list of layers that transformers checkpoints one by one, or a shorter one.
    """

    def __init__(self, causal_lm: Any, layers: float) -> None:
        found = _decoder_layers(causal_lm)
        name = type(causal_lm).__name__
        if not found:
            raise ValueError(
                f"gradient_checkpointing_layers={layers:g}: found no list of layers in {name} that "
                "are checkpointed one by one; leave it out"
            )
        self._count = how_many(layers, len(found), name)

    def others(self, causal_lm: Any) -> list[Any]:
        """The layers behind them, those of a copy of the model if it is one. A layer may hold
        others, and share them."""
        layers = _decoder_layers(causal_lm)
        first = {module for layer in layers[: self._count] for module in layer.modules()}
        return [
            module
            for layer in layers[self._count :]
            for module in layer.modules()
            if isinstance(module, GradientCheckpointingLayer) and module not in first
        ]


def leave_out(causal_lm: Any) -> None:
    """Takes the layers behind the first ones that hold now out of a checkpointing that was switched
    on for all, and no others."""
    take_in(causal_lm)
    first = causal_lm.__dict__.get(FIRST)
    for module in [] if first is None else first.others(causal_lm):
        if module.gradient_checkpointing:
            module.gradient_checkpointing = False
            module.__dict__[_LEFT_OUT] = True


def take_in(causal_lm: Any) -> None:
    """Lets layers that were left out do as they were asked to."""
    for module in causal_lm.modules():
        if module.__dict__.pop(_LEFT_OUT, False):
            module.gradient_checkpointing = True


def _decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """The longest list of layers of the language model, without those that look at pictures."""
    decoder = decoder_of(causal_lm)
    if hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()
    lists = (
        [*module]
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and all(map(_is_layer, module))
    )
    return max(lists, key=len, default=[])


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one that transformers checkpoints, or a wrapper of it, and no list of them."""
    if isinstance(module, (GradientCheckpointingLayer, nn.ModuleList)):
        return isinstance(module, GradientCheckpointingLayer)
    return any(map(_is_layer, module.children()))
