"""Checkpoints of a model that transformers has cut up over processes: weights whole, optimizer
states as each process has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tralign_fast.reference.sharding import own_file

_PARTS = "_tralign_shard"  # marks what stands for a DTensor


def load_weights(model: nn.Module, folder: Path) -> Any:
    """Reads whole weights, of which every process keeps its own part; returns what was missing or
    unexpected. All must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        whole |= load_file(file)
    options = StateDictOptions(full_state_dict=True, strict=False)
    return set_model_state_dict(model, whole, options=options)


def save_optimizer(optimizer: Any, folder: Path, name: str) -> None:
    """Writes this process's part of the states into its own file."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: _taken_apart(value) for key, value in own.items()}
        for index, own in state["state"].items()
    }
    torch.save(state, own_file(folder, name))


def read_optimizer(optimizer: Optimizer, folder: Path, name: str) -> dict[str, Any]:
    """What `save_optimizer` has written, as `load_state_dict` of the same optimizer takes it."""
    state = torch.load(own_file(folder, name), map_location="cpu", weights_only=True)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    state["state"] = {
        index: {key: _put_together(value, parameters[index]) for key, value in own.items()}
        for index, own in state["state"].items()
    }
    return state


def _taken_apart(value: Any) -> Any:
    """A DTensor as plain types, which `torch.load` takes without running code."""
    if not hasattr(value, "placements"):
        return value
    kinds = [
        ["shard", p.dim]
        if p.is_shard()
        else ["partial", p.reduce_op]
        if p.is_partial()
        else ["copy"]
        for p in value.placements
    ]
    return {_PARTS: value.to_local(), "placements": kinds, "shape": list(value.shape)}


def _put_together(value: Any, parameter: Any) -> Any:
    if not isinstance(value, dict) or _PARTS not in value:
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    made = {"shard": Shard, "partial": Partial, "copy": Replicate}
    placements = [made[kind](*rest) for kind, *rest in value["placements"]]
    if tuple(value["shape"]) == tuple(parameter.shape):
        placements = list(parameter.placements)  # strided shards of two dimensions among them
    local: Tensor = value[_PARTS].to(parameter.device)
    stride = torch.empty(value["shape"], device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, placements, run_check=False,
        shape=torch.Size(value["shape"]), stride=stride,
    )  # fmt: skip
