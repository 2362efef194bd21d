"""Weights and optimizer of a checkpoint that lie there otherwise than this run writes them.

A checkpoint has them whole, as one process and DDP write them, or as FSDP2's (whole again, in files
of its own, or in shards by `torch.distributed.checkpoint`), or as those of tensor parallelism
(weights whole, the optimizer in shards). transformers reads what the run itself would write, for
any number of processes. Here is the rest, and all that a run of tensor parallelism reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.modules.module import _IncompatibleKeys
from transformers.trainer import OPTIMIZER_NAME

from tralign_fast.distributed.optimizer_state import innermost, kept_options, load_exactly
from tralign_fast.distributed.shards_on_disk import (
    MODEL,
    OPTIMIZER,
    optimizer_folder,
    read_optimizer,
)
from tralign_fast.distributed.tensor_parallel import is_sharded_by_transformers
from tralign_fast.model.converted import no_weights
from tralign_fast.reference.shard_files import read_whole
from tralign_fast.reference.sharding import from_main, named_parameters, process_index

_WHOLE = "whole"
_WHOLE_FSDP = "FULL_STATE_DICT"
_SHARDS = "SHARDED_STATE_DICT"


def layout_of(folder: Path, optimizer: bool = False) -> str:
    """How the weights of a checkpoint lie there, or the optimizer's states."""
    shards = optimizer_folder(folder) if optimizer else folder / f"{MODEL}_0"
    if shards.is_dir():
        return _SHARDS
    name = OPTIMIZER if optimizer else MODEL
    return _WHOLE_FSDP if (folder / f"{name}.bin").exists() else _WHOLE


def is_own_layout(trainer: Any, folder: Path, optimizer: bool = False) -> bool:
    """Whether transformers reads the weights, or the optimizer."""
    if is_sharded_by_transformers(trainer.model):
        return False
    own = _WHOLE
    if trainer.is_fsdp_enabled:
        own = trainer.accelerator.state.fsdp_plugin.state_dict_type.name
    return trainer.is_deepspeed_enabled or layout_of(folder, optimizer) == own


def load_weights(trainer: Any, folder: Path) -> None:
    """The weights of another layout into the policy."""
    model = trainer.model
    state = _weights(folder, model) if _reads(trainer) else {}
    if _has_shards(trainer):
        trained = {name for name, p in named_parameters(model).items() if p.requires_grad}
        missing = from_main(sorted(trained - {*state}))
        if missing and trainer.is_fsdp_enabled:
            raise no_weights(model, folder, missing)
        # a state without frozen weights is a PEFT adapter's
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, state, options=options)
        # under other names, perhaps
        trainer._issue_warnings_after_load(_IncompatibleKeys(missing, []))
    elif hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state, model.active_adapter)
    else:
        trainer._issue_warnings_after_load(model.load_state_dict(state, strict=False))


def load_optimizer(trainer: Any, folder: Path) -> None:
    """The optimizer's states of another layout, with the options of this run."""
    optimizer, names = trainer.optimizer, _names(trainer)
    in_shards = layout_of(folder, optimizer=True) == _SHARDS
    if _has_shards(trainer) and not in_shards:
        state = _states(folder, names) if _reads(trainer) else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        with kept_options(optimizer):
            set_optimizer_state_dict(trainer.model, innermost(optimizer), state, options=options)
        return
    if _has_shards(trainer):
        state = read_optimizer(trainer.model, optimizer, folder)
    else:
        state = _states(folder, names)
    places = {name: place for place, name in enumerate(n for group in names for n in group)}
    groups = zip(state["param_groups"], names, strict=True)
    load_exactly(
        optimizer,
        {
            "state": {places[name]: value for name, value in state["state"].items()},
            "param_groups": [{**g, "params": [places[n] for n in own]} for g, own in groups],
        },
    )


def _has_shards(trainer: Any) -> bool:
    return trainer.is_fsdp_enabled or is_sharded_by_transformers(trainer.model)


def _reads(trainer: Any) -> bool:
    """Shards are dealt out by the process that reads."""
    return not _has_shards(trainer) or process_index() == 0


def _weights(folder: Path, model: Any) -> dict[str, Any]:
    """Whole weights by name."""
    layout = layout_of(folder)
    if layout == _SHARDS:
        read = read_whole(folder / f"{MODEL}_0")
        return {name.removeprefix("model."): value for name, value in read.items()}
    if layout == _WHOLE_FSDP:
        path = folder / f"{MODEL}.bin"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state: dict[str, Any] = {}
    for path in sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.*")]):
        state |= load_file(path)
    if not hasattr(model, "peft_config"):
        return state
    adapter = model.active_adapter
    own = {
        name.replace(f".{adapter}.", "."): name for name in model.state_dict() if adapter in name
    }
    return {own.get(name, name): value for name, value in state.items()}


def _states(folder: Path, names: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state dict with names in place of numbers."""
    if optimizer_folder(folder).is_dir():
        return _nested(optimizer_folder(folder))[OPTIMIZER]
    whole = folder / OPTIMIZER_NAME
    path = whole if whole.exists() else folder / f"{OPTIMIZER}.bin"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if path != whole:
        return state
    groups = list(zip(state["param_groups"], names, strict=True))
    named = {
        index: name
        for group, own in groups
        for index, name in zip(group["params"], own, strict=True)
    }
    return {
        "state": {named[index]: value for index, value in state["state"].items()},
        "param_groups": [{**group, "params": own} for group, own in groups],
    }


def _names(trainer: Any) -> list[list[str]]:
    """Of the parameters that the optimizer has, in its order."""
    names = {id(p): name for name, p in named_parameters(trainer.model).items()}
    groups = innermost(trainer.optimizer).param_groups
    return [[names[id(p)] for p in group["params"]] for group in groups]


def _nested(folder: Path) -> dict[str, Any]:
    """What lies under flat names, as it was before."""
    paths = dcp.FileSystemReader(folder).read_metadata().planner_data
    result: dict[Any, Any] = {}
    for name, value in read_whole(folder).items():
        *path, last = paths[name]
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    own = result[OPTIMIZER]
    own["param_groups"] = [own["param_groups"][i] for i in sorted(own["param_groups"])]
    return result
