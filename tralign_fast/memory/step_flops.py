"""What a step must compute and move: operations of matrix products, bytes of the small kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """Of a decoder-only model; of its layers the mean."""

    layers: int
    linear: float  # weights of a layer's matrix products
    fan: tuple[float, float]  # inputs and outputs of a layer's matrix products, summed
    layer: float  # parameters of a layer
    outside: int  # parameters of embedding, head and the last norm
    hidden: int
    inner: int
    query: int  # heads · head size
    key: int
    vocab: int

    @property
    def parameters(self) -> float:
        return self.layers * self.layer + self.outside


@dataclass(frozen=True)
class Flops:
    """Of one step, 2 a multiply-add: forward of the reference, forward and backward of the policy,
    and the forward of the layers that gradient checkpointing repeats."""

    reference: float
    forward: float
    backward: float
    recomputed: float

    @property
    def needed(self) -> float:
        """Without what is only computed again."""
        return self.reference + self.forward + self.backward


def sizes_of(config: Any) -> Sizes:
    """Sizes of the model of a transformers config, from a model on the meta device.

    Raises:
        ValueError: a mixture of experts, of which a token passes a part.
    """
    from transformers import AutoModelForCausalLM

    from tralign_fast.memory.trace import decoder_layers

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if not layers or any("expert" in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"a step of {type(model).__name__} is not modelled: expected a decoder without experts"
        )
    count, whole = len(layers), sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for layer in layers for p in layer.parameters())
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(
        layers=count,
        linear=sum(m.weight.numel() for m in linears) / count,
        fan=(sum(m.in_features for m in linears) / count,
             sum(m.out_features for m in linears) / count),
        layer=inside / count,
        outside=whole - inside,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query=heads * size,
        key=(getattr(config, "num_key_value_heads", None) or heads) * size,
        vocab=config.vocab_size,
    )  # fmt: skip


def flops_of(
    sizes: Sizes, pairs: int, tokens: int, lora_rank: int | None = None, past_adapters: int = 0
) -> Flops:
    """Operations of a step on `pairs` pairs in a row of `tokens`, half of a pair being prompt.

    Prompts are computed once for both completions, and the head at completions alone. A full model
    has its products three times (output, gradient of the input, gradient of the weight), one that
    trains adapters twice, and its adapters' three times.

    Args:
        past_adapters: that a reference on a shared base adds up; 0: it is the base alone.
    """
    completion = tokens // pairs // 4
    prompt = tokens // pairs - 2 * completion
    # (query, key) that attend
    seen = pairs * (prompt**2 / 2 + 2 * (completion * prompt + completion**2 / 2))
    base = 2.0 * sizes.layers * tokens * sizes.linear
    attention = 4.0 * sizes.layers * sizes.query * seen
    head = 4.0 * pairs * completion * sizes.hidden * sizes.vocab
    adapters = 2.0 * sizes.layers * tokens * (lora_rank or 0) * sum(sizes.fan)
    again = 2 if lora_rank is None else 1
    return Flops(
        reference=base + attention + head + past_adapters * adapters,
        forward=base + attention + head + adapters,
        backward=again * (base + head) + 2 * (attention + adapters),
        recomputed=base + attention + adapters,
    )


def small_kernel_bytes(sizes: Sizes, tokens: int, width: int, adapters: bool) -> float:
    """Bytes that norms, residual sums, rotary embeddings and gates read and write in a forward.

    Two norms (4 H) and two sums (6 H), queries and keys turned in place, a gate and its product
    (3 I); LoRA layers read their input once more and add to their output.
    """
    numbers = 10 * sizes.hidden + 2 * (sizes.query + sizes.key) + 3 * sizes.inner
    if adapters:
        numbers += sizes.fan[0] + 2 * sizes.fan[1]
    return float(sizes.layers * tokens * width * numbers)
