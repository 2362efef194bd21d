"""When and how far the reference policy moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tralign_fast.ops.backend import warn_once


@dataclass(frozen=True)
class TrustRegion:
    """The reference's schedule: `π_ref ← α·π_θ + (1-α)·π_ref` after every `every` optimizer steps.

    One schedule covers the methods of "Learn Your Reference Model for Real Good Alignment"
    (arXiv 2404.09656, section 3) and what TRL runs:

    | method | alpha | every |
    |---|---|---|
    | soft update | 0.6, say | 1 |
    | hard update | 1.0 | τ |
    | TRL's hybrid | 0.6 | 512 |
    | frozen (classical DPO, IPO, KTO) | 0 | or 0 |

    Args:
        alpha: α in [0, 1], the weight of the policy in the new reference.
        every: τ ≥ 0, optimizer steps between two updates; under 1 the share of a run that lies
            between two (`of_run` makes steps of it).

    Raises:
        ValueError: α or τ out of range.
    """

    alpha: float = 0.6
    every: float = 512

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        whole = math.isfinite(self.every) and self.every == int(self.every) and self.every >= 0
        if not (whole or 0 < self.every < 1):
            raise ValueError(
                "every must be a whole number of optimizer steps ≥ 0, or a share of the run in "
                f"(0, 1), got {self.every}"
            )

    @property
    def is_frozen(self) -> bool:
        return self.alpha == 0.0 or self.every == 0

    def of_run(self, max_steps: int) -> TrustRegion:
        """The schedule in whole steps of a run of `max_steps`; warns of one that moves nothing."""
        share = self.every if 0 < self.every < 1 else None
        region = self if share is None else replace(self, every=math.ceil(share * max_steps))
        if not region.is_frozen and region.every >= max_steps:
            warn_once(
                f"the reference never moves: the run has {max_steps} steps and every is "
                f"{region.every} (ref_model_sync_steps); set fewer, or a share of the run such as "
                "0.1"
            )
        return region

    def should_sync(self, step: int) -> bool:
        """Whether the reference moves after optimizer step `step` (counted from 1, as TRL does)."""
        assert not 0 < self.every < 1, "of_run makes steps of a share"
        return not self.is_frozen and step > 0 and step % self.every == 0
