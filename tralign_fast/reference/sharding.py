"""Where a reference meets several processes: whose shard of a weight it is, and whose file.

FSDP2's parameters are DTensors: a reference keeps and moves the local shard, with no communication.
So it does with ZeRO-3's, which are empty but for their `ds_tensor`: as many elements for every
process, flat, the last one's padded with what nobody reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_AT_ONCE = 1 << 26  # bytes of whole tensors that one collective gathers


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
    return _gathered([p for p in weights if hasattr(p, "ds_tensor")])


def _gathered(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
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


def whole_tensors(parameters: Sequence[Any]) -> list[Tensor]:
    """Copies of whole parameters of which every process has a shard, cut along the first dimension:
    one collective for up to 64 MiB of them. All must call."""
    if any(hasattr(p, "ds_tensor") for p in parameters):
        with _gathered([p for p in parameters if hasattr(p, "ds_tensor")]):
            return [p.detach().clone() for p in parameters]
    found: list[Tensor] = [p.detach() for p in parameters]
    sharded = [i for i, p in enumerate(parameters) if hasattr(p, "to_local")]
    for run in _runs_of(sharded, parameters):
        for index, tensor in zip(run, _gather([parameters[i] for i in run]), strict=True):
            found[index] = tensor
    return found


def _runs_of(indices: list[int], parameters: Sequence[Any]) -> Iterator[list[int]]:
    """Those of one dtype, so many at a time."""
    run: list[int] = []
    for index in sorted(indices, key=lambda i: str(parameters[i].dtype)):
        own = parameters[index]
        size = sum(parameters[i].nbytes for i in run)
        if run and (parameters[run[0]].dtype != own.dtype or size + own.nbytes > _AT_ONCE):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _gather(parameters: list[Any]) -> list[Tensor]:
    """Whole tensors of DTensors of one dtype and one mesh, of which processes have ⌈R/P⌉ rows, the
    last ones fewer or none."""
    from torch.distributed.tensor import Shard

    first = parameters[0]
    (dim,) = (i for i, place in enumerate(first.placements) if isinstance(place, Shard))
    group, count = first.device_mesh.get_group(dim), first.device_mesh.size(dim)
    sizes = [-(-p.shape[0] // count) * p.shape[1:].numel() for p in parameters]
    own = first.to_local().new_zeros(sum(sizes))
    for part, parameter in zip(own.split(sizes), parameters, strict=True):
        local = parameter.to_local().detach().reshape(-1)
        part[: local.numel()] = local
    all_of_them = own.new_empty(count, len(own))
    # torch 2.13 warns of the older name
    older = "all_gather_into_tensor"
    gather = getattr(torch.distributed, "all_gather_single", None)
    (gather or getattr(torch.distributed, older))(all_of_them.view(-1), own, group=group)
    return [
        part.reshape(-1)[: parameter.numel()].view(parameter.shape)
        for part, parameter in zip(all_of_them.split(sizes, 1), parameters, strict=True)
    ]


@torch.no_grad()
def broadcast_from_main(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Gives tensors of all processes, wherever they lie, the values of the first process; `device`
    is one that the process group sends from."""
    for tensor in tensors if process_count() > 1 else ():
        there = tensor.to(device)
        torch.distributed.broadcast(there, src=0)
        tensor.copy_(there)


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
