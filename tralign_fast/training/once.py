"""What transformers' loop walks all modules for in every step, done once a run."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tralign_fast.model.patching import Patches

_TRAIN = (nn.Module.train, PreTrainedModel.train)


class OncePerRun:
    """Facts of a run's model that its steps do not change.

    A walk over the modules of an 8B model with adapters takes 25 to 30 ms of the host's time. What
    is changed between two steps counts, but for two things: parameters that are added to or taken
    from the model do not change `total_flos`, and a single module that was put into evaluation mode
    stays there until the whole model changes its mode (transformers' loop would put it back).
    Frozen and unfrozen parameters are seen: nothing here depends on them.
    """

    def __init__(self) -> None:
        self._parameters: int | None = None
        self._mode_was_set = False

    def restart(self) -> None:
        """A run begins, maybe with another model."""
        self._parameters = None
        self._mode_was_set = False

    def num_parameters(self, model: Any) -> int:
        """Of the model, without embeddings."""
        found = self._parameters
        if found is None:
            found = self._parameters = model.num_parameters(exclude_embeddings=True)
        return found

    @contextlib.contextmanager
    def training_mode(self, model: nn.Module, policy: nn.Module) -> Iterator[None]:
        """Inside, the first `model.train()` is left out if it was called in this run, and model and
        policy have been in training mode since.

        Args:
            model: the policy as it is wrapped, which is switched. One whose class has a `train` of
                its own (DDP, DeepSpeed) is always asked.
            policy: evaluations switch this one.
        """
        known = self._mode_was_set and model.training and policy.training
        self._mode_was_set = True
        if not known or type(model).train not in _TRAIN or "train" in vars(model):
            yield
            return

        def train(mode: bool = True) -> nn.Module:
            del model.__dict__["train"]
            return model if mode else model.train(mode)

        model.__dict__["train"] = train
        try:
            yield
        finally:
            model.__dict__.pop("train", None)


def quick_parameters(model: nn.Module) -> Callable[[], None]:
    """Makes `model.parameters()`, over which transformers' loop goes twice a step (norm of the
    gradients, `zero_grad`), a walk that makes no names; returns its undo.

    Nothing is kept: parameters come and go, and are frozen, as ever.
    """
    patches, kind = Patches(), type(model)
    walks = ("parameters", "named_parameters", "named_modules", "_named_members")
    if all(getattr(kind, name) is getattr(nn.Module, name) for name in walks):
        # bound: a deep copy of the model finds it bound to itself
        patches.attribute(model, "parameters", types.MethodType(_parameters, model))
    return patches.undo


def _parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """The parameters of a module and of those in it, each once, in torch's order."""
    seen: set[Any] = set()
    modules: list[Any] = [self]
    while modules:
        module = modules.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield parameter
        if recurse:
            modules += reversed(module._modules.values())
