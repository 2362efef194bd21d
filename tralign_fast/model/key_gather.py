"""Keys and values in the order of the sequences that see them, from a packed row's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.layout import KeyGather, VarlenArguments


def by_token(tokens: Tensor) -> Tensor:  # (1, heads, T, D)
    """(T, heads, D), a view."""
    # `squeeze`: its backward is a view, where that of an index fills zeros and copies
    return tokens.squeeze(0).transpose(0, 1)


class GatherKeys(torch.autograd.Function):
    """`tokens[key_index]` of each tensor, whose backward would sort the index to sum the same way
    in every run.

    Tokens are (T, heads, D), or (1, heads, T, D) as attention layers have them; the keys are
    (keys, heads, D). Here a token's gradients are summed in the order of its completions. One node
    for keys and values and their views, for the host's time.
    """

    @staticmethod
    def forward(
        ctx: Any, arguments: VarlenArguments | KeyGather, *tokens: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.arguments, ctx.of_a_layer = arguments, tokens[0].dim() == 4
        if ctx.of_a_layer:
            tokens = tuple(map(by_token, tokens))
        ctx.tokens = tokens[0].shape[0]
        ctx.set_materialize_grads(False)
        return tuple(t.index_select(0, arguments.key_index) for t in tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [None if g is None else _ungathered(g, ctx.arguments, ctx.tokens) for g in grads]
        if ctx.of_a_layer:
            found = [None if g is None else g.transpose(0, 1).unsqueeze(0) for g in found]
        return None, *found


def _ungathered(grad: Tensor, arguments: VarlenArguments | KeyGather, tokens: int) -> Tensor:
    total = grad.index_select(0, arguments.first)
    for places, keys in arguments.again:  # no token twice
        total.index_add_(0, places, grad.index_select(0, keys))
    # a static row's has spare rows
    return total if total.shape[0] == tokens else total[:tokens]
