"""A causal language model whose forward returns log-probabilities of tokens instead of logits.

The change lives inside `forward`, so that whatever wraps the model (DDP, FSDP, DeepSpeed, PEFT,
autocast) wraps the LM head's work too. Without the keyword `score_index` the forward is unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tralign_fast.data.packing import PackedBatch
from tralign_fast.model.attention import runs_packed_rows
from tralign_fast.model.cpu import split_tied_weight
from tralign_fast.model.cut_attention import join_scores
from tralign_fast.model.patching import (
    Patches,
    causal_lm_of,
    decoder_of,
    head_tokens_of,
    lm_head_of,
    unwrapped,
)
from tralign_fast.model.router import router_options
from tralign_fast.ops.ema import is_quantised
from tralign_fast.ops.logprobs import linear_logprobs_and_statistics
from tralign_fast.ops.powers import check_kept
from tralign_fast.ops.transform import LogitTransform


@dataclass
class ScoreOutput(ModelOutput):
    """What a model returns when it was given `score_index`."""

    scores: Tensor | None = None  # (N,) float32 log-probs, or what the given `score` returned
    balance: Tensor | None = None  # the answer to the given `balance`
    statistics: dict[str, Tensor] | None = None  # (N,) each, of the tokens that have a gradient


def enable_logprobs(
    model: PreTrainedModel,
    *,
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
    backend: str = "auto",
) -> Callable[[], None]:
    """Lets `model(**batch_inputs)` return a `ScoreOutput`; returns the function that undoes it.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        logits_budget_mb, vocab_filter, kept, backend: as in `linear_logprobs`.

    Raises:
        ValueError: the model has no linear output embedding, or `kept` is unknown.
    """
    check_kept(kept)
    causal_lm = causal_lm_of(model)
    head = _head_to_score_with(causal_lm)
    options = {
        "transform": LogitTransform.of_config(causal_lm.config),
        "logits_budget_mb": logits_budget_mb,
        "vocab_filter": vocab_filter,
        "kept": kept,
        "backend": backend,
    }

    def forward(
        own_forward, self, *args,
        score_index=None, score_targets=None, grad_tokens=None, statistics=(), score=None,
        row_tokens=None, balance=None,
        **kwargs,
    ):  # fmt: skip
        if score_index is None:
            return own_forward(self, *args, **kwargs)
        if kwargs.get("prefix_layout") is not None and not runs_packed_rows(self.config):
            raise RuntimeError(
                f"{type(self).__name__} got a packed row, but its attention "
                f"({self.config._attn_implementation}) reads none: prepare the model again"
            )
        if kwargs.get("past_key_values") is not None:
            _check_prefix_is_kept(self)
        kwargs |= router_options(self.config, balance is not None)
        with split_tied_weight(self) as weight:
            outputs = decoder_of(self)(*args, use_cache=False, **kwargs)
        hidden = outputs.last_hidden_state
        if balance is not None:
            balance = balance(outputs, kwargs, self.config)
        if row_tokens is not None and hidden.shape[1] != row_tokens:
            # PEFT's virtual tokens, before those of every row
            added = hidden.shape[1] - row_tokens
            score_index = score_index + added * (1 + score_index // row_tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])[score_index]
        tokens = head_tokens_of(self)
        if score is not None:
            scores = lm_head_of(self)(hidden, score=score, weight=weight, tokens=tokens)
            return ScoreOutput(scores, balance)
        score = functools.partial(
            _token_logps, targets=score_targets, grad_tokens=grad_tokens, statistics=statistics,
            options=options,
        )  # fmt: skip
        logps, found = lm_head_of(self)(hidden, score=score, weight=weight, tokens=tokens)
        return ScoreOutput(logps, balance, found)

    def head_forward(own_forward, self, hidden, score=None, weight=None, tokens=None):
        if score is None:
            return own_forward(self, hidden)
        if tokens is not None:
            weight = tokens.get_merged_weights(tokens.active_adapters)
        # within a call of the module the weight is there: hooks of FSDP and ZeRO-3 have gathered it
        return score(hidden, self.weight if weight is None else weight, self.bias)

    patches = Patches()
    patches.forward(causal_lm, "log-probs", forward)
    patches.forward(head, "log-probs", head_forward)
    return patches.undo


def _head_to_score_with(causal_lm: Any) -> nn.Linear:
    """The LM head. Raises ValueError where log-probs cannot be computed from its weight."""
    head = lm_head_of(causal_lm)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(causal_lm).__name__}: lm_head carries a PEFT adapter, but its log-probs are "
            "computed from one weight; leave lm_head out of target_modules, or train it whole with "
            'modules_to_save=["lm_head"]'
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(causal_lm).__name__}: expected a linear output embedding (lm_head), got "
            f"{type(head).__name__}"
        )
    if is_quantised(head.weight) and not head.weight.is_meta:
        raise ValueError(
            f"{type(causal_lm).__name__}: lm_head is quantised, but log-probs are computed from "
            "its weight; leave it out of the quantisation (llm_int8_skip_modules="
            '["lm_head"], modules_to_not_convert=["lm_head"])'
        )
    return head


def _check_prefix_is_kept(causal_lm: Any) -> None:
    """Raises where transformers would drop PEFT's trained keys and values, with a mere notice."""
    checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in causal_lm.modules())
    if causal_lm.training and checkpoints:
        raise ValueError(
            f"{type(causal_lm).__name__}: gradient checkpointing drops the keys and values that "
            "prefix tuning puts before every sequence; set gradient_checkpointing=False"
        )


