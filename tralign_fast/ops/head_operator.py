"""The operator below `linear_logprobs`: forward, backward, and what a node of autograd saves.

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
from tralign_fast.ops.backend import kernel
from tralign_fast.ops.checks import autocast_off, check_targets
from tralign_fast.ops.consumption import Consumption, refuse_second_derivative, saved_tensors
from tralign_fast.ops.cpu.pages import give_back
from tralign_fast.ops.head_gradients import HeadGradients, Saved
from tralign_fast.ops.statistics import RunningStatistics, named_statistics
from tralign_fast.ops.tile_ops import log_probs, new_logsumexp, tile_ops
from tralign_fast.ops.transform import LogitTransform
from tralign_fast.ops.vocab_filter import VocabFilter


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
    check_targets(targets, weight.shape[0])
    wanted, scores = statistics.split(), LogitTransform.of(transform)
    if keeps_powers and len(hidden):
        return _powers_forward(
            hidden, weight, targets, bias, compute_dtype, tile, keep, scores, wanted
        )
    target_logit, logsumexp, kept, table = columns_forward(
        hidden, weight, targets, bias, scores, backend, compute_dtype, tile, keep, wanted
    )
    found = logsumexp.new_empty(len(wanted), len(hidden))
    if table is not None:
        found = named_statistics(wanted, table, len(weight))
    return log_probs(target_logit, logsumexp), logsumexp, kept, found


def columns_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64, of other columns too
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    backend: str,
    compute_dtype: torch.dtype,
    tile: int,
    keep: int,
    wanted: Collection[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(the target's score (N,) fp32, NaN where it is none of these columns, logsumexp (N, 2) fp32,
    kept logits, `RunningStatistics.table` if any are wanted) of the columns that these rows of a
    head make."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    logsumexp = new_logsumexp(rows, hidden.device)
    target_logit = torch.full((rows,), float("nan"), dtype=torch.float32, device=hidden.device)
    x = hidden.to(compute_dtype)
    kept = x.new_empty(rows * keep)
    if rows == 0:
        return target_logit, logsumexp, kept, None
    tile_forward_, _ = tile_ops(backend, transform)
    fused = is_fused(backend, compute_dtype, wanted)
    running = RunningStatistics(wanted, x, transform, backend) if wanted else None
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
            _fused_forward_(
                x, weight, targets, bias, logsumexp, target_logit, keep, tile, transform
            )
        table = None if running is None else running.columns(x)
    return target_logit, logsumexp, kept, table


def _powers_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    compute_dtype: torch.dtype,
    tile: int,
    keep: int,
    scores: LogitTransform,
    wanted: Collection[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns, with powers of the scores in place of logits."""
    x, rows = hidden.to(compute_dtype), len(hidden)
    logsumexp = new_logsumexp(rows, hidden.device)
    target_logit = torch.full((rows,), float("nan"), dtype=torch.float32, device=hidden.device)
    kept = x.new_empty(rows * keep)
    running = RunningStatistics(wanted, x, scores, "triton") if wanted else None
    table = None if running is None else running.table
    with autocast_off(hidden.device):
        logps = powers.forward_(
            x, weight, targets, bias, logsumexp, target_logit, kept, tile, scores, table
        )
    found = logsumexp.new_empty(0, rows)
    if table is not None:
        found = named_statistics(wanted, table, len(weight))
    return logps, logsumexp, kept, found


def is_fused(
    backend: str, dtype: torch.dtype, statistics: Collection[str] = "", keeps_powers: bool = False
) -> bool:
    """Whether product and reduction are one kernel where nobody reads the logits again.

    Not with statistics, unless powers are kept, whose kernel has them: it is not timed, and by an
    H200's rates (4.2 TB/s, 700 TFLOP/s, H = 4,096) writing and reading the logits once is a tenth
    of their product.

    Not in fp32: logits that the backward computes again by another product would differ from those
    of the logsumexp in their last digits, which are the digits of a probability near one.
    """
    return keeps_powers or (backend == "triton" and dtype != torch.float32 and not statistics)


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
    fused = is_fused(backend, compute_dtype, statistics, keeps_powers)
    kept.new_empty(0 if fused else rows * min(tile, weight.shape[0] - keep))
    logsumexp = hidden.new_empty((rows, 2), dtype=torch.float32)
    found = logsumexp.new_empty(len(statistics.split()), rows)
    return hidden.new_empty(rows, dtype=torch.float32), logsumexp, kept, found


@torch.library.custom_op("tralign_fast::linear_logprobs_backward", mutates_args=("kept",))
def linear_logprobs_backward_op(
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


@linear_logprobs_backward_op.register_fake
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
        found = linear_logprobs_backward_op(
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
    d_hidden, d_weight, d_bias = head_backward(ctx, grad)
    return (d_hidden, d_weight, None, d_bias, *(None,) * len(ctx.options))


def head_backward(ctx: Any, grad: Tensor | None) -> list[Tensor | None]:
    """(d hidden, d weight, d bias) by the gradient (N,) of the log-probs, of a node that takes
    hidden, weight, targets and bias first."""
    refuse_second_derivative("linear_logprobs")
    saved = HeadNode.saved(ctx)
    if grad is None:
        return [None] * 3
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    return HeadNode.gradients(ctx, saved, grad.float(), needs)


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
