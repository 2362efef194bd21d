"""Log-probabilities of target tokens without a matrix of log-probabilities.

Letters: N scored tokens, H hidden size, V vocabulary, W columns of one vocabulary tile.

The logits are made tile by tile, (N, W) at a time: how they are cut and multiplied is in
`ops.tiles`, what happens to a tile of logits in `ops.tile_ops` (PyTorch) and
`tralign_kernels.logprob` (Triton). Where no logits are kept, a Triton forward of half-precision
inputs takes one kernel for product and reduction instead (`tralign_kernels.linear_logprob`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tralign_fast.ops import powers, tiles
from tralign_fast.ops.backend import kernel, pick_backend
from tralign_fast.ops.checks import autocast_off, check_arguments, check_targets, logits_dtype
from tralign_fast.ops.consumption import Consumption, refuse_second_derivative, saved_tensors
from tralign_fast.ops.cpu.pages import give_back
from tralign_fast.ops.head_gradients import HeadGradients, Saved
from tralign_fast.ops.logits_budget import budget_bytes
from tralign_fast.ops.statistics import STATISTICS, RunningStatistics
from tralign_fast.ops.tile_ops import log_probs, new_logsumexp, tile_ops
from tralign_fast.ops.transform import LogitTransform
from tralign_fast.ops.vocab_filter import VocabFilter

_PLAIN = LogitTransform()


@torch.library.custom_op("tralign_fast::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    transform: list[float],  # `LogitTransform.numbers()`
    backend: str,
    compute_dtype: torch.dtype,
    tile: int,
    keep: int,  # columns whose logits are kept, the first ones: whole tiles
    vocab_filter: float,  # for the backward
    statistics: str = "",  # names of `STATISTICS`, with blanks between
    keeps_powers: bool = False,  # in place of logits: `ops.powers`
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs (N,) fp32, logsumexp (N, 2) fp32, kept logits: tile after tile, flat, statistics
    (number of names, N) fp32)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    check_targets(targets, vocab)
    logsumexp = new_logsumexp(rows, hidden.device)
    target_logit = torch.full((rows,), float("nan"), device=hidden.device)
    x = hidden.to(compute_dtype)
    kept = x.new_empty(rows * keep)
    wanted = statistics.split()
    if rows == 0:
        return target_logit, logsumexp, kept, logsumexp.new_empty(len(wanted), 0)
    scores = LogitTransform.of(transform)
    tile_forward_, _ = tile_ops(backend, scores)
    if keeps_powers:
        with autocast_off(hidden.device):
            logps = powers.forward_(
                x, weight, targets, bias, logsumexp, target_logit, kept, tile, scores
            )
        return logps, logsumexp, kept, logsumexp.new_empty(0, rows)
    fused = _is_fused(backend, compute_dtype, statistics)
    running = RunningStatistics(wanted, x, scores, backend) if wanted else None
    scratch = x.new_empty(0 if fused else rows * min(tile, vocab - keep))
    with autocast_off(hidden.device):
        for start, stop in tiles.cut(0, keep if fused else vocab, tile):
            out = tiles.view(kept, scratch, rows, start, stop, keep)
            part = None if bias is None else bias[start:stop]
            logits = tiles.project(x, weight[start:stop], part, out, start < keep)
            tile_forward_(logits, targets, start, logsumexp, target_logit, statistics=running)
            del logits  # before the next tile is made
            if running is not None:
                running.see_weight(weight[start:stop], part)
        if fused:
            _fused_forward_(x, weight, targets, bias, logsumexp, target_logit, keep, tile, scores)
        found = logsumexp.new_empty(0, rows) if running is None else running.results(x)
    return log_probs(target_logit, logsumexp), logsumexp, kept, found


def _is_fused(backend: str, dtype: torch.dtype, statistics: str = "") -> bool:
    """Whether product and reduction are one kernel where nobody reads the logits again.

    Not with statistics, which that kernel does not compute: by an H200's rates (4.2 TB/s, 700
    TFLOP/s, H = 4,096), writing and reading the logits once is a tenth of their product.

    Not in fp32: logits that the backward computes again by another product would differ from those
    of the logsumexp in their last digits, which are the digits of a probability near one.
    """
    return backend == "triton" and dtype != torch.float32 and not statistics


def _fused_forward_(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    target_logit: Tensor,
    first: int,  # column
    tile: int,
    transform: LogitTransform,
) -> None:
    linear_logprob_forward_ = kernel("linear_logprob_forward_")
    x = x if x.stride(1) == 1 else x.contiguous()
    # a weight of another dtype (autocast) is converted tile by tile, never as a whole
    tile = weight.shape[0] if weight.dtype == x.dtype else tile
    for start, stop in tiles.cut(first, weight.shape[0], tile):
        part = weight[start:stop].to(x.dtype)
        linear_logprob_forward_(
            x, part if part.stride(1) == 1 else part.contiguous(), targets, start, logsumexp,
            target_logit, bias=None if bias is None else bias[start:stop].to(x.dtype).contiguous(),
            **transform.kernel_options(),
        )  # fmt: skip


@linear_logprobs_op.register_fake
def _(hidden, weight, targets, bias, transform, backend, compute_dtype, tile, keep, vocab_filter,
      statistics="", keeps_powers=False):  # fmt: skip
    rows = hidden.shape[0]
    kept = hidden.new_empty(rows * keep, dtype=compute_dtype)
    # the scratch tile is allocated (and dies) here too, so that a memory trace sees the peak
    fused = _is_fused(backend, compute_dtype, statistics)
    kept.new_empty(0 if fused else rows * min(tile, weight.shape[0] - keep))
    logsumexp = hidden.new_empty((rows, 2), dtype=torch.float32)
    found = logsumexp.new_empty(len(statistics.split()), rows)
    return hidden.new_empty(rows, dtype=torch.float32), logsumexp, kept, found


@torch.library.custom_op("tralign_fast::linear_logprobs_backward", mutates_args=("kept",))
def _linear_logprobs_backward_op(
    grad: Tensor,  # (N,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N, 2) float32
    kept: Tensor,  # (N·W,), of the first W columns: consumed
    transform: list[float],  # `LogitTransform.numbers()`
    backend: str,
    tile: int,
    needs: list[bool],  # gradient of hidden, of weight, of bias
    vocab_filter: float,  # 0: none
    logps: Tensor | None = None,  # (N,) float32: powers are kept, not logits
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias), empty where not needed."""
    if hidden.shape[0] == 0:
        zeros = (hidden, weight, weight[:, 0])
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(t) if need else t.new_empty(0)
            for t, need in zip(zeros, needs, strict=True)
        )
        return d_hidden, d_weight, d_bias
    with autocast_off(hidden.device):
        x = hidden.to(kept.dtype)
        saved = Saved(
            x if logps is None else powers.aligned(x), weight, bias, targets, logsumexp,
            LogitTransform.of(transform), backend, logps,
        )  # fmt: skip
        logits = saved.logits(kept, tile)
        gradients = HeadGradients(
            saved, grad, needs,
            one_part=len(logits.parts) == 1 and not vocab_filter, all_columns=not vocab_filter,
        )  # fmt: skip
        if vocab_filter:
            _filtered_backward_(vocab_filter, saved, logits, gradients)
        else:
            _dense_backward_(saved, logits, gradients)
    return gradients.results(hidden.dtype)


