"""Log-probabilities of target tokens without a matrix of log-probabilities.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of one vocabulary tile.

The logits are made tile by tile, (N, W) at a time: how they are cut and multiplied is in
`ops.tiles`, what happens to a tile of logits in `ops.tile_ops` (PyTorch) and
`tralign_kernels.logprob` (Triton). Where no logits are kept, a Triton forward of half-precision
inputs takes one kernel for product and reduction instead (`tralign_kernels.linear_logprob`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tralign_fast.ops import tiles
from tralign_fast.ops.backend import pick_backend
from tralign_fast.ops.checks import autocast_off, check_arguments, check_targets
from tralign_fast.ops.cpu.pages import give_back
from tralign_fast.ops.tile_ops import row_factor, tile_ops, tile_powers_, to_scores_
from tralign_fast.ops.vocab_filter import VocabFilter


@torch.library.custom_op("tralign_fast::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    inverse_temperature: float,
    backend: str,
    compute_dtype: torch.dtype,
    tile: int,
    keep: int,  # columns whose logits are kept, the first ones: whole tiles
    vocab_filter: float,  # for the backward
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs (N,) fp32, logsumexp (N,) fp32, kept logits: tile after tile, flat)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    check_targets(targets, vocab)
    logsumexp = torch.full((rows,), float("-inf"), device=hidden.device)
    target_logit = torch.full((rows,), float("nan"), device=hidden.device)
    x = hidden.to(compute_dtype)
    kept = x.new_empty(rows * keep)
    if rows == 0:
        return logsumexp, logsumexp.clone(), kept
    transform = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "inverse_temperature": inverse_temperature,
    }
    tile_forward_, _ = tile_ops(backend)
    fused = _is_fused(backend, compute_dtype)
    scratch = x.new_empty(0 if fused else rows * min(tile, vocab - keep))
    with autocast_off(hidden.device):
        for start, stop in tiles.cut(0, keep if fused else vocab, tile):
            out = tiles.view(kept, scratch, rows, start, stop, keep)
            part = None if bias is None else bias[start:stop]
            logits = tiles.project(x, weight[start:stop], part, out, start < keep)
            tile_forward_(logits, targets, start, logsumexp, target_logit, **transform)
            del logits  # before the next tile is made
        if fused:
            _fused_forward_(
                x, weight, targets, bias, logsumexp, target_logit, keep, tile, transform
            )
    return target_logit - logsumexp, logsumexp, kept


def _is_fused(backend: str, dtype: torch.dtype) -> bool:
    """Whether product and reduction are one kernel where nobody reads the logits again.

    Not in fp32: logits that the backward computes again by another product would differ from those
    of the logsumexp in their last digits, which are the digits of a probability near one.
    """
    return backend == "triton" and dtype != torch.float32


def _fused_forward_(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    target_logit: Tensor,
    first: int,  # column
    tile: int,
    transform: dict[str, Any],
) -> None:
    from tralign_kernels import linear_logprob_forward_

    x = x if x.stride(1) == 1 else x.contiguous()
    # a weight of another dtype (autocast) is converted tile by tile, never as a whole
    tile = weight.shape[0] if weight.dtype == x.dtype else tile
    for start, stop in tiles.cut(first, weight.shape[0], tile):
        part = weight[start:stop].to(x.dtype)
        linear_logprob_forward_(
            x, part if part.stride(1) == 1 else part.contiguous(), targets, start, logsumexp,
            target_logit, bias=None if bias is None else bias[start:stop].to(x.dtype).contiguous(),
            **transform,
        )  # fmt: skip


@_linear_logprobs_op.register_fake
def _(hidden, weight, targets, bias, logit_scale, softcap, inverse_temperature, backend,
      compute_dtype, tile, keep, vocab_filter):  # fmt: skip
    rows = hidden.shape[0]
    kept = hidden.new_empty(rows * keep, dtype=compute_dtype)
    # the scratch tile is allocated (and dies) here too, so that a memory trace sees the peak
    fused = _is_fused(backend, compute_dtype)
    kept.new_empty(0 if fused else rows * min(tile, weight.shape[0] - keep))
    per_row = hidden.new_empty(rows, dtype=torch.float32)
    return per_row, torch.empty_like(per_row), kept


@torch.library.custom_op("tralign_fast::linear_logprobs_backward", mutates_args=("kept",))
def _linear_logprobs_backward_op(
    grad: Tensor,  # (N,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N,) float32
    kept: Tensor,  # (N·W,), of the first W columns: consumed
    logit_scale: float,
    softcap: float | None,
    inverse_temperature: float,
    backend: str,
    tile: int,
    needs: list[bool],  # gradient of hidden, of weight, of bias
    vocab_filter: float,  # 0: none
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias), empty where not needed.

    d weight is written tile by tile, each in one product over all N tokens, in the weight's dtype;
    d hidden is summed over the tiles in fp32.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    keep = kept.numel() // max(1, rows)
    parts = list(tiles.cut(0, vocab, tile))
    new = weight.new_zeros if vocab_filter else weight.new_empty
    grad_weight = new(weight.shape if needs_weight else (0,))
    grad_bias = new(vocab if needs_bias else 0)
    if rows == 0:
        return torch.zeros_like(hidden), grad_weight.zero_(), grad_bias.zero_()
    x = hidden.to(kept.dtype)
    sum_dtype = x.dtype if len(parts) == 1 and not vocab_filter else torch.float32
    grad_hidden = x.new_zeros(hidden.shape if needs_hidden else (0,), dtype=sum_dtype)
    tile_forward_, tile_backward_ = tile_ops(backend)
    scores: dict[str, Any] = {
        "logit_scale": logit_scale, "softcap": softcap, "inverse_temperature": inverse_temperature,
    }  # fmt: skip
    # kept logits that are consumed make room for those that are computed again
    scratch = kept if keep else x.new_empty(rows * min(tile, vocab))
    # PyTorch leaves a factor of each row to the products where it can
    factor = row_factor(x.dtype, logsumexp, grad, **scores) if backend == "torch" else None
    scaled = x if factor is None else (x * factor).to(x.dtype)

    def logits_of(start: int, stop: int) -> Tensor:
        logits = tiles.view(kept, scratch, rows, start, stop, keep)
        if start < keep:
            return logits
        part = None if bias is None else bias[start:stop]
        return tiles.project(x, weight[start:stop], part, logits, keep=False)

    def add_(logits: Tensor, targets: Tensor, start: int, columns: slice | Tensor) -> None:
        """The gradients' part of these columns of the vocabulary; overwrites the logits."""
        if factor is None:
            tile_backward_(logits, targets, start, logsumexp, grad, **scores)
        else:
            tile_powers_(logits, targets, start, logsumexp)
        if needs_hidden:
            tiles.accumulate_(grad_hidden, logits, weight[columns].to(x.dtype))
        if needs_weight and isinstance(columns, slice):
            tiles.product_into_(grad_weight[columns], logits.t(), scaled)
        elif needs_weight:
            grad_weight[columns] = (logits.t() @ scaled).to(weight.dtype)
        if needs_bias:
            if factor is None:
                sums = logits.sum(0, dtype=torch.float32)
            else:
                sums = factor[:, 0].to(x.dtype) @ logits
            grad_bias[columns] = sums.to(weight.dtype)

    def apply_factor_() -> None:
        if factor is not None and needs_hidden:
            grad_hidden.mul_(factor)

    with autocast_off(hidden.device):
        if not vocab_filter:
            for start, stop in parts:
                add_(logits_of(start, stop), targets, start, slice(start, stop))
                if start < keep:
                    give_back(kept, rows * start, rows * stop)
            apply_factor_()
            return grad_hidden.to(hidden.dtype), grad_weight, grad_bias

        chosen = VocabFilter(
            vocab_filter, targets, logsumexp, vocab,
            functools.partial(tile_forward_, **scores), functools.partial(to_scores_, **scores),
        )  # fmt: skip
        copies = x.new_empty(rows * min(tile, vocab))
        for start, stop in parts:
            logits = logits_of(start, stop)
            chosen.scan(logits, start)
            part, places, columns = chosen.take(logits, start, copies)
            if columns.numel():
                add_(part, places, 0, columns)
        if chosen.decide():
            apply_factor_()
            # of a softcap, the slope at zero: left-out scores are small
            share = grad * chosen.left_out_mass() * (-logit_scale * inverse_temperature)
            q = chosen.left_out_shares()
            if needs_hidden:
                grad_hidden.addr_(share, (q.to(weight.dtype) @ weight).float())
            if needs_weight:
                grad_weight.addr_(q.to(weight.dtype), (share.to(x.dtype) @ x).to(weight.dtype))
            if needs_bias:
                grad_bias.add_(q * share.sum())
        else:
            for start, stop in parts:
                logits = logits_of(start, stop)
                part, places, columns = chosen.take(logits, start, copies, staying=False)
                if columns.numel():
                    add_(part, places, 0, columns)
            apply_factor_()
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@_linear_logprobs_backward_op.register_fake
def _(grad, hidden, weight, targets, bias, logsumexp, kept, logit_scale, softcap,
      inverse_temperature, backend, tile, needs, vocab_filter):  # fmt: skip
    scratch = hidden.shape[0] * min(tile, weight.shape[0])
    logits = kept.new_empty(scratch if kept.numel() == 0 else 0)
    copies = kept.new_empty(scratch if vocab_filter else 0)
    del logits, copies
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *options = inputs
    ctx.options = options
    _, logsumexp, kept = output
    # without this, autograd would make (N, V) zeros as the gradient of the kept logits
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, kept)
    ctx.save_for_backward(hidden, weight, targets, bias, logsumexp, kept)


