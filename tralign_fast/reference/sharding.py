"""Where a reference meets several processes: whose shard of a weight it is, and whose file.

FSDP2's parameters are DTensors: a reference keeps and moves the local shard, with no communication.
So it does with ZeRO-3's, which are empty but for their `ds_tensor`: as many elements for every
process, flat, the last one's padded with what nobody reads.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def process_index() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def from_main(value: Any) -> Any:
    """What the first process has, in all of them."""
    held = [value]
    if process_count() > 1:
        torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def from_all(value: Any) -> list[Any]:
    """What every process has, in the order of the processes, in all of them."""
    held = [value] * process_count()
    if process_count() > 1:
        torch.distributed.all_gather_object(held, value)
    return held


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process; all must ask."""
    held = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return bool(held)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 shards the model's parameters."""
    return any(hasattr(p, "to_local") or hasattr(p, "ds_tensor") for p in model.parameters())


def gathered(model: nn.Module | Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, every process has the whole weights of a model (or one of them) that was loaded under
    ZeRO-3, where only a prepared model gathers them itself; nothing happens to any other. All must
    enter."""
    weights = [model] if isinstance(model, Tensor) else model.parameters()
    parameters = [p for p in weights if hasattr(p, "ds_tensor")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(parameters)


def own_file(folder: Path, name: str) -> Path:
    """The file of this process: "window.safetensors", or "window-0-of-2.safetensors"."""
    if process_count() == 1:
        return folder / name
    stem, suffix = name.split(".", 1)
    return folder / f"{stem}-{process_index()}-of-{process_count()}.{suffix}"


def named_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before activation checkpointing wrapped their modules, and
    as shards where some of them were gathered for a forward."""
    reshard(model)
    named = (model.module if _zero3_engine(model) else model).named_parameters()
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in named}


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """This process's shard of a whole tensor, cut as `parameter` is; rank 0's values count."""
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def reshard(model: Any) -> None:
    """Lets go of gathered weights, so that the next forward gathers those that the shards hold now.

    After a forward without backward FSDP2 keeps the root's and the head's weights gathered; ZeRO-3
    always keeps small ones, and others that are soon needed again.
    """
    if _zero3_engine(model):
        model.optimizer.empty_partition_cache()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def _zero3_engine(model: Any) -> bool:
    return hasattr(getattr(model, "optimizer", None), "empty_partition_cache")
