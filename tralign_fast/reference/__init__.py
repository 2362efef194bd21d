"""The moving reference: its schedule, and one file for each place where its weights can live."""

from tralign_fast.reference.places import (
    REFERENCES,
    build_reference,
    cheapest_reference,
    choose_reference,
    reference_class,
)
from tralign_fast.reference.trust_region import TrustRegion

__all__ = [
    "REFERENCES",
    "TrustRegion",
    "build_reference",
    "cheapest_reference",
    "choose_reference",
    "reference_class",
]
