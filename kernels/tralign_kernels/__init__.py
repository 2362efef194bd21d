"""Triton kernels of tralign-fast and their launchers. Imports torch and triton, nothing else."""

from .adafactor import AdafactorOptions, adafactor_step_, counters_of
from .adafactor_shards import AdafactorShard
from .adamw import AdamWOptions, adamw_step_
from .ema import ema_naive, ema_update_
from .linear_logprob import linear_logprob_forward_, linear_logprob_naive
from .linear_powers import linear_powers_, linear_powers_naive, scale_rows_
from .logprob import logprob_backward_, logprob_forward_, logprob_naive
from .lora_merge import lora_merge_, lora_merge_naive
from .optimizer_naive import adafactor_naive, adamw_naive
from .preference import preference_forward
from .preference_terms import Preference, PreferenceOptions, Term, preference_naive

__all__ = [
    "AdafactorOptions",
    "AdafactorShard",
    "AdamWOptions",
    "Preference",
    "PreferenceOptions",
    "Term",
    "adafactor_naive",
    "adafactor_step_",
    "adamw_naive",
    "adamw_step_",
    "counters_of",
    "ema_naive",
    "ema_update_",
    "linear_logprob_forward_",
    "linear_logprob_naive",
    "linear_powers_",
    "linear_powers_naive",
    "logprob_backward_",
    "logprob_forward_",
    "logprob_naive",
    "lora_merge_",
    "lora_merge_naive",
    "preference_forward",
    "preference_naive",
    "scale_rows_",
]
