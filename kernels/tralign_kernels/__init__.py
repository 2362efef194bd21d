"""Triton kernels of tralign-fast and their launchers. Imports torch and triton, nothing else."""

from .ema import ema_reference, ema_update_
from .linear_logprob import linear_logprob_forward_, linear_logprob_reference
from .logprob import logprob_backward_, logprob_forward_, logprob_reference
from .lora_merge import lora_merge_, lora_merge_reference
from .preference import Preference, preference_forward, preference_reference

__all__ = [
    "Preference",
    "ema_reference",
    "ema_update_",
    "linear_logprob_forward_",
    "linear_logprob_reference",
    "logprob_backward_",
    "logprob_forward_",
    "logprob_reference",
    "lora_merge_",
    "lora_merge_reference",
    "preference_forward",
    "preference_reference",
]