def _backward(ctx, grad, *_):
    try:
        hidden, weight, targets, bias, logsumexp, kept = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "linear_logprobs: the first backward consumed the kept logits (or its inputs were "
            "changed in place); call it again, or pass logits_budget_mb=0 to recompute them"
        ) from error
    logit_scale, softcap, inverse_temperature, backend, _, tile, _, vocab_filter = ctx.options
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return (None, None, None, None, *nothing)
    if kept.numel() == 0:  # the operator declares that it writes here: nothing saved may be named
        kept = kept.new_empty(0)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _linear_logprobs_backward_op(
        grad.float(), hidden, weight, targets, bias, logsumexp, kept,
        logit_scale, softcap, inverse_temperature, backend, tile, needs, vocab_filter,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (d_hidden, d_weight, None, d_bias, *nothing)


_linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    logits_budget_mb: float = 1024,
    vocab_filter: float | None = None,
) -> Tensor:
    """Log-probabilities of `targets` under the LM head, without holding a matrix (N, V) of them.

    Equals, in fp32 whatever the dtype of the inputs:

        z = logit_scale * (hidden @ weight.T + bias)
        z = softcap * tanh(z / softcap)                    # if softcap
        log_softmax(z.float() / temperature, -1)[arange(N), targets]

    Logits are rounded to the dtype of the inputs (to that of autocast inside autocast), as a Linear
    layer does; sums, log-probs and the gradient of the logits are computed in fp32.

    Memory: at most `logits_budget_mb` of logits. What fits is kept for a gradient and overwritten
    by the backward: three matrix products in all, if that is everything. On a CPU the backward
    gives their memory back as it goes (`ops.cpu.pages`): the peak is the larger of logits and
    weight gradient, and a tile. The rest is recomputed tile by tile, a fourth product for these
    columns. Without a gradient, and where they will be recomputed, the Triton backend makes none
    of half-precision inputs: its forward is one kernel, in which they exist in registers alone. No
    fp32 buffer of (V, H); the gradient of a frozen tensor is not computed.

    `vocab_filter=ε` leaves out of the backward every column of the vocabulary that no token gives a
    probability of ε, targets apart, and puts their mass back in a correction of rank one (module
    `tralign_fast.ops.vocab_filter`): the backward's products shrink to the columns that stay. On
    SmolLM2's own samples the gradients are off by less than rounding them to bf16 at ε = 3e-5, and
    from 512 tokens on at 1e-4. After a backward, `ops.vocab_filter.last_vocab_filter()`
    tells how many columns stayed and the largest mass that a token lost; above 0.1 the backward is
    exact, with one warning. Log-probs are always exact. Choosing waits for the device once a tile.

    Args:
        hidden: (N, H) hidden states of the scored positions, fp32, bf16 or fp16.
        weight: (V, H) of the LM head, the dtype of `hidden` (any, inside autocast).
        targets: (N,) int64 token ids in [0, V).
        bias: (V,) of the LM head.
        softcap: cap of the logits (Gemma-2: 30).
        logit_scale: factor of the logits (Cohere: logit_scale; Granite: 1 / logits_scaling).
        temperature: the scores are divided by it, after the cap.
        backend: "auto" (Triton on a GPU, else PyTorch), "torch" or "triton".
        logits_budget_mb: MiB of logits that may exist at once; 0 recomputes in the smallest tiles
            (256 columns; on a GPU 2,048 and 16 MiB).
        vocab_filter: ε in [0, 1), 3e-5 if in doubt; None and 0 leave no column out.

    Returns:
        (N,) float32. N = 0 gives an empty tensor that can be differentiated.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target lies outside the vocabulary
            (on a GPU, where looking would stall, such a target's log-prob is NaN).
        RuntimeError: a second backward through logits that the first one has overwritten.
    """
    check_arguments(hidden, weight, targets, bias, softcap, temperature, vocab_filter)
    device = hidden.device
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type):
        compute_dtype = torch.get_autocast_dtype(device.type)
    elif weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_logprobs: hidden is {hidden.dtype}, weight {weight.dtype}; expected one dtype"
        )
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    backend = pick_backend(backend, device)
    tile, keep = tiles.plan(
        hidden.shape[0], weight.shape[0], compute_dtype, device, int(logits_budget_mb * 2**20),
        wants_grad=wants_grad, wants_all_or_none=bool(vocab_filter),
        is_fused=_is_fused(backend, compute_dtype),
    )  # fmt: skip
    logps, _, _ = _linear_logprobs_op(
        hidden, weight, targets, bias,
        float(logit_scale), None if softcap is None else float(softcap), 1.0 / temperature,
        backend, compute_dtype, tile, keep,
        float(vocab_filter or 0.0),
    )  # fmt: skip
    return logps


def linear_logprobs_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The equation, with full logits in `dtype`, for tests and benchmarks."""
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
