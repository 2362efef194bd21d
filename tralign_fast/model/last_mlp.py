"""The last layer's MLP, on the rows of a packed batch that are scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tralign_fast.data.layout import PrefixLayout
from tralign_fast.model.patching import Patches, causal_lm_of, decoder_of

LAST_MLP = "last MLP"  # the kind of the patches


def leave_prompts_out_of_last_mlp(model: PreTrainedModel) -> Callable[[], None]:
    """Runs the last layer's MLP on the rows of a packed batch that are scored; returns its undo.

    What it would add to a prompt's other rows nobody reads: keys and values come before it. Those
    rows keep what the layer's attention left in them.
    """
    patches = Patches()
    layers = getattr(decoder_of(causal_lm_of(model)), "layers", None)
    attention, mlp = (
        None if layers is None else getattr(layers[-1], name, None) for name in ("self_attn", "mlp")
    )
    if attention is not None and mlp is not None:
        handover = _Handover()
        methods: Any = handover  # torch's decorator hides from a checker that they are methods
        patches.forward(attention, LAST_MLP, methods.attention_forward)
        patches.forward(mlp, LAST_MLP, methods.mlp_forward)
    return patches.undo


class _Handover:
    """The layout of a packed row, on its way from the last attention to the last MLP.

    It is there between the two alone: the attention, which the model tells it, leaves it here, and
    the MLP of the same layer takes it. A layer that a checkpoint runs again leaves it anew, and one
    that fails between the two leaves what the next attention replaces. The two patches share one
    object, and so do those of a model's deep copy.
    """

    layout: PrefixLayout | None = None

    @torch.compiler.disable
    def attention_forward(self, own_forward: Any, module: nn.Module, *args: Any, **kwargs: Any):
        self.layout = kwargs.get("prefix_layout")
        return own_forward(module, *args, **kwargs)

    @torch.compiler.disable
    def mlp_forward(
        self, own_forward: Any, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layout, self.layout = self.layout, None
        # what else it is given may be of every row
        if layout is None or layout.every_row or args or kwargs:
            return own_forward(module, hidden, *args, **kwargs)
        rows = layout.scored_rows(hidden.device)
        added = own_forward(module, hidden.index_select(1, rows))
        if not isinstance(added, Tensor):  # with router logits, of every row
            return own_forward(module, hidden)
        return added.new_zeros(hidden.shape).index_copy(1, rows, added)
