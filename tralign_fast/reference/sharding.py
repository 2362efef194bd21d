"""Where a reference meets several processes: whose shard of a weight it is, and whose file.

FSDP2's parameters are DTensors: a reference keeps and moves the local shard, with no communication.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def process_index() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model's parameters."""
    return any(hasattr(p, "to_local") for p in model.parameters())


def own_file(folder: Path, name: str) -> Path:
    """The file of this process: "window.safetensors", or "window-0-of-2.safetensors"."""
    if process_count() == 1:
        return folder / name
    stem, suffix = name.split(".", 1)
    return folder / f"{stem}-{process_index()}-of-{process_count()}.{suffix}"


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before activation checkpointing wrapped their modules, and
    as shards where FSDP2 has gathered some of them for a forward."""
    reshard(model)
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """This process's shard of a whole tensor, cut as `parameter` is; rank 0's values count."""
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights, so that the next forward gathers those that the shards hold now.

    After a forward without backward FSDP2 keeps the root's and the head's weights gathered.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]
