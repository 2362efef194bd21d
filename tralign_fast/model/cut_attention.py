"""Attention of a process's queries to the keys and values of all processes that hold a group.

Each layer gathers keys and values of the cut groups (`data.pieces`) in one collective, as one
tensor, and its backward reduce-scatters their gradients; queries stay where they are. Any mask that
a sequence alone can have then works as it does on one process, a sliding window too.

Letters: n tokens of this process's pieces, w of the process that has most, P processes, A attention
heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tralign_fast.data.layout import CutGroups
from tralign_fast.data.pieces import ScoredPieces
from tralign_fast.model.key_gather import GatherKeys

_meshes: dict[tuple[str, str], tuple[Any, Any]] = {}  # of process groups, by name and device


def gather_rows(
    rows: Tensor,  # (n, …), n ≤ width
    width: int,
    group: str,
) -> Tensor:
    """(P·width, …): the rows of all processes of a group, each filled up to as many.

    The gradients of all processes' copies are added up where the rows came from.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if len(rows) < width:
        rows = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])
    held = DTensor.from_local(rows, mesh_of(group, rows.device.type), [Shard(0)], run_check=False)
    # asynchronous: what is computed before the result is read runs beside it
    everywhere = held.redistribute(placements=[Replicate()], async_op=True)
    return everywhere.to_local(grad_placements=[Partial()])


def mesh_of(name: str, kind: str) -> Any:
    """The mesh of a process group, by its name and the kind of device; made once."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    found = _meshes.get((name, kind))
    if found is None or found[0] is not group:  # another training's
        found = _meshes[name, kind] = group, DeviceMesh.from_group(group, kind)
    return found[1]


def attend_pieces(
    query: Tensor,  # (1, A, T, D), the pieces in front
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    cut: CutGroups,
    whole: Callable[[Tensor, Tensor, Tensor], Tensor],
    one: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """(1, T, A, D) attention output.

    Args:
        whole: attention of the whole groups behind the pieces, (1, A, t, D) and keys and values
            alike to (1, t, A, D).
        one: causal attention aligned at the bottom right, of (1, A, q, D) to keys and values
            (1, K, k, D), to (1, q, A, D).
    """
    n, heads = cut.tokens, key.shape[1]
    # (n, 2K, D)
    own = torch.cat([t[0, :, :n].transpose(0, 1) for t in (key, value)], 1)
    gathered = gather_rows(own, cut.width, cut.group)
    rest = [t[:, :, n:] for t in (query, key, value)]
    behind = whole(*rest) if rest[0].shape[2] else None
    (keys,) = GatherKeys.apply(cut.gather(query.device), gathered)  # pyright: ignore[reportGeneralTypeIssues]
    sequences = keys.split(cut.sequences)
    outputs = []
    queries = query[:, :, :n].split([segment.queries for segment in cut.segments], 2)
    for own_query, segment in zip(queries, cut.segments, strict=True):
        seen = sequences[segment.sequence][: segment.keys].transpose(0, 1)[None]
        outputs.append(one(own_query, *seen.split(heads, 1)))
    if behind is not None:
        outputs.append(behind)
    return torch.cat(outputs, 1)


def join_scores(
    logps: Tensor,  # (n,) float32 of this process's scored tokens
    statistics: dict[str, Tensor],  # (grad_tokens of `pieces`,) each
    pieces: ScoredPieces,
    grad_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) log-probs of the batch's tokens from those of all processes, and statistics of the first
    `grad_tokens` of them. One collective, of 4 bytes for each scored token and number."""
    missing = len(logps) - pieces.grad_tokens
    columns = [
        torch.cat([found.float(), found.new_zeros(missing, dtype=torch.float32)])
        for found in statistics.values()
    ]
    table = torch.stack([logps, *columns], 1)  # (n, 1 + statistics)
    gathered = gather_rows(table.index_select(0, pieces.sent), pieces.width, pieces.group)
    joined = torch.cat([table, gathered]).index_select(0, pieces.index)
    found = joined.detach()[:grad_tokens]
    return joined[:, 0], {
        name: found[:, 1 + i].to(own.dtype) for i, (name, own) in enumerate(statistics.items())
    }
