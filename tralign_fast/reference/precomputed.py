"""No reference at all while training: a frozen one has scored every row before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tralign_fast.data.packing import PackedBatch
from tralign_fast.reference.base import ReferenceOptions, ReferencePolicy
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.score_cache import ScoreCache, Scores, score_cache_of
from tralign_fast.reference.sharding import (
    any_process,
    from_all,
    from_main,
    process_count,
    process_index,
)
from tralign_fast.reference.trust_region import TrustRegion
from tralign_fast.reference.window import few


class PrecomputedReference(OffloadedReference):
    """Weights: none once the rows are scored. Exact for a frozen reference, of any architecture.

    A sequence is scored once, whatever batch or epoch it stands in: not at all if an earlier run
    with the same reference has left its log-prob on the disk (`score_cache.py`; a batch with one
    that is new runs as a whole). Processes share
    the rows out, and then all of them know all. A model of its own as reference is let go of after
    that. Of a PEFT policy the adapter that it starts with stays on the host, so that rows that come
    later can still be scored; of a policy that is trained whole nothing stays.

    Args:
        start: the reference, a model that is ready to run; None: the policy as it is.
        cache: where log-probs are found and left; None: nowhere.

    Raises:
        ValueError: the schedule moves the reference.
    """

    name = "precomputed"
    runs_start = True
    can_be_sharded = frozenset({"FSDP2", "ZeRO-3", "tensor parallelism"})
    desc = "reference log-probs"

    def __init__(
        self,
        policy: nn.Module,
        schedule: TrustRegion,
        start: nn.Module | None = None,
        *,
        cache: ScoreCache | None = None,
    ) -> None:
        if not schedule.is_frozen:
            raise ValueError(
                'reference="precomputed" stands still: set sync_ref_model=False, or leave '
                f"reference out (it moves every {schedule.every} steps)"
            )
        self._start = start
        self._has_adapter = start is None and next(trained_adapters(policy), None) is not None
        super().__init__(policy, schedule)
        if start is not None:
            start.eval()
            start.requires_grad_(False)
        self._cache = cache
        self._found = Scores() if cache is None else cache.read()  # of any rows; until a sweep ends
        self._fresh: dict[int, float] = {}  # of this process, in a sweep
        self._computed = False  # a sweep ran the model
        self._rows = Scores()  # of the run

    @classmethod
    def build(
        cls, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
    ) -> ReferencePolicy:
        precision = {"bf16": args.bf16, "fp16": args.fp16, "tf32": args.tf32}
        cache = score_cache_of(policy if start is None else start, **precision)
        return cls(policy, args.trust_region, start, cache=cache)

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        return False

    def mixed_parameters(self) -> dict[str, Tensor]:
        return super().mixed_parameters() if self._has_adapter else {}

    def _shard_host(self) -> None:
        if any(hasattr(p, "ds_tensor") for p in self.policy.parameters()):
            self._host = {}  # ZeRO-3's shards do not change places
        super()._shard_host()

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        if self.needs_window:  # a model of its own, or the policy before its first step
            yield
            return
        with super().weights():
            yield

    @property
    def scorer(self) -> nn.Module:
        return super().scorer if self._start is None else self._start

    def as_model(self) -> Any:
        """The reference's own model until the rows are scored; a policy that is trained whole is
        none as soon as it moves."""
        return self._start

    def can_score_now(self) -> bool:
        return self.needs_window or bool(self._host)

    def must_score(self, step: int) -> bool:
        return self.needs_window

    def restart(self, unmoved: bool = False) -> None:
        """Rows stay scored: the reference has not moved."""

    def score_window(
        self, batches: Iterable[Sequence[PackedBatch]], total: int | None, **options: Any
    ) -> None:
        """Scores what is not known of these batches; `finish` ends the last sweep."""
        super().score_window(batches, total, **options)
        self.needs_window = True

    def _unknown(self, parts: list[PackedBatch]) -> list[PackedBatch]:
        asked = [part for part in parts if not self._knows(part)]
        if process_count() > 1:  # all must run the model equally often
            asked = parts if any_process(bool(asked), self._device) else []
        self._computed |= bool(asked)
        return asked

    def _knows(self, part: PackedBatch) -> bool:
        """Whether all sequences are known; those that an earlier run has left are taken over."""
        assert len(part.keys) == len(part.scored_lengths), "a PreferenceCollator gives keys"
        new = [key for key in part.keys if key not in self._fresh]
        values, known = self._found.find(new)
        pairs = zip(new, values.tolist(), known.tolist(), strict=True)
        self._fresh.update((key, value) for key, value, is_known in pairs if is_known)
        return bool(known.all())

    def _keep(self, part: PackedBatch, logps: Tensor) -> None:
        for key, value in zip(part.keys, logps.tolist(), strict=True):
            self._fresh.setdefault(key, value)

    def finish(self) -> None:
        """Every process learns what the others have scored; the file on the disk does, too."""
        for keys, values in from_all((list(self._fresh), list(self._fresh.values()))):
            self._rows.add(keys, values)
        if self._cache is not None and self._computed:
            self._cache.write(self._rows)
        self._let_go()

    def _let_go(self) -> None:
        self._fresh, self._found, self._start = {}, Scores(), None
        self.needs_window = False

    def logps(self, batch: PackedBatch) -> Tensor:
        values, known = self._rows.find(batch.keys)
        complete = bool(known.all()) and len(known) == len(batch.scored_lengths)
        if process_count() > 1 and not self.policy.training:  # rows of an evaluation may be new
            complete = not any_process(not complete, self._device)
        if complete:
            return torch.from_numpy(values).to(batch.input_ids.device)
        if not self.can_score_now():
            raise ValueError(self._missing(batch))
        with self.weights():
            return self._run(batch)

    def _missing(self, batch: PackedBatch) -> str:
        rows = few(batch.rows)
        if self.policy.training:
            return (
                f"rows {rows} were not scored before the first step: they are not those that the "
                "run began with, or, of KTO in a random order, borrow other completions in epochs "
                "that it did not have then; set precompute_ref_log_probs=False"
            )
        return (
            "Cannot compute reference log-probs for a dataset passed to evaluate() after training "
            f"has started (rows {rows}): precompute_ref_log_probs=True keeps no reference model. "
            "Pass the dataset as eval_dataset when the trainer is made, or set "
            "precompute_ref_log_probs=False"
        )

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def save_weights(self, folder: Path) -> None:
        if process_index() == 0:
            self._rows.save(folder / "rows.safetensors")
        self._shard_host()
        if self._host:
            self._save_tensors(folder, "model.safetensors", self._host)

    def load_weights(self, folder: Path) -> None:
        path = folder / "rows.safetensors"
        self._rows = from_main(Scores.load(path) if process_index() == 0 else None)
        self._shard_host()
        saved = self._load_tensors(folder, "model.safetensors") if self._host else {}
        for name, host in self._host.items():
            host.copy_(saved[name])
        self._let_go()
