"""Prefix-shared attention: completions see their prompt and themselves, in one packed row.

Registered with transformers' `AttentionInterface` under one name for each implementation that it
wraps: "tralign_sdpa" runs a packed batch by its `PrefixLayout` and everything else (generation, a
padded batch) through "sdpa". The layout comes as the keyword `prefix_layout` of the model's
forward, which transformers hands down to every attention layer, also when gradient checkpointing
runs it again.

No mask of (T, T) exists. With a variable-length kernel (flash-attn, `torch.nn.attention.varlen`)
all sequences of all groups are one call; without, there is one SDPA call for each.

Letters: T tokens of the packed row, A attention heads, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tralign_fast.data.layout import PrefixLayout, VarlenArguments
from tralign_fast.model.cut_attention import attend_pieces
from tralign_fast.model.key_gather import GatherKeys, by_token
from tralign_fast.model.masks import check_mask, make_mask
from tralign_fast.model.patching import Patches
from tralign_fast.ops.backend import device_kind, is_pretending, warn_once

PREFIX = "tralign_"
# Keywords of an attention layer that change nothing here, or that are honoured below. Any other one
# that is set (attention sinks, position biases, …) changes the result: such a model is refused.
_KNOWN = {
    "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions",
    "output_hidden_states", "return_dict", "position_embeddings", "past_key_values",
    "attention_mask", "output_router_logits",
}  # fmt: skip


def enable_prefix_attention(model: Any) -> Callable[[], None]:
    """Lets `model(..., prefix_layout=...)` run packed rows; returns the function that undoes it.

    Everything without a layout runs through the model's own attention implementation as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = original = model.config._attn_implementation
    if not original.startswith(PREFIX):
        if original == "sdpa" and getattr(model.config, "attn_logit_softcapping", None) is not None:
            # transformers' SDPA attention drops the softcap that the model was trained with
            warn_once(
                "attention logits are soft-capped: eager attention instead of sdpa for generation"
            )
            original = "eager"
        name = PREFIX + original
        AttentionInterface.register(name, functools.partial(prefix_shared_attention, original))
        if original in ALL_MASK_ATTENTION_FUNCTIONS:
            mask_function = functools.partial(make_mask, ALL_MASK_ATTENTION_FUNCTIONS[original])
            AttentionMaskInterface.register(name, mask_function)
    patches, seen = Patches(), set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            # `set_attn_implementation` would look the name up on the hub, and the property sets
            # that of configs inside this one, which may differ
            patches.attribute(module, "config._attn_implementation_internal", name)
    return patches.undo


def runs_packed_rows(config: Any) -> bool:
    """Whether a model's attention, by its config, is one that reads the layout of a packed row."""
    return (config._attn_implementation or "").startswith(PREFIX)


def has_varlen(model: Any) -> bool:
    """Whether a model's packed rows go through one call of a variable-length kernel."""
    weight = next(model.parameters())
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    options = _Options(1.0, 0.0, None, softcap)
    query = torch.empty(0, dtype=dtype, device=weight.device)
    return runs_packed_rows(model.config) and _varlen_function(query, options) is not None


