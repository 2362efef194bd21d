"""A model made ready: log-probs from its forward, packed rows where it can, tried out first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.model.attention import enable_prefix_attention
from tralign_fast.model.cpu import speed_up_linears
from tralign_fast.model.last_mlp import leave_prompts_out_of_last_mlp
from tralign_fast.model.patching import causal_lm_of
from tralign_fast.model.scoring import enable_logprobs, sequence_logps
from tralign_fast.ops.backend import warn_once


def prepare_model(
    model: PreTrainedModel,
    *,
    packing: bool = True,
    logits_budget_mb: float = 1024,
    vocab_filter: float | None = None,
    backend: str = "auto",
    probe: bool = True,
) -> bool:
    """Makes `sequence_logps` work on `model`; returns whether it can run packed rows.

    Both are tried on twelve tokens: the log-probs must equal those of the model's own logits, and
    the hidden states of a packed row those of separate sequences. An attention that cannot do
    packed rows (a recurrent layer, sinks, position biases, …) is left alone with one warning, and
    the caller uses padded batches. Without `probe` nothing is tried, and `packing` is the answer.

    Raises:
        ValueError: the model's head is not `softcap(scale · (W h + b))`, or its 4-bit weights were
            repacked for inference.
    """
    _keep_4bit_differentiable(model)
    enable_logprobs(
        model, logits_budget_mb=logits_budget_mb, vocab_filter=vocab_filter, backend=backend
    )
    leave_prompts_out_of_last_mlp(model)
    speed_up_linears(model)
    if not probe or next(model.parameters()).device.type == "meta":
        if packing:
            enable_prefix_attention(causal_lm_of(model))
        return packing
    was_training = model.training
    model.eval()
    try:
        _check_head(model)
        return packing and _enable_packing(model)
    finally:
        model.train(was_training)


def compile_layers(model: PreTrainedModel, **options: Any) -> None:
    """Compiles the decoder layers in place, with `torch.compile(**options)`.

    Raises:
        ValueError: no layers were found.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        name = type(causal_lm_of(model)).__name__
        raise ValueError(f"torch_compile: found no decoder layers in {name}; leave it out")
    for layer in layers:
        layer.compile(**options)


def _keep_4bit_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU: its packed
    product has no backward, and whatever lies before it would silently be left untrained."""
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = module.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has repacked its 4-bit weight for inference, which has "
                    "no backward; load the model again and train it before anything is evaluated"
                )
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


# Two prompts with two completions each: a sharing error shows as an error of order one.
_PROBE = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [3, 1], "chosen_ids": [9], "rejected_ids": [2, 5]},
]


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    batch = _probe(model, "padded")
    ours = sequence_logps(model, batch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    own = logits.flatten(0, 1)[batch.score_index].float().log_softmax(-1)
    theirs = batch.sum_per_sequence(own.gather(1, batch.targets[:, None])[:, 0])
    if not _close(ours, theirs, model.dtype):
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__}: its logits are not softcap(scale · (W h + b)) "
            f"as far as its config tells (log-probs {theirs.tolist()}, expected {ours.tolist()})"
        )


@torch.no_grad()
def _enable_packing(model: PreTrainedModel) -> bool:
    # first: the attention that padded batches then run through is also the one compared with
    undo = enable_prefix_attention(causal_lm_of(model))
    separate = sequence_logps(model, _probe(model, "padded"))
    try:
        shared = sequence_logps(model, _probe(model, "shared"))
        reason = (
            None if _close(shared, separate, model.dtype) else "packed rows give other log-probs"
        )
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    if reason is None:
        return True
    undo()
    warn_once(
        f"{type(causal_lm_of(model)).__name__} cannot share prompts in a packed row ({reason}): "
        "tralign-fast uses padded batches"
    )
    return False


def _probe(model: PreTrainedModel, layout: str) -> PackedBatch:
    device = next(model.parameters()).device
    (batch,) = PreferenceCollator(paired=True, layout=layout)(_PROBE).parts
    return batch.to(device)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    # SmolLM2: rounding is off by 3e-7 in fp32; a rejected completion that sees the chosen one by
    # 1.2e-2 in fp32 and 3e-2 in bf16. TF32 products round to about the digits of bf16.
    full = dtype in (torch.float32, torch.float64)
    exact = full and torch.get_float32_matmul_precision() == "highest"
    tolerance = 1e-4 if exact else 1e-2
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())
