"""Keys and values in the order of the sequences that see them, from a packed row's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.layout import KeyGather, VarlenArguments


class GatherKeys(torch.autograd.Function):
    """`tokens[key_index]` of each tensor, whose backward would sort the index to sum the same way
    in every run.

    Here a token's gradients are summed in the order of its completions. One node for keys and
    values, for the host's time.
    """

    @staticmethod
    def forward(
        ctx: Any, arguments: VarlenArguments | KeyGather, *tokens: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.arguments, ctx.tokens = arguments, tokens[0].shape[0]
        ctx.set_materialize_grads(False)
        return tuple(t.index_select(0, arguments.key_index) for t in tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (
            None,
            *(None if g is None else _ungathered(g, ctx.arguments, ctx.tokens) for g in grads),
        )


def _ungathered(grad: Tensor, arguments: VarlenArguments | KeyGather, tokens: int) -> Tensor:
    total = grad.index_select(0, arguments.first)
    for places, keys in arguments.again:  # no token twice
        total.index_add_(0, places, grad.index_select(0, keys))
    return total[:tokens]  # a static row's has spare rows
