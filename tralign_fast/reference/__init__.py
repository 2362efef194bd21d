"""The moving reference: its schedule, and one file for each place where its weights can live."""

from tralign_fast.reference.trust_region import TrustRegion

# name -> "module:class", imported when asked for: the schedule alone needs no transformers
REFERENCES = {"resident": "tralign_fast.reference.resident:ResidentReference"}

__all__ = ["REFERENCES", "TrustRegion"]
