"""Batches that several processes divide (context parallelism).

accelerate gives the processes of a `cp` dimension the same rows. A packed row consists of groups,
a prompt with its completions, that never look at each other: so each process packs the groups that
fall to it, as many tokens as the others as nearly as may be. Where a group is longer than a
process's share, all processes hold a piece of it (`data.pieces`), and attention gathers its keys
and values (`model.cut_attention`); its loss is one process's, its owner's. The losses are weighted
by examples, so that the mean over the processes is the loss of the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from tralign_fast.data.packing import PreferenceCollator


def dividing_processes(accelerator: Accelerator) -> int:
    """How many processes divide a batch; 1: none."""
    return getattr(accelerator.parallelism_config, "cp_size", None) or 1


def check_division(accelerator: Accelerator, collator: Any) -> None:
    """Raises ValueError where processes cannot divide batches."""
    sizes: Any = accelerator.parallelism_config
    if (getattr(sizes, "sp_size", None) or 1) > 1:
        raise ValueError(
            f"sp_size={sizes.sp_size}: DeepSpeed's sequence parallelism cuts rows at any token, "
            "and knows no shared prompts; use cp_size"
        )
    if dividing_processes(accelerator) == 1:
        return
    if sizes.tp_size > 1:
        raise ValueError(
            f"cp_size={sizes.cp_size} beside tp_size={sizes.tp_size} is not supported: nobody "
            "averages gradients over it where transformers has cut the model up; use fsdp_size "
            "instead of cp_size"
        )
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise ValueError(
            f"cp_size={sizes.cp_size} beside DeepSpeed is not supported: accelerate gives its "
            "processes other rows each; use FSDP2"
        )
    if not isinstance(collator, PreferenceCollator):
        raise ValueError(
            f"cp_size={sizes.cp_size}: batches are divided by PreferenceCollator, got a "
            f"data_collator of {type(collator).__name__}: leave it out, or cp_size"
        )


@contextlib.contextmanager
def dividing(trainer: Any) -> Iterator[None]:
    """Inside, a dataloader that the trainer makes packs this process's part of each batch."""
    accelerator, own = trainer.accelerator, trainer.data_collator
    count = dividing_processes(accelerator)
    if count > 1:
        mesh = accelerator.torch_device_mesh["cp"]
        why = _why_whole(trainer, own)
        trainer.data_collator = dataclasses.replace(
            own,
            division=(mesh.get_local_rank(), count),
            cut_over=mesh.get_group().group_name if why is None else None,
            whole_because=why or "",
        )
    try:
        yield
    finally:
        trainer.data_collator = own


def _why_whole(trainer: Any, collator: PreferenceCollator) -> str | None:
    """Why no group can be cut, as a clause that says what to do; None: they can."""
    if collator.layout == "padded":
        return (
            "padded rows cannot be cut; leave packing on, with a model whose attention runs packed "
            "rows, or take max_length down"
        )
    if trainer.aux_loss_enabled:
        return (
            "the load-balancing loss of a mixture of experts is made of whole groups; set "
            "router_aux_loss_coef=0, or take max_length down"
        )
    return None
