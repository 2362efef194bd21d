"""No reference weights at all: right after a hard update the policy is the reference."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tralign_fast.ops.backend import warn_once
from tralign_fast.ops.ema import local_shard
from tralign_fast.reference.sharding import named_parameters, process_count, process_index
from tralign_fast.reference.trust_region import TrustRegion
from tralign_fast.reference.window import WindowedReference

KEPT_FOLDER = "reference-window"
_KEPT_FILE = "window-start.safetensors"


class SnapshotReference(WindowedReference):
    """Weights: none. Exact for hard updates (α = 1), and for a frozen reference that starts as the
    policy (the whole run is one window).

    A window that the end of the run cuts short leaves the trained weights that it began with in the
    run's folder, once, and in its checkpoints as hard links: by the time that a run goes on, with
    more steps or in a second `train`, the policy has moved on from them.

    Raises:
        ValueError: the schedule mixes weights (0 < α < 1), which takes a second set of them.
    """

    name = "snapshot"

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        self.check_schedule(schedule)
        super().__init__(policy, schedule)
        self._kept: Path | None = None  # the folder with the weights that the window began with
        self._inside = False

    @staticmethod
    def check_schedule(schedule: TrustRegion) -> None:
        """Raises ValueError for one that mixes weights; a config asks before a model is loaded."""
        if not schedule.is_frozen and schedule.alpha != 1.0:
            raise ValueError(
                f'reference="snapshot" needs ref_model_mixup_alpha=1 (hard updates), got '
                f'{schedule.alpha}; soft updates need reference="offloaded" or "resident"'
            )

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        return True

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        if self._inside:  # a sweep inside a visit: they are there already
            yield
            return
        held = {} if self.needs_window else self._put(self._load_kept())
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._put(held)

    def _load_kept(self) -> dict[str, Tensor]:
        if self._kept is None:
            raise ValueError(
                f"reference={self.name!r}: the policy has moved since the reference's last update, "
                "and nothing of that time is kept: go on with resume_from_checkpoint"
            )
        return self._load_tensors(self._kept, _KEPT_FILE)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gives the policy these weights; its own, on the host."""
        held: dict[str, Tensor] = {}
        if not tensors:  # nothing to walk the model for
            return held
        parameters = named_parameters(self.policy)
        for name, tensor in tensors.items():
            own = local_shard(parameters[name])
            held[name] = own.to("cpu", copy=True)
            own.copy_(tensor)
        torch.clear_autocast_cache()  # it knows a parameter by its address, not by its values
        return held

    @property
    def is_policy(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.needs_window  # no step since the update

    def restart(self, unmoved: bool = False) -> None:
        super().restart()
        self.needs_window |= unmoved  # a window of a training that failed in its first step

    def can_score_now(self) -> bool:
        return self.is_policy or self._inside

    def move(self) -> None:
        """Nothing moves: from here on the policy is the reference."""
        if self._kept is not None:
            _barrier()
            if process_index() == 0:
                shutil.rmtree(self._kept, ignore_errors=True)
            self._kept = None

    def keep_weights(self) -> None:
        if self.folder is None:
            return
        folder = self.folder / KEPT_FOLDER
        trained = {n: p for n, p in named_parameters(self.policy).items() if p.requires_grad}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if process_index() == 0:  # checkpoints of an earlier run may hold the same files
                for file in _kept_files(folder):
                    file.unlink()
            _barrier()
            self._save_tensors(folder, _KEPT_FILE, {n: p.detach() for n, p in trained.items()})
            self._kept = folder
        except (OSError, SafetensorError) as error:
            warn_once(
                f"{folder} cannot be written ({str(error).splitlines()[0]}): this run can be "
                "resumed, but not go on with more steps than it has"
            )
        _barrier()

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        if self._kept is not None:
            _link_kept(self._kept, folder)

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        self._kept = None
        if not _kept_files(folder):
            return
        assert self.folder is not None
        self._kept = self.folder / KEPT_FOLDER  # the checkpoint will be deleted
        _link_kept(folder, self._kept)
        _barrier()


def _kept_files(folder: Path) -> list[Path]:
    """Of all processes."""
    stem = _KEPT_FILE.split(".")[0]
    found = [file for path in folder.glob(f"{stem}*") for file in (path, *path.rglob("*"))]
    return [file for file in found if file.is_file()]


def _link_kept(source: Path, target: Path) -> None:
    """The first process links the files of all, which have been written."""
    if process_index() != 0:
        return
    for file in _kept_files(target):
        file.unlink()
    for file in _kept_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(file, place)


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name; a copy where the disk knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _barrier() -> None:
    if process_count() > 1:
        torch.distributed.barrier()
