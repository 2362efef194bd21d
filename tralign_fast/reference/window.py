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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tralign_fast.data.packing import PackedBatch, can_be_merged, merge_packed
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.score_cache import Scores
from tralign_fast.reference.sharding import (
    from_main,
    own_file,
    process_count,
    process_index,
    reshard,
)
from tralign_fast.reference.trust_region import TrustRegion

_FILE = "window.safetensors"


class WindowedReference(ReferencePolicy):
    """Scores of a window; a subclass says where the reference's weights are while it is scored."""

    desc: ClassVar[str] = "reference window"  # of the progress bar
    make_bar: Callable[..., Any] = tqdm  # a command line has a bar of its own

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        super().__init__(policy, schedule)
        self._scores: dict[int, Tensor] = {}  # fingerprint -> (S,) float32 on the host
        self._keys: dict[int, tuple[int, ...]] = {}  # fingerprint -> (S,) of its sequences
        # of the window of a checkpoint: its batches may have been others
        self._sequences = Scores()
        self._launched: set[int] = set()  # fingerprints of what is being scored
        self.wrapped: nn.Module | None = None
        self._is_evaluating = False
        self.needs_window = True  # true from an update until the next window is scored
        self.scored_until = 0  # the step up to which steps are scored

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
        self._forget()
        self.needs_window = True

    def must_score(self, step: int) -> bool:
        """Whether a window has to be scored before the step after `step`: a new one, or the rest of
        one that ended with a run that goes on."""
        return self.needs_window or step >= self.scored_until

    def is_scored_ahead(self, step: int) -> bool:
        return step < self.scored_until and not self.can_score_now()

    def restart(self, unmoved: bool = False) -> None:
        self._forget()
        self.scored_until = 0

    def _forget(self) -> None:
        self._scores, self._keys, self._sequences = {}, {}, Scores()

    def keep_weights(self) -> None:
        """Called before a window that the end of the run cuts short, while `weights` are at hand:
        who holds none keeps what going on would need."""

    def score_window(
        self,
        batches: Iterable[Sequence[PackedBatch]],
        total: int | None,
        *,
        merge: int = 1,
        by_tokens: bool = False,
    ) -> None:
        """Scores what the steps until the next update will see. Called before the first of them.

        Args:
            batches: the parts of every batch; as many on every process.
            total: how many batches that is, for the progress bar; None: no bar.
            merge: batches that run as one packed row; without a gradient nothing is kept of them.
            by_tokens: as many batches as have the tokens of `merge` times the largest so far, so
                that short rows, which wait for launches, are more of them. One process only:
                several must run the model equally often.
        """
        by_tokens = by_tokens and process_count() == 1
        self._launched = set()  # an earlier window may have failed in its midst
        with (
            self.weights(),
            self._evaluating(),
            self.make_bar(desc=self.desc, total=total, leave=False, disable=total is None) as bar,
        ):
            keep: Callable[[], None] | None = None
            for group in _groups(batches, merge, by_tokens):
                keep, earlier = self._score(group), keep
                if earlier is not None:  # a GPU computes while the next batches are collated
                    earlier()
                bar.update(len(group))
            if keep is not None:
                keep()
            reshard(self.scorer)
        self.needs_window = False

    def _score(self, batches: Sequence[Sequence[PackedBatch]]) -> Callable[[], None]:
        """Launches what is not known of some batches; what it returns waits and keeps it."""
        parts = self._unknown([part for batch in batches for part in batch])
        # the parts of a split batch stay apart: a row has no more tokens than a budget
        whole = all(len(batch) == 1 for batch in batches)
        mergeable = whole and len(parts) > 1 and all(can_be_merged(part) for part in parts)
        self._launched |= {part.fingerprint for part in parts}
        groups = [parts] if mergeable else [[part] for part in parts]
        scored = [
            (group, self._run(group[0] if len(group) == 1 else merge_packed(group)))
            for group in groups
        ]

        def keep() -> None:
            for group, logps in scored:
                sizes = [len(part.scored_lengths) for part in group]
                for part, own in zip(group, logps.cpu().split(sizes), strict=True):
                    self._keep(part, own)
                    self._launched.discard(part.fingerprint)

        return keep

    def _unknown(self, parts: list[PackedBatch]) -> list[PackedBatch]:
        if process_count() > 1:  # all must run the model equally often
            return parts
        return [
            part
            for part in parts
            if part.fingerprint not in self._scores and part.fingerprint not in self._launched
        ]

    def _keep(self, part: PackedBatch, logps: Tensor) -> None:
        self._scores[part.fingerprint] = logps.clone()
        self._keys[part.fingerprint] = part.keys

    def logps(self, batch: PackedBatch) -> Tensor:
        known = self._scores.get(batch.fingerprint)
        if known is None:
            known = self._of_sequences(batch)
        if known is not None:
            return known.to(batch.input_ids.device)
        if not self.can_score_now():
            raise ValueError(
                f"reference={self.name!r}: the batch of rows {few(batch.rows)} was not scored "
                "when its window began (other data, or another order, than the window saw), and "
                "the policy has moved since; pass it as eval_dataset, evaluate right after an "
                'update, or use reference="resident"'
            )
        with self.weights():
            return self._run(batch)

    @torch.no_grad()
    def _run(self, batch: PackedBatch) -> Tensor:
        model = self.scorer
        with self._evaluating():
            return sequence_logps(model, batch.to(next(model.parameters()).device))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the scorer is in evaluation mode; it is switched once for a whole window."""
        if self._is_evaluating:
            yield
            return
        model = self.scorer
        # an evaluation switches the policy's mode and not that of what wraps it (DDP)
        modes = {model: model.training, self.policy: self.policy.training}
        model.eval()
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False
            for module, training in modes.items():
                module.train(training)

    @property
    def scorer(self) -> nn.Module:
        """The model that sweeps run: the policy as the trainer wrapped it, once it has."""
        return self.wrapped or self.policy

    def _of_sequences(self, batch: PackedBatch) -> Tensor | None:
        """Log-probs of a batch whose sequences a resumed window scored in other batches."""
        if not len(self._sequences) or len(batch.keys) != len(batch.scored_lengths):
            return None
        values, known = self._sequences.find(batch.keys)
        return torch.from_numpy(values) if known.all() else None

    def save_weights(self, folder: Path) -> None:
        content = {str(k): v.contiguous() for k, v in self._scores.items()}
        content |= {f"{k}.keys": torch.tensor(keys) for k, keys in self._keys.items() if keys}
        if len(self._sequences):
            content["logps"] = torch.from_numpy(self._sequences.values)
            content["logps.keys"] = torch.from_numpy(self._sequences.keys)
        save_file(
            content,
            own_file(folder, _FILE),
            metadata={
                "needs_window": json.dumps(self.needs_window),
                "scored_until": json.dumps(self.scored_until),
            },
        )

    def load_weights(self, folder: Path) -> None:
        """Every process knows the sequences that any of them had scored: batches are dealt out
        anew to another number of processes."""
        self._forget()
        own = own_file(folder, _FILE)
        if own.exists():
            with safe_open(own, "pt") as file:
                names = [name for name in file.keys() if name.isdecimal()]  # noqa: SIM118
                self._scores = {int(name): file.get_tensor(name) for name in names}
                self._keys = {int(n): _keys_of(file, n) for n in names}
        found = from_main(_read(folder) if process_index() == 0 else None)
        self._sequences, self.needs_window, self.scored_until = found


def _read(folder: Path) -> tuple[Scores, bool, int]:
    """Of the files of all processes: the sequences' scores, and what they say of the window."""
    keys: list[int] = []
    logps: list[Tensor] = []
    metadata: dict[str, str] = {}
    for path in [*folder.glob(_FILE), *folder.glob(_FILE.replace(".", "-*-of-*."))]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118
                own = () if name.endswith(".keys") else _keys_of(file, name)
                if own:
                    keys += own
                    logps.append(file.get_tensor(name))
    scores = Scores()
    if keys:
        scores.add(keys, torch.cat(logps).numpy())
    return scores, json.loads(metadata["needs_window"]), json.loads(metadata["scored_until"])


def _keys_of(file: Any, name: str) -> tuple[int, ...]:
    key = f"{name}.keys"
    return tuple(file.get_tensor(key).tolist()) if key in file.keys() else ()  # noqa: SIM118


def _groups(
    batches: Iterable[Sequence[PackedBatch]], merge: int, by_tokens: bool
) -> Iterator[list[Sequence[PackedBatch]]]:
    group, held, largest = [], 0, 0
    for parts in batches:
        size = sum(part.num_tokens for part in parts) if by_tokens else 1
        largest = max(largest, size)
        if group and held + size > merge * largest:
            yield group
            group, held = [], 0
        group.append(parts)
        held += size
    if group:
        yield group


def few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