def _dense_backward_(saved: Saved, logits: tiles.Logits, gradients: HeadGradients) -> None:
    rows = len(saved.targets)
    for start, stop in logits.parts:
        gradients.add_(logits.of(start, stop), saved.targets, start, slice(start, stop))
        if start < logits.keep:
            give_back(logits.kept, rows * start, rows * stop)
    gradients.scale_()


def _filtered_backward_(
    epsilon: float, saved: Saved, logits: tiles.Logits, gradients: HeadGradients
) -> None:
    columns_filter = VocabFilter(epsilon, saved)
    copies = logits.new_tile()
    for start, stop in logits.parts:
        tile = logits.of(start, stop)
        columns_filter.scan(tile, start)
        part, places, columns = columns_filter.take(tile, start, copies)
        if columns.numel():
            gradients.add_(part, places, 0, columns)
    if columns_filter.decide():
        gradients.scale_()
        columns_filter.correct_(gradients)
        return
    for start, stop in logits.parts:
        tile = logits.of(start, stop)
        part, places, columns = columns_filter.take(tile, start, copies, staying=False)
        if columns.numel():
            gradients.add_(part, places, 0, columns)
    gradients.scale_()


@_linear_logprobs_backward_op.register_fake
def _(grad, hidden, weight, targets, bias, logsumexp, kept, transform, backend, tile, needs,
      vocab_filter, logps=None):  # fmt: skip
    scratch = hidden.shape[0] * min(tile, weight.shape[0])
    logits = kept.new_empty(scratch if kept.numel() == 0 else 0)
    copies = kept.new_empty(scratch if vocab_filter else 0)
    del logits, copies
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


