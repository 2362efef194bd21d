"""When and how far the reference policy moves."""

from __future__ import annotations

from dataclasses import dataclass


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
        every: τ ≥ 0, optimizer steps between two updates.

    Raises:
        ValueError: α or τ out of range.
    """

    alpha: float = 1.0
    every: int = 512

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.every < 0 or self.every != int(self.every):
            raise ValueError(
                f"every must be a whole number of optimizer steps ≥ 0, got {self.every}"
            )

    @property
    def is_frozen(self) -> bool:
        return self.alpha == 0.0 or self.every == 0

    def should_sync(self, step: int) -> bool:
        """Whether the reference moves after optimizer step `step` (counted from 1, as TRL does)."""
        return not self.is_frozen and step > 0 and step % self.every == 0
