"""The last layer's MLP, on the rows of a packed batch that are scored."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tralign_fast.model.patching import causal_lm_of, replace_forward


def leave_prompts_out_of_last_mlp(model: PreTrainedModel) -> None:
    """Runs the last layer's MLP on the rows of a packed batch that are scored.

    What it would add to a prompt's other rows nobody reads: keys and values come before it. Those
    rows keep what the layer's attention left in them.
    """
    layers = getattr(causal_lm_of(model).base_model, "layers", None)
    attention, mlp = (
        None if layers is None else getattr(layers[-1], name, None) for name in ("self_attn", "mlp")
    )
    if attention is None or mlp is None or hasattr(mlp, "handover"):
        return
    # the attention is told the layout, and runs before the MLP, also where a checkpoint runs both
    # again; a copy of the model copies what the two share
    attention.handover = mlp.handover = {}

    @torch.compiler.disable
    def attention_forward(own_forward, self, *args, **kwargs):
        self.handover["layout"] = kwargs.get("prefix_layout")
        return own_forward(self, *args, **kwargs)

    @torch.compiler.disable
    def mlp_forward(own_forward, self, hidden):
        layout = self.handover.pop("layout", None)
        if layout is None:
            return own_forward(self, hidden)
        rows = layout.scored_rows(hidden.device)
        added = own_forward(self, hidden.index_select(1, rows))
        if not isinstance(added, Tensor):  # with router logits, of every row
            return own_forward(self, hidden)
        return added.new_zeros(hidden.shape).index_copy(1, rows, added)

    replace_forward(attention, attention_forward)
    replace_forward(mlp, mlp_forward)
