"""Optimizer states of weights that processes share, by `torch.distributed.checkpoint`.

Names and layout are those of accelerate's SHARDED_STATE_DICT, so that a checkpoint of tensor
parallelism is one more writer of a form that every layout reads, whole or in shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tralign_fast.reference.shard_files import said_by_all
from tralign_fast.training.optimizer_state import innermost

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
    shards = optimizer_shards(model, optimizer)
    said_by_all(lambda: dcp.save(shards, checkpoint_id=optimizer_folder(folder)))


def read_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """What `save_optimizer` or accelerate has written, each process its own shards as it cuts them
    now; all must call.

    Raises:
        OSError: a file is missing or damaged.
    """
    shards = optimizer_shards(model, optimizer)
    said_by_all(lambda: dcp.load(shards, checkpoint_id=optimizer_folder(folder)))
    return shards[OPTIMIZER]
