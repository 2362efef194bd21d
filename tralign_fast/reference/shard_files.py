"""Tensors of a sharded reference on the disk, in a form that any number of processes reads.

FSDP2's shards are written by `torch.distributed.checkpoint` into a folder, `model.shards` where a
reference that is whole has `model.safetensors`. Both are read as whole tensors and as shards. What
ZeRO-3 shards has no layout that another number of processes could read: a file for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from tralign_fast.ops.ema import local_shard
from tralign_fast.reference.sharding import own_file, process_index, shard_like
from tralign_fast.reference.writes import write


def save_tensors(path: Path, tensors: dict[str, Tensor], like: dict[str, Any]) -> None:
    """Writes tensors so that `load_tensors` finds them; every process calls it.

    Args:
        path: FOLDER/NAME.safetensors.
        tensors: whole ones, DTensors, or the local shards of what `like` has under their names.
        like: the parameters that say how shards are cut.

    Raises:
        OSError: a process could not write its part.
    """
    if _any(tensors, like, "ds_tensor"):
        local = {name: local_shard(t).contiguous() for name, t in tensors.items()}
        own = own_file(path.parent, path.name)
        write(lambda local, group: save_file(local, own), local)
    elif _any(tensors, like, "to_local"):
        shards = {name: _as_shard(t, like.get(name)) for name, t in tensors.items()}
        write_shards(shards, shards_of(path))
    elif process_index() == 0:
        whole = {name: t.detach().contiguous() for name, t in tensors.items()}
        write(lambda whole, group: save_file(whole, path), whole)


def write_shards(content: dict[str, Any], folder: Path) -> None:
    """Every process writes its shards by `torch.distributed.checkpoint`, now or in the background.

    Raises:
        OSError: a process could not write its part.
    """
    write(
        lambda content, group: said_by_all(
            lambda: dcp.save(content, checkpoint_id=folder, process_group=group)
        ),
        content,
    )


def load_tensors(path: Path, like: dict[str, Any]) -> dict[str, Tensor]:
    """What `save_tensors` wrote, as whole tensors or as shards on the host, as `like` is cut.

    Raises:
        OSError, ValueError: a file is missing or damaged, or has other tensors.
    """
    if _any({}, like, "ds_tensor"):
        return load_file(own_file(path.parent, path.name))
    cut = _any({}, like, "to_local")
    folder = shards_of(path)
    if not folder.is_dir():
        whole = load_file(path)
        sharded = {name for name, p in like.items() if hasattr(p, "to_local")}  # not all, of TP
        return {n: shard_like(t, like[n]).cpu() if n in sharded else t for n, t in whole.items()}
    if not cut:
        return read_whole(folder)
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if missing := next((name for name in names if name not in like), None):
        raise ValueError(f"{folder.name} holds {missing}, which the model has not")
    local = {name: torch.empty_like(local_shard(like[name]), device="cpu") for name in names}
    shards = {name: _as_shard(t, like[name]) for name, t in local.items()}
    said_by_all(lambda: dcp.load(shards, checkpoint_id=folder))
    return local


def read_whole(folder: Path) -> dict[str, Any]:
    """All that a folder of `torch.distributed.checkpoint` holds, under its flat names.

    Every process that asks reads all of it; no other takes part.
    """
    found: dict[str, Any] = {}
    for name, kind in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        is_tensor = isinstance(kind, TensorStorageMetadata)
        found[name] = torch.empty(kind.size, dtype=kind.properties.dtype) if is_tensor else None
    said_by_all(lambda: dcp.load(found, checkpoint_id=folder, no_dist=True))
    return found


def shards_of(path: Path) -> Path:
    """The folder of shards in place of a file."""
    return path.with_suffix(".shards")


def _as_shard(tensor: Tensor, like: Any) -> Tensor:
    """A local shard as the DTensor whose part it is, wherever it lies: `DTensor.from_local` would
    copy what lies on the host to the device."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor.detach()
    return DTensor(tensor.detach(), like._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def _any(tensors: dict[str, Tensor], like: dict[str, Any], attribute: str) -> bool:
    return any(hasattr(p, attribute) for p in (*tensors.values(), *like.values()))


def said_by_all(action: Callable[[], Any]) -> None:
    """`CheckpointException`, which is no Exception, holds the error of every process that had one:
    the first is raised in its place."""
    try:
        action()
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise OSError(f"process {rank}: {text}") from error
