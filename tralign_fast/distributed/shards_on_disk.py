"""Weights and optimizer states of which processes have shards, as accelerate lays them out.

Optimizer states of tensor parallelism are written as accelerate writes those of FSDP2's
SHARDED_STATE_DICT, by `torch.distributed.checkpoint`: a form that every layout reads, whole or in
shards. What FSDP2 has is written here only in the background; accelerate's functions block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from tralign_fast.distributed.optimizer_state import innermost
from tralign_fast.reference.shard_files import said_by_all, write_shards
from tralign_fast.reference.sharding import process_index
from tralign_fast.reference.writes import write

MODEL = "pytorch_model_fsdp"
OPTIMIZER = "optimizer"


def optimizer_folder(folder: Path) -> Path:
    """Where a checkpoint has the optimizer's shards, if it has them in shards."""
    return folder / f"{OPTIMIZER}_0"


def optimizer_shards(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's states by parameters' names, as `torch.distributed.checkpoint` takes them.

    States that are not there yet are made, by a step of a learning rate of 0.
    """
    return {OPTIMIZER: get_optimizer_state_dict(model, innermost(optimizer))}


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Every process writes its shards; all must call.

    Raises:
        OSError: a process could not write its part.
    """
    write_shards(optimizer_shards(model, optimizer), optimizer_folder(folder))


def save_fsdp(model: nn.Module, optimizer: Any, folder: Path, whole: bool) -> None:
    """Weights and optimizer of FSDP2, as accelerate's `save_fsdp_model` and `save_fsdp_optimizer`
    write them; all must call.

    Args:
        whole: as FULL_STATE_DICT, gathered by the first process; else as SHARDED_STATE_DICT.
    """
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    weights = get_model_state_dict(model, options=options)
    if not whole:
        write_shards({"model": weights}, folder / f"{MODEL}_0")
        save_optimizer(model, optimizer, folder)
        return
    states = get_optimizer_state_dict(model, innermost(optimizer), options=options)
    for name, content in ((MODEL, weights), (OPTIMIZER, states)):
        if process_index() == 0:
            write(lambda held, group, to=folder / f"{name}.bin": torch.save(held, to), content)


def read_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """What `save_optimizer` or accelerate has written, each process its own shards as it cuts them
    now; all must call.

    Raises:
        OSError: a file is missing or damaged.
    """
    shards = optimizer_shards(model, optimizer)
    said_by_all(lambda: dcp.load(shards, checkpoint_id=optimizer_folder(folder)))
    return shards[OPTIMIZER]
