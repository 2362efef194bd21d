"""The load-balancing loss of a mixture of experts, over tokens that count more than once, or not.

Fedus et al., Switch Transformers (arXiv 2101.03961), equations 4 to 6, for k experts a token: with
E experts, tokens t of weight w_t in every layer with a router (rows r, R their summed weight),

    loss = E · Σ_e f_e · P_e,  f_e = 1/R Σ_r w_r [e is among the k of r],  P_e = 1/R Σ_r w_r p_r(e)

where p is the softmax of the router's logits and f has no gradient. transformers (and TRL, which
calls it) counts every token of a padded batch that is no padding once. A packed row that shares
prompts holds a prompt once where the padded batch repeats it: there it weighs as many times as it
has completions, and KTO's mismatched completions, which TRL runs apart, weigh nothing. The hidden
states of the copies are equal, so the two losses are.

Letters: T tokens, S rows of a padded batch, E experts, L layers with a router.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.packing import PackedBatch
from tralign_fast.model.patching import causal_lm_of, decoder_of
from tralign_fast.ops.backend import warn_once

# What configs call the experts that a token goes to.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk")

_HOOKED = "_output_capturing_hooks_installed"  # transformers' mark on a model that has its hooks


def router_coefficient(model: Any, coefficient: float | None) -> tuple[float, bool]:
    """The weight of the loss, and whether there is one: as TRL decides it.

    None: what the model's config says, and 0 where it says nothing.

    Raises:
        ValueError: a coefficient for a model whose config knows no router logits.
    """
    causal_lm = causal_lm_of(model)
    config = causal_lm.config.get_text_config()
    routes = hasattr(config, "output_router_logits")
    if coefficient and not routes:
        raise ValueError(
            f"router_aux_loss_coef: {type(causal_lm).__name__} is no mixture of experts that "
            f"returns router logits; expected None or 0, got {coefficient}"
        )
    weight = getattr(config, "router_aux_loss_coef", None) if coefficient is None else coefficient
    return weight or 0.0, routes and bool(weight)


@dataclass(eq=False)
class Balance:
    """What the forward of one batch is asked about its routers, and its answer."""

    weights: Tensor  # (T,) float32 of a packed row's tokens; (S,) of padded rows
    slopes: Tensor | None = None  # (E,) of the whole batch that this is a part of
    counts: bool = False  # asks for `expert_counts` instead of the loss
    answer: Tensor | None = None  # () or (E + 1,); None: no router logits could be had

    def __call__(self, outputs: Any, inputs: dict[str, Any], config: Any) -> Tensor | None:
        """The answer, of what a decoder returned for these keywords."""
        hidden = outputs.last_hidden_state
        weights = self.weights.to(hidden.device)
        if inputs.get("prefix_layout") is None:  # the mask may have PEFT's virtual tokens
            mask = inputs["attention_mask"][:, -hidden.shape[1] :]
            weights = (mask.to(hidden.device) * weights[:, None]).flatten()
        try:
            logits = _joined(getattr(outputs, "router_logits", None), len(weights), hidden.device)
            top_k = _experts_per_token(config.get_text_config())
        except ValueError as error:
            warn_once(f"{type(config).__name__}: {error}; training without a load-balancing loss")
            return None
        if hidden.requires_grad and not logits.requires_grad:
            warn_once(
                "the load-balancing loss is logged but has no gradient: reentrant checkpoints hide "
                'the routers (set gradient_checkpointing_kwargs={"use_reentrant": False}), or no '
                "weight that is trained lies before them"
            )
        weights = weights.repeat(len(logits) // len(weights))
        if self.counts:
            return expert_counts(logits.softmax(-1, dtype=torch.float32), weights, top_k)
        return balance_loss(logits, weights, top_k, slopes=self.slopes)


def router_options(config: Any, wanted: bool) -> dict[str, Any]:
    """Keywords that let a decoder return its routers' logits, or not where its config says so."""
    own = getattr(config.get_text_config(), "output_router_logits", None)
    return {"output_router_logits": wanted} if wanted or own else {}


def balance_loss(
    logits: Tensor,  # (R, E)
    weights: Tensor,  # (R,) float32
    top_k: int,
    *,
    slopes: Tensor | None = None,  # (E,)
) -> Tensor:
    """() float32, the loss of all routers' rows, or what they add to that of a larger batch whose
    `slopes` are given. Memory: fp32 probabilities (R, E).
    """
    probabilities = logits.softmax(-1, dtype=torch.float32)
    if slopes is None:
        slopes = slopes_of(expert_counts(probabilities, weights, top_k))
    # autocast would make it a product of bf16
    with torch.autocast(logits.device.type, enabled=False):
        return (probabilities.T @ weights) @ slopes


