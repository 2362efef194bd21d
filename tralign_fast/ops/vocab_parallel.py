"""`linear_logprobs` of a head whose vocabulary is cut up over processes (tensor parallelism).

Letters: N scored tokens, H hidden size, V vocabulary, R processes that share the head, W columns of
one vocabulary tile.

Every process has all hidden states and the weight's rows of its own columns, of which it makes
logits as `ops.logprobs` does. Then they tell each other, for every token, the logsumexp of their
columns and the target's score where it is one of theirs: one all-gather of 3·N fp32 numbers from
each (of 8·N with statistics), which all fold in the same order, to the same bits. A logsumexp is
two numbers (`ops.tile_ops`); one alone would round logits of 1,000 to 6e-5.

In the backward the weight's gradient stays where the weight is, and d hidden, of which every
process has the part of its columns, is added up: one all-reduce of N·H in the dtype of the hidden
states. Nothing of size V is ever sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tralign_fast.ops.checks import check_targets
from tralign_fast.ops.head_operator import HeadNode, HeadOptions, columns_forward, head_backward
from tralign_fast.ops.statistics import merged_tables, named_statistics
from tralign_fast.ops.tile_ops import fold_, log_probs, new_logsumexp
from tralign_fast.ops.transform import LogitTransform


def run_on_shards(
    hidden: Any,  # (N, H), the same on every process
    weight: Any,  # (V, H) DTensor, cut along V
    targets: Tensor,  # (N,)
    bias: Any,  # (V,) DTensor, cut as the weight is
    options: HeadOptions,  # for the part of this process
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), statistics (number of names, N)), the same on every process.

    Gradients of weight and bias are DTensors, cut as these are; that of the hidden states is whole.

    Raises:
        ValueError: another placement than Shard(0) on one mesh dimension, a bias that is cut in
            another way, or a `vocab_filter`, which would choose columns by what others hold.
    """
    if options.vocab_filter:
        raise ValueError(
            f"linear_logprobs: vocab_filter={options.vocab_filter} cannot choose among columns "
            "that several processes share; leave it out beside tensor parallelism"
        )
    group, first = _cut_of(weight)
    if bias is not None and (not hasattr(bias, "device_mesh") or _cut_of(bias) != (group, first)):
        raise ValueError("linear_logprobs: expected a bias that is cut up as the weight is")
    if hasattr(hidden, "device_mesh"):
        hidden = hidden.full_tensor()
    vocab = weight.shape[0]
    weight, bias = (None if t is None else t.to_local() for t in (weight, bias))
    logps, _, _, found = _vocab_parallel_op(
        hidden, weight, targets, bias, options.transform, options.backend, options.compute_dtype,
        max(1, options.tile), options.keep, [first, vocab], group, options.statistics,
    )  # fmt: skip
    return logps, found


def _cut_of(weight: Any) -> tuple[str, int]:
    """(name of the group of processes that share it, the first row of this one's part)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        raise ValueError(
            "linear_logprobs: expected a weight that is cut along the vocabulary over one "
            f"dimension of the mesh, got {tuple(map(str, placements))} of {tuple(weight.shape)}"
        )
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    # a process whose part is empty: its offset is of no matter
    return mesh.get_group(cut[0]).group_name, min(int(offset[0]), weight.shape[0])


@torch.library.custom_op("tralign_fast::vocab_parallel_logprobs", mutates_args=())
def _vocab_parallel_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V/R, H)
    targets: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V/R,)
    transform: list[float],  # `LogitTransform.numbers()`
    backend: str,
    compute_dtype: torch.dtype,
    tile: int,
    keep: int,  # columns whose logits are kept, the first ones: whole tiles
    columns: list[int],  # the first of this process, the number of all
    group: str,
    statistics: str,  # names of `STATISTICS`, with blanks between
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tralign_fast::linear_logprobs`; the logsumexp is of all columns, the kept logits are of
    this process's."""
    first, vocab = columns
    check_targets(targets, vocab)
    wanted = statistics.split()
    target_logit, logsumexp, kept, table = columns_forward(
        hidden, weight, targets - first, bias, LogitTransform.of(transform), backend,
        compute_dtype, tile, keep, wanted,
    )  # fmt: skip
    own = (targets >= first) & (targets < first + len(weight))
    # a target outside the vocabulary, which a GPU does not look for, stays NaN
    others = torch.where((targets >= 0) & (targets < vocab), 0.0, float("nan")).float()
    target_logit = torch.where(own, target_logit, others)
    told = [target_logit[None], logsumexp.t(), *([] if table is None else [table])]
    parts = _from_all(torch.cat(told), group)  # (R, 3 or 8, N)
    logsumexp = new_logsumexp(len(hidden), hidden.device)
    for part in parts:
        fold_(logsumexp, part[1], part[2])
    found = logsumexp.new_empty(len(wanted), len(hidden))
    if table is not None:
        shares = (parts[:, 1] - logsumexp[:, 0]).add_(parts[:, 2]).sub_(logsumexp[:, 1]).exp_()
        found = named_statistics(wanted, merged_tables(parts[:, 3:], shares), vocab)
    return log_probs(parts[:, 0].sum(0), logsumexp), logsumexp, kept, found


def _resolve(group: Any) -> dist.ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)


def _from_all(own: Tensor, group: str) -> Tensor:
    """(R, *shape), in the order of the vocabulary."""
    processes = _resolve(group)
    parts = own.new_empty(processes.size(), *own.shape)
    dist.all_gather(list(parts.unbind(0)), own.contiguous(), group=processes)
    return parts


@_vocab_parallel_op.register_fake
def _(hidden, weight, targets, bias, transform, backend, compute_dtype, tile, keep, columns, group,
      statistics):  # fmt: skip
    rows = hidden.shape[0]
    logsumexp = hidden.new_empty((rows, 2), dtype=torch.float32)
    return (
        hidden.new_empty(rows, dtype=torch.float32),
        logsumexp,
        hidden.new_empty(rows * keep, dtype=compute_dtype),
        logsumexp.new_empty(len(statistics.split()), rows),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *options, columns, ctx.group, statistics = inputs
    logps, logsumexp, kept, found = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, kept, found)
    own = (hidden, weight, targets - columns[0], bias)  # the targets as columns of this weight
    HeadNode.save(ctx, own, HeadOptions(*options, 0.0, statistics), logps, logsumexp, kept)  # pyright: ignore[reportCallIssue]


def _backward(ctx, grad, *_):
    d_hidden, d_weight, d_bias = head_backward(ctx, grad)
    if d_hidden is not None:
        dist.all_reduce(d_hidden, group=_resolve(ctx.group))
    return (d_hidden, d_weight, None, d_bias, *(None,) * 8)


_vocab_parallel_op.register_autograd(_backward, setup_context=_setup_context)
