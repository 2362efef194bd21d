"""Weights of a checkpoint whose names are not those of the model.

transformers writes mixtures of experts and models of several parts under the names, and in the
shapes, that their first checkpoints had; `from_pretrained` converts them back. Its trainer does
not: it passes over what it cannot match, with a warning, and those weights stay as they were.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def read_unmatched(model: nn.Module, folder: str, missing: Sequence[str]) -> bool:
    """Reads the weights that a trainer's plain loading has left out; whether there were any.

    Args:
        model: the policy, unwrapped and whole.
        folder: the checkpoint.
        missing: names of `model.state_dict()` that the checkpoint has not.

    Memory: the model once more on the host, as plain loading takes it, where weights were left out.

    Raises:
        ValueError: the checkpoint does not have them under other names either.
    """
    names = _left_out(model, missing)
    if not names:
        return False
    if isinstance(model, PreTrainedModel):
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        kind: Any = type(model)
        loaded, info = kind.from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=functools.reduce(torch.promote_types, dtypes),
            output_loading_info=True,
        )
        names &= _left_out(loaded, list(info["missing_keys"]))
        if not names:
            model.load_state_dict(loaded.state_dict())
            return True
    raise no_weights(model, folder, names)


def no_weights(model: nn.Module, folder: Any, names: Collection[str]) -> ValueError:
    return ValueError(
        f"{folder} has no weights for {len(names)} parameters of {type(model).__name__}, "
        f"{min(names)} among them; resume with the model that it was written from"
    )


def _left_out(model: Any, missing: Sequence[str]) -> set[str]:
    """Names of parameters and buffers that have no value; one value is enough for a tied weight."""
    absent = {*missing}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known = {id(tensor) for name, tensor in named if name not in absent}
    return {name for name, tensor in named if name in absent and id(tensor) not in known}
