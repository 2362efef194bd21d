"""Where a reference can live, and which of the places a run takes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tralign_fast.reference.trust_region import TrustRegion

if TYPE_CHECKING:
    from torch import nn

    from tralign_fast.reference.base import ReferenceOptions, ReferencePolicy

# name -> "module:class", imported when built: the schedule alone needs no transformers
REFERENCES = {
    "resident": "tralign_fast.reference.resident:ResidentReference",
    "snapshot": "tralign_fast.reference.snapshot:SnapshotReference",
    "offloaded": "tralign_fast.reference.offloaded:OffloadedReference",
    "adapter": "tralign_fast.reference.adapter:AdapterReference",
    "precomputed": "tralign_fast.reference.precomputed:PrecomputedReference",
}


def choose_reference(
    asked: str, schedule: TrustRegion, *, own_start: bool, lora: bool, precompute: bool = False
) -> tuple[str, str]:
    """(name, reason): the place that was asked for, or for "auto" the cheapest one.

    Args:
        asked: a name of `REFERENCES`, or "auto".
        own_start: the first reference is another model than the policy.
        lora: the policy trains a PEFT adapter.
        precompute: score as far ahead as the schedule allows; of a frozen reference all rows.

    Raises:
        ValueError: a place that starts from the policy is to start from another model, or one that
            holds a frozen reference whose scores are to be computed once.
    """
    if precompute and schedule.is_frozen:
        if asked not in ("auto", "precomputed"):
            raise ValueError(
                "precompute_ref_log_probs=True scores all rows before the first step and holds no "
                f'reference: leave reference out, got reference="{asked}"'
            )
        return "precomputed", "frozen: every row is scored once, before the first step"
    if asked == "auto":
        name, why = cheapest_reference(schedule, own_start=own_start, lora=lora)
        if precompute and name == "resident":
            why += "; precompute_ref_log_probs has nothing to compute ahead"
        return name, why
    if own_start and reference_class(asked).starts_from_policy(lora):
        others = [n for n in REFERENCES if not reference_class(n).starts_from_policy(lora)]
        raise ValueError(
            f'reference="{asked}" starts from the policy: leave ref_model out, or use '
            f"reference={' or '.join(map(repr, sorted(others)))}"
        )
    return asked, "as asked for"


def cheapest_reference(
    schedule: TrustRegion, *, own_start: bool, lora: bool = False
) -> tuple[str, str]:
    """(name, reason): the place that costs least and is exact for a schedule."""
    if (schedule.is_frozen or schedule.alpha == 1.0) and not own_start:
        return "snapshot", "the policy itself is the reference when a window begins"
    if lora and own_start:
        return "resident", "ref_model has a base of its own beside that of the policy's adapter"
    if lora:
        return "adapter", "soft updates mix weights, not factors: past adapters on a shared base"
    if schedule.is_frozen or schedule.every != 1:
        return (
            "offloaded",
            "the reference stands still between updates: its weights stay on the host",
        )
    return "resident", "the reference moves at every step: it has to run at every step"


def reference_class(place: str) -> type[ReferencePolicy]:
    """The class of that place, whose traits say what it asks of a run."""
    module, name = REFERENCES[place].split(":")
    return getattr(import_module(module), name)


def build_reference(
    place: str, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
) -> ReferencePolicy:
    """The reference of that place, as `ReferencePolicy.build` of its class makes it."""
    return reference_class(place).build(policy, start, args)
