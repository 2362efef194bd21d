"""What a run that goes on may change, and what it says.

A checkpoint keeps the options of the run that wrote it. Of those that differ on a resume:

| what                                                                    | becomes of it     |
|-------------------------------------------------------------------------|-------------------|
| the objective: losses, their weights and options, length normalisation, | refused           |
| divergence, dropout, length limit, auxiliary losses                     |                   |
| the reference: place, α, τ, rounding, adapter tolerance                 | refused           |
| the data and its order: rows, seeds, order, pairs of a step, dropped    | refused           |
| last batches                                                            |                   |
| how a step is dealt out: processes, their batches, accumulation, FSDP2  | taken over, one   |
| (`distributed/resized.py`)                                              | line              |
| the state: model (names, shapes, frozen weights), dtypes, bf16, fp16,   | refused           |
| optimizer and its options                                               |                   |
| token budget beside a windowed reference (its scores are of the parts)  | refused           |
| learning rate, schedule, warm-up, length of the run, weight decay, β₁,  | taken over, one   |
| β₂, ε, clipping, vocabulary filter, token budget else                   | line each         |
| logging, evaluation, saving, loaders, packing, kernels, compiling,      | free              |
| checkpointing of activations, gradient release                          |                   |

Free is what changes no number but by rounding. A refused one is changed by starting a new run from
the checkpoint's weights: `model="…/checkpoint-100"` without `resume_from_checkpoint`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tralign_fast.distributed.resized import SHARES, check_shares
from tralign_fast.ops.ema import is_quantised, local_shard

# `TRConfig`'s names; those that a version does not have are left out
REFUSED = (
    "loss_type", "loss_weights", "loss_options", "beta", "label_smoothing", "discopop_tau",
    "desirable_weight", "undesirable_weight", "length_normalized", "f_divergence_type",
    "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "router_aux_loss_coef",
    "disable_dropout", "neftune_noise_alpha", "max_length",
    "truncation_mode",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "ema_rounding",
    "adapter_tolerance",
    "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
    "bf16", "fp16", "optim", "optim_args",
)  # fmt: skip
TAKEN_OVER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
    "max_steps", "num_train_epochs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "vocab_filter", "token_budget",
)  # fmt: skip
_WINDOWED = ("snapshot", "offloaded")


def recorded_options(args: Any, reference: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps: options, the reference's place, and `facts` of model and data."""
    names = (*REFUSED, *TAKEN_OVER, *SHARES[:3])
    options = {n: _plain(getattr(args, n)) for n in names if hasattr(args, n)}
    return {**options, "reference": reference, **facts}


def check_options(saved: dict[str, Any], present: dict[str, Any], checkpoint: str) -> None:
    """Compares a checkpoint's options with the run's; one line for each that changes.

    Raises:
        ValueError: one differs that a resume cannot change.
    """
    refused, line = check_shares(saved, present)
    differs = [n for n in saved if n in present and n not in SHARES and saved[n] != present[n]]
    windowed = present["reference"] in _WINDOWED
    taken = [n for n in differs if n in TAKEN_OVER and not (n == "token_budget" and windowed)]
    refused += [f"{n}: {saved[n]!r} there, {present[n]!r} here" for n in differs if n not in taken]
    if refused:
        changes = ", ".join(refused)
        raise ValueError(
            f"{checkpoint} was written by a run of other options ({changes}): resume with those "
            "that it was started with, or start a new run from its weights (model="
            f"{checkpoint!r} without resume_from_checkpoint)"
        )
    if line is not None:
        warnings.warn(f"a step of {checkpoint} is dealt out anew: {line}", stacklevel=3)
    for name in taken:
        warnings.warn(
            f"resumed with another {name}: {saved[name]!r} in {checkpoint}, from here on "
            f"{present[name]!r}",
            stacklevel=3,
        )


def place_in_stream(epoch: float, max_steps: int) -> tuple[int, int]:
    """(whole epochs, steps in the running one) of a checkpoint of a streamed dataset.

    Nobody knows its length: transformers counts `max_steps` of the run as an epoch in the state,
    and begins another one whenever the stream does.
    """
    whole = int(epoch)
    return whole, round((epoch - whole) * max_steps)


def keep_own_intervals(args: Any, state: Any, reference: Any) -> None:
    """Logs, evaluations and checkpoints come as often as this run asks, not as the one that wrote
    the checkpoint, whose state transformers takes over; but evaluations inside a window come where
    it has scored them."""
    scored = state.eval_steps
    state.compute_steps(args, state.max_steps)
    if state.eval_steps == scored or not reference.is_scored_ahead(state.global_step):
        return
    if args.eval_strategy == "steps":
        warnings.warn(
            f"eval_steps={state.eval_steps}: up to step {reference.scored_until} the reference has "
            f"scored the evaluations of a run with {scored}, and until then this run has those",
            stacklevel=3,
        )
    state.eval_steps = scored


def model_facts(model: nn.Module) -> dict[str, Any]:
    """By which a model is known again: names, shapes and dtypes of its parameters, and the first
    numbers of those that are frozen and not quantised."""
    shapes, frozen, dtypes = xxhash.xxh3_64(), xxhash.xxh3_64(), set()
    trained = 0
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        shapes.update(f"{name} {shape} {parameter.requires_grad}\n".encode())
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        if parameter.requires_grad:
            trained += 1
        elif _has_numbers(parameter):
            first = local_shard(parameter).flatten()[:16].to("cpu", torch.float32)
            frozen.update(first.numpy().tobytes())
    return {
        "model": f"{trained} trained tensors, {shapes.hexdigest()}",
        "frozen weights": frozen.hexdigest(),
        "dtype": sorted(dtypes),
    }


def _has_numbers(parameter: Tensor) -> bool:
    """Not those on meta, nor the fake ones of a memory trace, nor quantised ones."""
    is_real = parameter.device.type != "meta" and not isinstance(parameter, FakeTensor)
    return is_real and not is_quantised(parameter)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    value = getattr(value, "value", value)
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)
