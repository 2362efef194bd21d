"""The moving reference: its schedule, and one file for each place where its weights can live."""

from tralign_fast.reference.trust_region import TrustRegion

# name -> "module:class", imported when asked for: the schedule alone needs no transformers
REFERENCES = {
    "resident": "tralign_fast.reference.resident:ResidentReference",
    "snapshot": "tralign_fast.reference.snapshot:SnapshotReference",
    "offloaded": "tralign_fast.reference.offloaded:OffloadedReference",
    "adapter": "tralign_fast.reference.adapter:AdapterReference",
}


def cheapest_reference(
    schedule: TrustRegion, *, own_start: bool, lora: bool = False
) -> tuple[str, str]:
    """(name, reason): the place that costs least and is exact for a schedule.

    `own_start`: the first reference is another model than the policy; `lora`: the policy trains a
    PEFT adapter.
    """
    if (schedule.is_frozen or schedule.alpha == 1.0) and not own_start:
        return "snapshot", "the policy itself is the reference when a window begins"
    if lora and own_start:
        return "resident", "ref_model has a base of its own beside that of the policy's adapter"
    if lora:
        return "adapter", "soft updates mix weights, not factors: past adapters on a shared base"
    if schedule.is_frozen or schedule.every > 1:
        return (
            "offloaded",
            "the reference stands still between updates: its weights stay on the host",
        )
    return "resident", "the reference moves at every step: it has to run at every step"


__all__ = ["REFERENCES", "TrustRegion", "cheapest_reference"]