class HeadOptions(NamedTuple):
    """What the operator takes after its tensors."""

    transform: list[float]
    backend: str
    compute_dtype: torch.dtype
    tile: int
    keep: int
    vocab_filter: float
    statistics: str = ""
    keeps_powers: bool = False


class HeadNode:
    """What a node of autograd does whose inputs are those of the head: the part of its forward
    that is saved on `ctx`, and the gradients of these inputs by those of the log-probs."""

    @staticmethod
    def save(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],  # hidden, weight, targets, bias
        options: HeadOptions,
        logps: Tensor,  # (N,)
        logsumexp: Tensor,  # (N, 2)
        kept: Tensor,
        *more: Tensor,
    ) -> None:
        ctx.options = options
        ctx.consumption = Consumption(kept)
        own = logps if options.keeps_powers else None
        ctx.save_for_backward(*inputs, logsumexp, kept, own, *more)

    @staticmethod
    def saved(ctx: Any) -> tuple[Tensor, ...]:
        """What `save` was given, but for the options."""
        return saved_tensors(ctx, _CONSUMED)

    @staticmethod
    def gradients(
        ctx: Any,
        saved: tuple[Tensor, ...],  # the first seven of `saved`
        grad: Tensor,  # (N,) float32
        needs: list[bool],  # gradient of hidden, of weight, of bias
    ) -> list[Tensor | None]:
        """(d hidden, d weight, d bias)"""
        *inputs, kept, logps = saved
        ctx.consumption.check(kept, _CONSUMED)
        if kept.numel() == 0:  # the operator declares that it writes here: nothing saved, then
            kept = kept.new_empty(0)
        options = ctx.options
        found = _linear_logprobs_backward_op(
            grad, *inputs, kept,
            options.transform, options.backend, options.tile, needs, options.vocab_filter, logps,
        )  # fmt: skip
        return [g if need else None for g, need in zip(found, needs, strict=True)]


_CONSUMED = (
    "linear_logprobs: the first backward consumed the kept logits (or its inputs were changed in "
    "place); call it again, or pass logits_budget_mb=0 to recompute them"
)


def _setup_context(ctx, inputs, output) -> None:
    logps, logsumexp, kept, found = output
    # without this, autograd would make (N, V) zeros as the gradient of the kept logits
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, kept, found)
    HeadNode.save(ctx, inputs[:4], HeadOptions(*inputs[4:]), logps, logsumexp, kept)