def _token_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Any,  # (N,) Tensor
    grad_tokens: int | None,
    statistics: Collection[str],
    options: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) log-probs of the targets; a gradient, and statistics, for the first `grad_tokens`
    (None: all)."""
    grad = len(targets) if grad_tokens is None else grad_tokens
    logps, found = linear_logprobs_and_statistics(
        hidden[:grad], weight, targets[:grad], statistics, bias=bias, **options
    )
    if grad == len(targets):
        return logps, found
    with torch.no_grad():  # KTO's KL term: no gradient, so no backward of its logits either
        rest, _ = linear_logprobs_and_statistics(
            hidden[grad:], weight, targets[grad:], (), bias=bias, **options
        )
    return torch.cat([logps, rest]), found


def token_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(N,) float32 log-probabilities of the batch's scored tokens, under a model that went through
    `enable_logprobs` (and, for packed batches, `enable_prefix_attention`), wrapped or not.
    """
    return token_logps_and_statistics(model, batch, ())[0]


def token_logps_and_statistics(
    model: nn.Module, batch: PackedBatch, wanted: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_logps`, and what is wanted of `ops.statistics.STATISTICS`, (grad_tokens,) each: of
    the same distributions, without gradient."""
    own = batch if batch.pieces is None else batch.pieces
    output = model(
        **_inputs(batch), score_targets=own.targets, grad_tokens=own.grad_tokens,
        statistics=tuple(wanted),
    )  # fmt: skip
    logps = _scores(model, output, batch)
    if batch.pieces is None:
        return logps, output.statistics
    return join_scores(logps, output.statistics, batch.pieces, batch.grad_tokens)


def _scores(model: nn.Module, output: Any, batch: PackedBatch) -> Tensor:
    if getattr(output, "scores", None) is None:
        raise RuntimeError(
            f"{type(model).__name__} returned no log-probs: prepare it (again, after an undo)"
        )
    if batch.balance is not None:
        batch.balance.answer = output.balance
    return output.scores


def sequence_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(S,) float32 summed log-probabilities of the batch's sequences (`token_logps`)."""
    return batch.sum_per_sequence(token_logps(model, batch))


@torch.no_grad()
def balance_alone(model: nn.Module, batch: PackedBatch) -> Tensor | None:
    """The model's answer to `batch.balance`, without the head's work."""
    output = model(**_inputs(batch), score=lambda hidden, *_: hidden.new_zeros(0))
    _scores(model, output, batch)
    return batch.balance.answer


@torch.no_grad()
def hidden_kl(model: nn.Module, other: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Scalar: the KL from one model to the other, summed over the batch's own scored tokens.

    `KL(π_model(·|x, y<t) || π_other(·|x, y<t))`, exact over the vocabulary, at the contexts of the
    batch; in blocks of 64 MB of logits. Both models went through `prepare_model`.
    """
    index = batch.score_index[: batch.grad_tokens]
    inputs = {**_inputs(batch), "score_index": index}

    def keep(hidden: Tensor, *head: Any) -> Tensor:
        others.append((hidden, *head))
        return hidden

    def compare(hidden: Tensor, *head: Any) -> Tensor:
        (other_hidden, *other_head), total = others[0], hidden.new_zeros((), dtype=torch.float32)
        step = max(1, (64 << 20) // (4 * head[0].shape[0]))
        for start in range(0, len(hidden), step):
            p = log_softmax(hidden[start : start + step], *head)
            q = log_softmax(other_hidden[start : start + step], *other_head)
            total += (p.exp() * (p - q)).sum()
        return total

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = nn.functional.linear(hidden, weight, bias).float()
        return transform.apply_(z).log_softmax(-1)

    others: list[tuple[Any, ...]] = []
    transform = LogitTransform.of_config(causal_lm_of(unwrapped(model)).config)
    other(**inputs, score=keep)
    return model(**inputs, score=compare).scores


def _inputs(batch: PackedBatch) -> dict[str, Any]:
    """The keywords of the model's forward, but for what is scored how."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.layout is None:
        # rows are padded on the right: their positions are the model's own, and PEFT's prompt
        # learning, which has others, takes none
        inputs["attention_mask"] = batch.attention_mask
        inputs["row_tokens"] = batch.input_ids.shape[1]
    else:
        inputs["position_ids"] = batch.position_ids
        # transformers passes a 4-D mask on as it is: none of (T, T) is built, and ours is not read
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
        inputs["prefix_layout"] = batch.layout
    if batch.balance is not None:
        inputs["balance"] = batch.balance
    inputs["score_index"] = batch.score_index
    return inputs