@torch.no_grad()
def expert_counts(
    probabilities: Tensor,  # (R, E)
    weights: Tensor,  # (R,) float32
    top_k: int,
) -> Tensor:
    """(E + 1,) float32: the summed weight of the tokens that go to each expert, and of all."""
    picked = torch.zeros_like(probabilities)
    picked.scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    with torch.autocast(picked.device.type, enabled=False):
        return torch.cat([picked.T @ weights, weights.sum()[None]])


def slopes_of(counts: Tensor) -> Tensor:
    """(E,): the derivative E · f_e / R of the loss by Σ_r w_r p_r(e)."""
    return counts[:-1] * (len(counts) - 1) / counts[-1].square()


def record_router_logits(model: Any) -> Callable[[], None]:
    """Sets transformers' hooks, which record what routers return, on a mixture of experts; returns
    the function that takes them off.

    transformers sets them in the first forward that asks for router logits. By then layers may be
    compiled, and their graphs, which never look for hooks again, would record nothing.
    """
    decoder = decoder_of(causal_lm_of(model))
    config = decoder.config.get_text_config()
    if not hasattr(config, "output_router_logits") or hasattr(decoder, _HOOKED):
        return lambda: None
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # an older one, whose models ask their layers
        return lambda: None
    before = {id(hook) for m in decoder.modules() for hook in m._forward_hooks.values()}
    maybe_install_capturing_hooks(decoder)
    modules = weakref.WeakSet(decoder.modules())

    def undo() -> None:
        for module in modules:
            module.__dict__.pop(_HOOKED, None)
            for key, hook in list(module._forward_hooks.items()):
                if id(hook) not in before and hook.__module__.endswith("output_capturing"):
                    del module._forward_hooks[key]

    return undo


def asked(batch: PackedBatch) -> PackedBatch:
    """The batch, asking the model that scores it for its load-balancing loss (`batch.balance`)."""
    return _asking(batch, Balance(_weights(batch), batch.router_slopes))


def asked_for_counts(batch: PackedBatch) -> PackedBatch:
    """The batch, asking the model for its `expert_counts`."""
    return _asking(batch, Balance(_weights(batch), counts=True))


def _asking(batch: PackedBatch, balance: Balance) -> PackedBatch:
    layout = batch.layout and dataclasses.replace(batch.layout, every_row=True)
    return dataclasses.replace(batch, balance=balance, layout=layout)


def _weights(batch: PackedBatch) -> Tensor:
    """(T,) how often TRL's padded batch holds each token of a packed row; (S,) of padded rows.

    Filled on the device: a copy from the host would wait for it.
    """
    paired, device = batch.is_desirable is None, batch.input_ids.device
    if batch.layout is None:
        weights = torch.ones(len(batch.input_ids), dtype=torch.float32, device=device)
        if not paired:
            weights[len(batch) :] = 0.0
        return weights
    weights = torch.ones(batch.input_ids.numel(), dtype=torch.float32, device=device)
    copies = len(batch.scored_lengths) // len(batch)
    for index, (start, prompt, completions) in enumerate(batch.layout.groups):
        begin, end = start + prompt, start + prompt + sum(completions)
        if paired and len(completions) > 1:
            weights[start:begin] = float(len(completions))
        elif not paired and len(completions) > 1:
            weights[begin + completions[0] : end] = 0.0
        elif not paired and index % copies:  # a mismatched one behind a prompt of its own
            weights[start:end] = 0.0
    weights[len(weights) - batch.layout.padding :] = 0.0
    return weights


def _joined(router_logits: Any, tokens: int, device: torch.device) -> Tensor:
    """(L · T, E): the logits of all routers, one after the other.

    Raises:
        ValueError: there are none, or not one row for each token.
    """
    layers = [layer for layer in router_logits or () if layer is not None]
    if not layers:
        raise ValueError("the model returned no router logits")
    expected = (tokens, layers[0].shape[-1])
    rows = [layer.reshape(-1, layer.shape[-1]).to(device) for layer in layers]
    if odd := [tuple(r.shape) for r in rows if r.shape != expected]:
        raise ValueError(f"expected router logits of shape {expected}, got {odd[0]}")
    return torch.cat(rows)


def _experts_per_token(config: Any) -> int:
    for name in _TOP_K:
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise ValueError(f"its config says nowhere how many experts a token has ({', '.join(_TOP_K)})")
