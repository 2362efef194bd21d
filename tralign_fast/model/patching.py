"""How a forward is set on one module and taken back, and what lies inside a wrapped model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Sets `forward(own_forward, self, …)` on one instance; copies of it run their own weights."""
    before = module.__dict__.get("forward")  # set by whoever wrapped this instance, or None

    def as_it_is(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # bound by accelerate's hooks
        assert before is not None
        return before(*args, **kwargs)

    own_forward = getattr(module.forward, "__func__", as_it_is)

    # the original's signature stays: `generate` checks its arguments against it
    @functools.wraps(type(module).forward)
    def bound(self, *args, **kwargs):
        return forward(own_forward, self, *args, **kwargs)

    bound.tralign_before = before  # pyright: ignore[reportAttributeAccessIssue]
    module.forward = types.MethodType(bound, module)


def unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head_of(causal_lm: Any) -> Any:
    """The output embedding in use: PEFT keeps the one of `modules_to_save` beside the original."""
    head = causal_lm.get_output_embeddings()
    if not hasattr(head, "modules_to_save"):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module
