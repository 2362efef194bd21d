"""Triton kernels of tralign-fast and their launchers. Imports torch and triton, nothing else."""

from tralign_kernels.ema import ema_reference, ema_update_
from tralign_kernels.linear_logprob import linear_logprob_forward_, linear_logprob_reference
from tralign_kernels.logprob import logprob_backward_, logprob_forward_, logprob_reference
from tralign_kernels.lora_merge import lora_merge_, lora_merge_reference
from tralign_kernels.preference import Preference, preference_forward, preference_reference

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
