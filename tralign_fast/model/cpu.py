"""What a model wants on a CPU alone: one gradient of tied embeddings, and the faster products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.model.patching import Patches, has_forward, lm_head_of
from tralign_fast.ops.backend import device_kind
from tralign_fast.ops.cpu import onednn


@contextlib.contextmanager
def split_tied_weight(causal_lm: Any) -> Iterator[Tensor | None]:
    """The head's weight, apart from that of the input embedding it is tied to, on a CPU; or None.

    The embedding's gradient is the few rows that were looked up. Autograd would sum two dense
    tensors (V, H), or copy the head's to add a sparse one to it: new memory of that size, whose
    pages cost more than the sum. Here it is added to the head's own.
    """
    embedding, head = causal_lm.get_input_embeddings(), lm_head_of(causal_lm)
    if not _is_tied_on_cpu(embedding, head) or torch.compiler.is_compiling():
        yield None
        return
    weight = embedding.weight
    before = embedding.sparse
    embedding._parameters["weight"], for_head = _Tied.apply(weight)
    embedding.sparse = True
    try:
        yield for_head
    finally:
        embedding._parameters["weight"], embedding.sparse = weight, before


def _is_tied_on_cpu(embedding: Any, head: Any) -> bool:
    """Whether the two are one whole weight on a CPU, of which a gradient is wanted."""
    if not isinstance(embedding, nn.Embedding) or embedding.weight is not head.weight:
        return False
    weight = embedding.weight
    return (
        device_kind(weight.device) == "cpu"
        and weight.shape == (embedding.num_embeddings, embedding.embedding_dim)  # ZeRO-3's is empty
        and not hasattr(weight, "device_mesh")  # nor a shard
        and weight.requires_grad
        and torch.is_grad_enabled()
    )


class _Tied(torch.autograd.Function):
    """One weight as two: for the embedding, whose gradient is sparse, and for the head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, embedding: Tensor | None, head: Tensor | None) -> Tensor | None:
        if head is None:
            return None if embedding is None else embedding.to_dense()
        # in place: the head's was made in this backward, and nobody else has seen it
        return head if embedding is None else head.add_(embedding)


def speed_up_linears(model: nn.Module) -> Callable[[], None]:
    """Runs a CPU's fp32 products through the faster of the libraries that PyTorch has for them;
    returns its undo.

    LoRA's factors are left out: products with so few columns gain nothing, and the adapter
    reference runs past adapters by `F.linear`, to the same bits.
    """
    patches = Patches()
    if not onednn.is_faster():
        return patches.undo
    for name, module in model.named_modules():
        is_own = "forward" not in module.__dict__ or has_forward(module, "oneDNN")
        if type(module) is nn.Linear and is_own and ".lora_" not in name:
            patches.forward(module, "oneDNN", _linear)
    return patches.undo


def _linear(own_forward: Any, module: Any, input: Tensor) -> Tensor:
    return onednn.linear(input, module.weight, module.bias)