@torch.compiler.disable  # of a compiled layer: segments of every batch have lengths of their own
def prefix_shared_attention(
    original: str,
    module: torch.nn.Module,
    query: Tensor,  # (1, A, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_layout: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, A, D) attention output in transformers' convention, and no attention weights.

    Raises:
        NotImplementedError: the layer passes a keyword that this attention does not know.
    """
    if prefix_layout is None:
        check_mask(original, module, attention_mask, sliding_window)
        return _original_attention(original, module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _KNOWN]
    if unknown or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"attention with {', '.join(sorted(unknown)) or 'is_causal=False'}"
        )
    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _Options(scale, dropout, sliding_window, softcap)
    varlen = _varlen_function(query, options)
    if varlen is not None or device_kind(query.device) != "cuda":
        return _attend(varlen, prefix_layout, options, query, key, value), None
    # cuDNN plans every new pair of lengths anew, which takes longer than a whole step
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return _attend(varlen, prefix_layout, options, query, key, value), None


class _Options(NamedTuple):
    """What a layer asks of its attention, beside causality."""

    scaling: float  # of the scores
    dropout: float
    window: int | None  # keys that a query sees, itself included
    softcap: float | None  # of the scores, by tanh


def _attend(
    varlen: Callable[..., Tensor] | None,
    layout: PrefixLayout,
    options: _Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """(1, T, A, D), by a variable-length kernel where one is given."""
    if layout.cut is not None:
        return _attend_cut(varlen, layout, options, query, key, value)
    if varlen is not None:
        return _attend_varlen(varlen, query, key, value, layout.varlen(query.device), options)
    return _attend_segments(query, key, value, layout, options)


def _attend_cut(
    varlen: Callable[..., Tensor] | None,
    layout: PrefixLayout,
    options: _Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """(1, T, A, D) of a row that begins with pieces of groups."""

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if varlen is not None:
            return _attend_varlen(varlen, query, key, value, layout.varlen(query.device), options)
        return _attend_segments(query, key, value, layout, options)

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if varlen is not None:
            bounds = layout.bounds(query.shape[2], key.shape[2], query.device)
            return _attend_varlen(varlen, query, key, value, bounds, options)
        return _attend_one(query, key, value, layout, options).transpose(1, 2)

    assert layout.cut is not None
    return attend_pieces(query, key, value, layout.cut, whole, one)


# --- one call for each sequence: any device -------------------------------------------------------


def _attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    options: _Options,
) -> Tensor:
    # `split`: its backward is one concatenation, where a slice's fills a whole tensor of zeros
    query_lengths, key_lengths = [], []
    for _, prompt, completions in layout.groups:
        query_lengths += [prompt + completions[0], *completions[1:]]
        key_lengths += [prompt, *completions]
    queries = iter(query.split(query_lengths, 2))
    keys, values = iter(key.split(key_lengths, 2)), iter(value.split(key_lengths, 2))
    outputs = []
    for _, _, completions in layout.groups:
        shared_key, shared_value = next(keys), next(values)
        for _ in completions:
            outputs.append(
                _attend_one(
                    next(queries),
                    torch.cat([shared_key, next(keys)], 2),
                    torch.cat([shared_value, next(values)], 2),
                    layout,
                    options,
                )
            )
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend_one(
    query: Tensor,  # (1, A, Q, D)
    key: Tensor,  # (1, K, P, D) with P ≥ Q
    value: Tensor,
    layout: PrefixLayout,
    options: _Options,
) -> Tensor:
    """(1, A, Q, D): causal attention aligned at the bottom right."""
    queries, keys, softcap = query.shape[2], key.shape[2], options.softcap
    window = None if options.window is None or keys <= options.window else options.window
    if queries == 1 and window is None:
        mask, causal = None, False
    elif queries == keys and window is None and softcap is None:
        mask, causal = None, True
    else:
        causal = False
        if softcap is None:
            mask = layout.bias(queries, keys, window, query.device, query.dtype)
        else:
            mask = layout.mask(queries, keys, window, query.device)
    repeats = query.shape[1] // key.shape[1]
    # a GPU's fused kernels want all heads where there is a mask, or fp32
    if repeats > 1 and (softcap is not None or device_kind(query.device) == "cuda"):
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        repeats = 1
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, dropout_p=options.dropout,
            scale=options.scaling, enable_gqa=repeats > 1,
        )  # fmt: skip
    # SDPA knows no softcap (Gemma-2): scores in full, fp32 softmax, as the eager attention has it
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (options.scaling / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, options.dropout) @ value


# --- one call for all sequences: a variable-length kernel -----------------------------------------


def _attend_varlen(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: VarlenArguments,
    options: _Options,
) -> Tensor:
    """Queries stay in place; keys are gathered so that every sequence has its prompt before it."""
    window = (-1 if options.window is None else options.window - 1, 0)
    if arguments.again:
        k, v = GatherKeys.apply(arguments, key, value)  # pyright: ignore[reportGeneralTypeIssues]
    else:  # the keys are the row's tokens as they stand
        k, v = by_token(key), by_token(value)
    return function(by_token(query), k, v, arguments, window, options).unsqueeze(0)


def _flash_attn(q, k, v, arguments, window: tuple[int, int], options: _Options) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q, k, v, arguments.cu_seqlens_q, arguments.cu_seqlens_k,
        arguments.max_seqlen_q, arguments.max_seqlen_k,
        dropout_p=options.dropout, softmax_scale=options.scaling, causal=True, window_size=window,
        softcap=options.softcap or 0.0,
    )  # fmt: skip


def _torch_varlen(q, k, v, arguments, window: tuple[int, int], options: _Options) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # before the flag came, fewer key-value heads were handed on to the kernel as they are
    has_flag = "enable_gqa" in _torch_varlen_parameters()
    gqa = {"enable_gqa": q.shape[1] != k.shape[1]} if has_flag else {}
    return varlen_attn(  # pyright: ignore[reportReturnType]
        q, k, v, arguments.cu_seqlens_q, arguments.cu_seqlens_k,
        arguments.max_seqlen_q, arguments.max_seqlen_k, scale=options.scaling, window_size=window,
        **gqa,
    )  # fmt: skip


def _varlen_function(query: Tensor, options: _Options) -> Callable[..., Tensor] | None:
    """The variable-length kernel for these tensors, or None where there is none."""
    on_gpu = device_kind(query.device) == "cuda"
    if not on_gpu or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if is_pretending():  # torch's takes fake tensors, and allocates what flash-attn does
        return _torch_varlen if _torch_varlen_parameters() else None
    if _has_flash_attn():
        return _flash_attn
    if options.softcap is not None or options.dropout > 0:
        warn_once(
            "torch's varlen attention knows no softcap and no dropout: one attention call per "
            "sequence instead (flash-attn does both)"
        )
        return None
    if {"window_size", "scale"} <= _torch_varlen_parameters():
        return _torch_varlen
    warn_once(
        "no variable-length attention (install flash-attn): one SDPA call per sequence instead"
    )
    return None


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None  # 0.5 ms, where it is missing


@functools.cache
def _torch_varlen_parameters() -> frozenset[str]:
    """Of `varlen_attn`, which has grown with every version of torch; empty before the first."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _original_attention(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # the eager attention is no entry of the interface: every model file has its own
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # pyright: ignore[reportArgumentType]
