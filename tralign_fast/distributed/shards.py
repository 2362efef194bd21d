"""Shards that FSDP2 has made of a model's parameters: which come together, and sums over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def check_release(accelerator: Accelerator, optim: Any) -> None:
    """Whether gradients can be released in these processes.

    Raises:
        ValueError: several processes that do not reduce a layer's gradients inside the backward, or
            an optimizer that has no step on shards.
    """
    sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None
    if accelerator.num_processes > 1 and not sharded:
        raise ValueError(
            "gradient_release=True: expected one process or FSDP2, got "
            f"{accelerator.num_processes} processes of {accelerator.distributed_type.value}, which "
            'average gradients after the backward; set fsdp=True and fsdp_config={"version": 2}, '
            "or leave it out"
        )
    name = str(getattr(optim, "value", optim))
    if sharded and "8bit" in name:
        raise ValueError(
            f"gradient_release=True: {name} has no step on FSDP2's shards; expected optim to be "
            "adamw_torch, adamw_torch_fused or adafactor"
        )


@dataclasses.dataclass(eq=False)
class ShardGroup:
    """Parameters whose gradients FSDP2 reduces at once: those of a layer, or of the rest."""

    parameters: list[Any]
    process_group: Any  # None: sums of this process alone
    device: torch.device  # which the process group can send from
    arrived: list[Any] = dataclasses.field(default_factory=list)

    def add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat tensors, each summed over all processes that hold shards, in one all-reduce. It runs
        in the stream that is current."""
        if self.process_group is None:
            return list(tensors)
        flat = torch.cat(list(tensors))
        there = flat.to(self.device)
        torch.distributed.all_reduce(there, group=self.process_group)
        return list(there.to(flat.device).split([len(t) for t in tensors]))


def shard_groups(model: nn.Module) -> list[ShardGroup]:
    """The groups of trained parameters of a model that FSDP2 has sharded.

    Raises:
        ValueError: a trained parameter that is not cut along its first dimension.
    """
    groups, seen = [], set()
    # children first: a module's own parameters are those that no module inside it has taken
    for module in reversed(list(model.modules())):
        if not isinstance(module, FSDPModule):
            continue
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]  # pyright: ignore[reportAttributeAccessIssue]
        seen |= {id(p) for p in own}
        if own:
            mesh, dim = _mesh_of(own[0])
            device = torch.device(mesh.device_type)
            groups.append(ShardGroup(own, mesh.get_group(dim), device))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if id(parameter) not in seen or not isinstance(parameter, DTensor):
                raise ValueError(
                    f"gradient_release=True: FSDP2 has not sharded {name}; shard all that is "
                    "trained, or leave it out"
                )
            _mesh_of(parameter)
    return groups


def _mesh_of(parameter: Any) -> tuple[Any, int]:
    """The mesh of a shard, and the dimension of it along which the parameter is cut."""
    cuts = [i for i, p in enumerate(parameter.placements) if isinstance(p, Shard)]
    if len(cuts) != 1 or parameter.placements[cuts[0]].dim != 0:
        raise ValueError(
            f"gradient_release=True: expected shards along the first dimension, got "
            f"{parameter.placements}; leave it out"
        )
    return parameter.device_mesh, cuts[0]


def shard_of(local: Tensor, parameter: Any, shape: torch.Size) -> Tensor:
    """A tensor of that shape, cut as `parameter` is, of which this process has `local`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride
    )
