"""Fused kernels, reference policies and a trainer for preference alignment with a moving reference.

The ops need torch alone; transformers is imported when the trainer is asked for, and torch's
compiler, which any custom operator of Python code loads, with `linear_logprobs`. The trainer's
packages come with `pip install 'tralign-fast[train]'`.
"""

from typing import TYPE_CHECKING

from tralign_fast.extras import explained
from tralign_fast.ops.ema import ema_update_, lora_merge_
from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.preference import preference_loss
from tralign_fast.ops.sequence_losses import PreferenceLoss, dpo_loss, ipo_loss, kto_loss
from tralign_fast.reference import TrustRegion

if TYPE_CHECKING:
    from tralign_fast.ops.from_logits import logprobs_from_logits
    from tralign_fast.ops.linear_preference import linear_preference_loss
    from tralign_fast.ops.logprobs import linear_logprobs
    from tralign_fast.training.aliases import (
        TRDPOConfig,
        TRDPOTrainer,
        TRFrozenDPOConfig,
        TRFrozenKTOConfig,
        TRKTOConfig,
        TRKTOTrainer,
    )
    from tralign_fast.training.config import TRConfig
    from tralign_fast.training.trainer import TRTrainer

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "PreferenceLoss",
    "TRConfig",
    "TRDPOConfig",
    "TRDPOTrainer",
    "TRFrozenDPOConfig",
    "TRFrozenKTOConfig",
    "TRKTOConfig",
    "TRKTOTrainer",
    "TRTrainer",
    "TrustRegion",
    "dpo_loss",
    "ema_update_",
    "ipo_loss",
    "kto_loss",
    "linear_logprobs",
    "linear_preference_loss",
    "logprobs_from_logits",
    "lora_merge_",
    "preference_loss",
]

_LAZY = {
    "TRFrozenDPOConfig": "tralign_fast.training.aliases",
    "TRFrozenKTOConfig": "tralign_fast.training.aliases",
    "TRConfig": "tralign_fast.training.config",
    "TRDPOConfig": "tralign_fast.training.aliases",
    "TRDPOTrainer": "tralign_fast.training.aliases",
    "TRKTOConfig": "tralign_fast.training.aliases",
    "TRKTOTrainer": "tralign_fast.training.aliases",
    "TRTrainer": "tralign_fast.training.trainer",
    "linear_logprobs": "tralign_fast.ops.logprobs",
    "linear_preference_loss": "tralign_fast.ops.linear_preference",
    "logprobs_from_logits": "tralign_fast.ops.from_logits",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            raise explained(name, error) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