def _backward(ctx, grad, *_):
    refuse_second_derivative("linear_logprobs")
    saved = HeadNode.saved(ctx)
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return (None, None, None, None, *nothing)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    d_hidden, d_weight, d_bias = HeadNode.gradients(ctx, saved, grad.float(), needs)
    return (d_hidden, d_weight, None, d_bias, *nothing)


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)


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
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
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
            (256 columns; on a GPU 2,048 and 16 MiB). None: 1024; on a GPU, for a batch with more,
            up to 4096 and half of the memory that is free (module
            `tralign_fast.ops.logits_budget`).
        vocab_filter: ε in [0, 1), 3e-5 if in doubt; None and 0 leave no column out.
        kept: what is kept for the backward: "logits", or "powers" (Triton, bf16, no softcap, no
            vocab_filter): the forward stores exp(score), which the backward's products take as it
            is, without a pass over it (module `tralign_kernels.linear_powers`). As near to exact
            as with logits; not timed on a GPU so far.

    Returns:
        (N,) float32. N = 0 gives an empty tensor that can be differentiated.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target lies outside the vocabulary
            (on a GPU, where looking would stall, such a target's log-prob is NaN).
        RuntimeError: a second backward through logits that the first one has overwritten, or one
            with create_graph=True.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    return _run(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter, kept=kept
    )[0]  # fmt: skip


def linear_logprobs_and_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    wanted: Collection[str],
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = _PLAIN,
    backend: str = "auto",
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprobs`, and what is wanted of `STATISTICS` of the same distributions, (N,) each.

    With z the scores of the softmax (`transform` of the logits) and p = softmax(z):

        entropy            -Σ p·log p, nats
        log_sum_sq_probs   log Σ p²
        mean_logits        the mean of z over the vocabulary
        is_top1            bool, z.argmax() == target: the first of several largest scores

    fp32, without gradient, from the tiles of logits that the log-probs are made of: no further
    product. In half precision `mean_logits` is of logits before they are rounded, on the PyTorch
    backend without a softcap, where it is a product with the mean row of the weight.

    Raises:
        ValueError: a name that is none of `STATISTICS`; else as `linear_logprobs`.
    """
    if unknown := [name for name in wanted if name not in STATISTICS]:
        raise ValueError(f"statistics are {', '.join(STATISTICS)}, got {', '.join(unknown)}")
    logps, table = _run(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter,
        " ".join(wanted),
    )  # fmt: skip
    found = dict(zip(wanted, table.unbind(0), strict=True))
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"] > 0
    return logps, found


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    backend: str,
    logits_budget_mb: float | None,
    vocab_filter: float | None,
    statistics: str = "",
    kept: str = "logits",
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), statistics (number of names, N)), of arguments that may be wrong."""
    options = checked_options(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter,
        statistics, kept,
    )  # fmt: skip
    logps, _, _, found = linear_logprobs_op(hidden, weight, targets, bias, *options)
    return logps, found


def checked_options(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    backend: str,
    logits_budget_mb: float | None,
    vocab_filter: float | None,
    statistics: str = "",
    kept: str = "logits",
) -> HeadOptions:
    """How the head's products are cut, for arguments that may be wrong."""
    check_arguments(hidden, weight, targets, bias, vocab_filter)
    device, compute_dtype = hidden.device, logits_dtype(hidden, weight)
    backend = pick_backend(backend, device, compute_dtype)
    rows, vocab = hidden.shape[0], weight.shape[0]
    wants = wants_grad(hidden, weight, bias)
    wanted = rows * vocab * compute_dtype.itemsize if wants else 0
    tile, keep = tiles.plan(
        rows, vocab, compute_dtype, device, budget_bytes(logits_budget_mb, wanted, hidden),
        wants_grad=wants, wants_all_or_none=bool(vocab_filter),
        is_fused=_is_fused(backend, compute_dtype, statistics),
    )  # fmt: skip
    others = {"vocab_filter": vocab_filter, "statistics": statistics}
    keeps_powers = powers.keeps_powers(
        kept, wants, backend, compute_dtype, weight, transform, others
    )
    return HeadOptions(
        transform.numbers(), backend, compute_dtype, tile, keep, float(vocab_filter or 0.0),
        statistics, keeps_powers,
    )  # fmt: skip


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
