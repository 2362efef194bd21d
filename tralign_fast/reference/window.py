"""References that are run once for every window of steps, not at every step.

Between two updates the reference stands still. Right after an update it scores the batches of all
the steps until the next one in a no-grad sweep, and only the log-probs of sequences are kept: a
few bytes for each. Batches are known again by their contents (`PackedBatch.fingerprint`), so that
the same scores serve training, evaluation inside the window and a run resumed in mid-window.
"""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.modeling import sequence_logps
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.trust_region import TrustRegion


class WindowedReference(ReferencePolicy):
    """Scores of a window; a subclass says where the reference's weights are while it is scored."""

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        super().__init__(policy, schedule)
        self._scores: dict[int, Tensor] = {}  # fingerprint -> (S,) float32 on the host
        self.wrapped: nn.Module | None = None
        self.needs_window = True  # true from an update until the next window is scored

    @abstractmethod
    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy's modules hold the reference's weights."""

    @abstractmethod
    def can_score_now(self) -> bool:
        """Whether `weights` can be entered at this point of the run."""

    @abstractmethod
    def move(self) -> None:
        """The update of the weights, if any are held."""

    def sync(self) -> None:
        self.move()
        self._scores = {}
        self.needs_window = True

    def score_window(self, batches: Iterable[PackedBatch | SplitBatch], total: int | None) -> None:
        """Scores what the steps until the next update will see. Called before the first of them.

        `total`: how many batches that is, for the progress bar; None: no bar.
        """
        with self.weights():
            bar = tqdm(
                batches, "reference window", total, leave=False, disable=total is None, unit="batch"
            )
            for part in (part for batch in bar for part in batch.parts):
                if part.fingerprint not in self._scores:
                    self._scores[part.fingerprint] = self._run(part).cpu()
        self.needs_window = False

    def logps(self, batch: PackedBatch) -> Tensor:
        known = self._scores.get(batch.fingerprint)
        if known is not None:
            return known.to(batch.input_ids.device)
        if not self.can_score_now():
            raise ValueError(
                f"reference={self.name!r}: the batch of rows {_few(batch.rows)} was not scored "
                "when its window began (other data, or another order, than the window saw), and "
                "the policy has moved since; pass it as eval_dataset, evaluate right after an "
                'update, or use reference="resident"'
            )
        with self.weights():
            return self._run(batch)

    @torch.no_grad()
    def _run(self, batch: PackedBatch) -> Tensor:
        model = self.scorer
        was_training = model.training
        model.eval()
        try:
            return sequence_logps(model, batch.to(next(model.parameters()).device))
        finally:
            model.train(was_training)

    @property
    def scorer(self) -> nn.Module:
        """The model that sweeps run: the policy as the trainer wrapped it, once it has."""
        return self.wrapped or self.policy

    def save_weights(self, folder: Path) -> None:
        save_file(
            {str(k): v.contiguous() for k, v in self._scores.items()}, folder / "window.safetensors"
        )
        (folder / "window.json").write_text(json.dumps({"needs_window": self.needs_window}) + "\n")

    def load_weights(self, folder: Path) -> None:
        self._scores = {int(k): v for k, v in load_file(folder / "window.safetensors").items()}
        self.needs_window = json.loads((folder / "window.json").read_text())["needs_window"]


def _few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
