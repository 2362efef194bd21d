"""No reference weights at all: right after a hard update the policy is the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from tralign_fast.reference.trust_region import TrustRegion
from tralign_fast.reference.window import WindowedReference


class SnapshotReference(WindowedReference):
    """Weights: none. Exact for hard updates (α = 1), and for a frozen reference that starts as the
    policy (the whole run is one window).

    Raises:
        ValueError: the schedule mixes weights (0 < α < 1), which takes a second set of them.
    """

    name = "snapshot"

    def __init__(self, policy: nn.Module, schedule: TrustRegion) -> None:
        if not schedule.is_frozen and schedule.alpha != 1.0:
            raise ValueError(
                f'reference="snapshot" needs ref_model_mixup_alpha=1 (hard updates), got '
                f'{schedule.alpha}; soft updates need reference="offloaded" or "resident"'
            )
        super().__init__(policy, schedule)

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        return True

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        yield

    @property
    def is_policy(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.needs_window  # no step since the update

    def can_score_now(self) -> bool:
        return self.is_policy

    def move(self) -> None:
        """Nothing moves: from here on the policy is the reference."""
