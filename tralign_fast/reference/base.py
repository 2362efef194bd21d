"""What a trainer asks of a reference policy, wherever its weights live."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch
from tralign_fast.reference.shard_files import load_tensors, save_tensors
from tralign_fast.reference.sharding import named_parameters, process_index
from tralign_fast.reference.trust_region import TrustRegion

_STATE_FILE = "reference.json"


class ReferenceOptions(Protocol):
    """What a reference reads of a run's `TRConfig`."""

    @property
    def trust_region(self) -> TrustRegion: ...
    @property
    def ema_rounding(self) -> str: ...
    @property
    def adapter_tolerance(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def bf16(self) -> bool | None: ...
    @property
    def fp16(self) -> bool: ...
    @property
    def tf32(self) -> bool | None: ...


class ReferencePolicy(ABC):
    """A policy that follows another one by a `TrustRegion`.

    To add a place where a reference can live: one file with a subclass, one entry in `REFERENCES`
    (`places.py`). Its traits, the attributes below, say what the trainer and `plan` ask of a place.

    Args:
        policy: the model that is trained (unwrapped; its parameters are read at every sync).
        schedule: when and how far the reference moves.
    """

    name: ClassVar[str]  # the key in `REFERENCES`
    # `build` gets a model of its own as `start`, prepared and distributed as the policy is
    needs_second_model: ClassVar[bool] = False
    # the same where another model than the policy is the first reference, else `start` is None
    runs_start: ClassVar[bool] = False
    # what may shard the weights that it moves: of "FSDP2", "ZeRO-3" and "tensor parallelism"
    can_be_sharded: ClassVar[frozenset[str]] = frozenset({"FSDP2", "ZeRO-3", "tensor parallelism"})
    # it holds no weights and is the policy as it stands: whoever replaces that asks it first
    is_policy = False

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        self.policy = policy
        self.schedule = schedule
        self.run: dict[str, Any] = {}  # what else of the run a checkpoint must agree with
        self.folder: Path | None = None  # the run's, while it trains
        self._asked_every = schedule.every  # a share of the run, perhaps
        self._saved_steps: float | None = None  # τ of the checkpoint that was read

    @property
    def grows(self) -> bool:
        """Whether the next update adds to what it holds: past weights that are not negligible."""
        return False

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        """Whether the first reference is the policy as it is, and no other model.

        Args:
            lora: the policy trains a PEFT adapter.
        """
        return False

    @property
    def on_device(self) -> bool:
        """Whether weights of its own, if it holds any, lie on the device between two steps."""
        return self.needs_second_model

    @classmethod
    def build(
        cls, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
    ) -> ReferencePolicy:
        """The reference of a run.

        Args:
            policy: as above.
            start: the first reference, a model of its own; None: the policy as it is.
            args: the run's `TRConfig`.
        """
        return cls(policy, args.trust_region)

    @abstractmethod
    def logps(self, batch: PackedBatch) -> Tensor:
        """(S,) float32 log-probs of the batch's sequences under the reference, no gradient."""

    @abstractmethod
    def sync(self) -> None:
        """Moves the reference towards the policy as it is now: `π_ref ← α·π_θ + (1-α)·π_ref`."""

    def as_model(self) -> Any:
        """A model that has the reference's weights, to be looked at; None where there are no whole
        ones."""
        return None

    def must_score(self, step: int) -> bool:
        """Whether a window has to be scored (`WindowedReference`) before the step after `step`."""
        return False

    def is_scored_ahead(self, step: int) -> bool:
        """Whether only what a window has scored before `step` can be scored after it."""
        return False

    def restart(self, unmoved: bool = False) -> None:  # noqa: B027
        """A training starts from step 0, maybe not the first one: the reference stays as it is.

        Args:
            unmoved: the policy has made no step since the last update.
        """

    @abstractmethod
    def save_weights(self, folder: Path) -> None: ...

    @abstractmethod
    def load_weights(self, folder: Path) -> None: ...

    def save(self, folder: Path) -> None:
        """Writes the reference into a checkpoint folder; every process calls it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        if process_index() == 0:
            state = {**self._identity(), "steps": self.schedule.every}
            (folder / _STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Reads the reference of a checkpoint.

        Raises:
            ValueError: the checkpoint holds no reference or a part of one, or one of another kind,
                schedule or run.
        """
        try:
            saved = json.loads((folder / _STATE_FILE).read_text())
            self._saved_steps = saved.pop("steps", None)
            differs = [k for k, v in self._identity().items() if saved.get(k) != v]
            if not differs:
                self.load_weights(folder)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
            raise ValueError(
                f"{folder.parent} holds no whole reference policy ({_first_line(error)}): it was "
                "cut short or written by another trainer; resume from another checkpoint"
            ) from error
        if differs:
            was, now = ({k: d.get(k) for k in differs} for d in (saved, self._identity()))
            raise ValueError(
                f"{folder.parent} was trained with reference {was}, this run has {now}: resume "
                "with the options and the data it was started with"
            )

    def settle(self, max_steps: int) -> None:
        """Makes steps of a schedule that is a share of the run, whose length is known here.

        Raises:
            ValueError: a run that is resumed had other steps.
        """
        schedule = self.schedule.of_run(max_steps)
        if self._saved_steps not in (None, schedule.every):
            raise ValueError(
                f"the checkpoint's reference moved every {self._saved_steps} steps, this run of "
                f"{max_steps} steps moves it every {schedule.every}: resume with the max_steps it "
                "was started with, or ref_model_sync_steps in steps"
            )
        self.schedule = schedule

    def _identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "alpha": self.schedule.alpha,
            "every": self._asked_every,
            **self.run,
        }

    def _save_tensors(self, folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
        """Shards of this process, or what all processes hold alike."""
        save_tensors(folder / name, tensors, self._cut_alike())

    def _load_tensors(self, folder: Path, name: str) -> dict[str, Tensor]:
        return load_tensors(folder / name, self._cut_alike())

    def _cut_alike(self) -> dict[str, nn.Parameter]:
        """By name, the parameters of which this process's tensors are shards."""
        return named_parameters(self.policy)


def save_generator(generator: torch.Generator, folder: Path) -> None:
    """All processes draw alike: replicas round alike."""
    if process_index() == 0:
        torch.save(generator.get_state(), folder / "rounding_rng.pt")


def load_generator(generator: torch.Generator, folder: Path) -> None:
    generator.set_state(torch.load(folder / "rounding_rng.pt", weights_only=True))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
