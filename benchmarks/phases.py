"""What part of a step runs: the same seven for this trainer and for TRL's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.optim.optimizer as torch_optimizer

PHASES = (
    "batch", "reference", "forward", "loss", "backward", "optimizer", "bookkeeping",
)  # fmt: skip


class Phases:
    """The phase that runs, innermost; what lies in none of the marked ones is bookkeeping.

    Args:
        trainer: a `TRTrainer` or TRL's `DPOTrainer`, before it trains. Its methods are wrapped for
            good.
        on_change: called before the phase changes, with the one that ends.
    """

    def __init__(self, trainer: Any, on_change: Callable[[str], Any] = lambda ended: None) -> None:
        self._on_change = on_change
        self._stack = ["bookkeeping"]
        self._is_ours = hasattr(trainer, "reference")
        trainer.data_collator = self._wrapped(trainer.data_collator, "batch")
        self._mark(trainer, "get_batch_samples", "batch")
        self._mark(trainer, "compute_loss", "loss")
        self._mark_forwards(trainer.model, "forward")
        self._mark(trainer.accelerator, "backward", "backward")
        self._mark(trainer.accelerator, "clip_grad_norm_", "optimizer")
        self._mark(trainer.model, "zero_grad", "optimizer")
        if self._is_ours:
            self._mark(trainer._lookahead, "score_window", "reference")
            for method in ("logps", "sync", "must_score"):
                self._mark(trainer.reference, method, "reference")
            return
        if trainer.ref_model is not None:
            self._mark_forwards(trainer.ref_model, "reference")
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "SyncRefModelCallback":
                self._mark(callback, "on_step_end", "reference")

    @property
    def now(self) -> str:
        return self._stack[-1]

    def enter(self, name: str) -> None:
        self._on_change(self.now)
        # the reference's forwards are the reference's, whatever model runs them
        inside = name == "forward" and self.now == "reference"
        self._stack.append("reference" if inside else name)

    def leave(self) -> None:
        self._on_change(self.now)
        self._stack.pop()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What the trainer is to run in: steps of any optimizer are seen, also of those that
        gradient release calls inside the backward, and TRL's forwards of a PEFT reference."""
        before = torch_optimizer.register_optimizer_step_pre_hook(
            lambda *_: self.enter("optimizer")
        )
        after = torch_optimizer.register_optimizer_step_post_hook(lambda *_: self.leave())
        try:
            with contextlib.nullcontext() if self._is_ours else self._watching_adapters():
                yield
        finally:
            before.remove()
            after.remove()

    @contextlib.contextmanager
    def _watching_adapters(self) -> Iterator[None]:
        from trl.trainer import dpo_trainer

        own = dpo_trainer.use_adapter

        @contextlib.contextmanager
        def use_adapter(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.inside("reference"), own(*args, **kwargs) as model:
                yield model

        with mock.patch.object(dpo_trainer, "use_adapter", use_adapter):
            yield

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.inside(name):
                return function(*args, **kwargs)

        return wrapped

    def _mark(self, owner: Any, method: str, name: str) -> None:
        setattr(owner, method, self._wrapped(getattr(owner, method), name))

    def _mark_forwards(self, model: Any, name: str) -> None:
        model.register_forward_pre_hook(lambda *_: self.enter(name))
        model.register_forward_hook(lambda *_: self.leave())
