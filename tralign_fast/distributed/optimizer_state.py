"""Loading an optimizer's state as it was saved, and what a resumed run's new options do to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def restore_dtypes(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Gives loaded states the dtypes in which they were saved.

    `torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype: the fp32
    statistics of bf16 weights would lose 16 of their 24 bits.
    """
    optimizer = innermost(optimizer)
    saved = state_dict["state"]
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    pairs = (
        pair for now, then in groups for pair in zip(now["params"], then["params"], strict=True)
    )
    for parameter, index in pairs:
        own = optimizer.state.get(parameter, {})
        for name, value in saved.get(index, {}).items():
            loaded = own.get(name)
            cast = isinstance(loaded, torch.Tensor) and isinstance(value, torch.Tensor)
            if cast and loaded.dtype != value.dtype:
                own[name] = value.to(loaded.device, copy=True)


def load_exactly(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """The states of a checkpoint, and the options (weight decay, β, ε) of this run."""
    with kept_options(optimizer):
        optimizer.load_state_dict(state_dict)
        restore_dtypes(optimizer, state_dict)


@contextlib.contextmanager
def kept_options(optimizer: Any) -> Iterator[None]:
    """Inside, a state dict may be loaded; afterwards the options are those from before."""
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    yield
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update({k: v for k, v in option.items() if k not in ("lr", "step")})


def follow_schedule(optimizer: Any, scheduler: Any, base_lrs: list[float]) -> None:
    """Lets a loaded scheduler go on with this run's learning rates and schedule.

    Args:
        base_lrs: of the scheduler before its state was loaded.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if type(scheduler) is not LambdaLR:  # others compute a rate from the one before
        return
    scheduler.base_lrs = [*base_lrs]
    rates = zip(optimizer.param_groups, base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["initial_lr"] = base
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer that accelerate and gradient release wrap."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
