"""What a trainer asks of a reference policy, wherever its weights live."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch
from tralign_fast.reference.trust_region import TrustRegion

_STATE_FILE = "reference.json"


class ReferencePolicy(ABC):
    """A policy that follows another one by a `TrustRegion`.

    To add a place where a reference can live: one file with a subclass, one entry in
    `tralign_fast.reference.REFERENCES`.

    Args:
        policy: the model that is trained (unwrapped; its parameters are read at every sync).
        schedule: when and how far the reference moves.
    """

    name: str

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        self.policy = policy
        self.schedule = schedule

    @abstractmethod
    def logps(self, batch: PackedBatch) -> Tensor:
        """(S,) float32 log-probs of the batch's sequences under the reference, no gradient."""

    @abstractmethod
    def sync(self) -> None:
        """Moves the reference towards the policy as it is now: `π_ref ← α·π_θ + (1-α)·π_ref`."""

    @abstractmethod
    def save_weights(self, folder: Path) -> None: ...

    @abstractmethod
    def load_weights(self, folder: Path) -> None: ...

    def save(self, folder: Path) -> None:
        """Writes the reference into a checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        (folder / _STATE_FILE).write_text(json.dumps(self._identity(), indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Reads the reference of a checkpoint.

        Raises:
            ValueError: the checkpoint holds no reference, or one of another kind or schedule.
        """
        file = folder / _STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder.parent} holds no reference policy (expected {file.name} in "
                f"{folder.name}): it was cut short or written by another trainer; resume from "
                "another checkpoint"
            )
        saved = json.loads(file.read_text())
        if saved != self._identity():
            raise ValueError(
                f"{folder.parent} was trained with reference {saved}, this run has "
                f"{self._identity()}: resume with the options it was started with"
            )
        self.load_weights(folder)

    def _identity(self) -> dict:
        return {"name": self.name, "alpha": self.schedule.alpha, "every": self.schedule.every}
