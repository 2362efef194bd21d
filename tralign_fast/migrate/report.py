"""What a migration gives: the new text, and what is said beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

FROZEN = (
    "sync_ref_model: True by default here; the reference stays frozen, as it was, by {how}; "
    "--moving lets it move"
)
MOVING = "sync_ref_model: the reference moves (α = 0.6 every 512 steps unless it says otherwise)"


@dataclass
class Migration:
    """The text of a file of this library, and one line for each thing to know of it."""

    text: str
    numbers: list[str] = field(default_factory=list)  # what is computed otherwise
    lost: list[str] = field(default_factory=list)  # what cannot be kept
    same: list[str] = field(default_factory=list)  # what one may ask of, and is as it was

    def changes(self, message: str, first: bool = False) -> None:
        if message not in self.numbers:
            self.numbers.insert(0 if first else len(self.numbers), message)

    def loses(self, message: str) -> None:
        if message not in self.lost:
            self.lost.append(message)
