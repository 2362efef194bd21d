"""A model made ready: log-probs from its forward, packed rows where it can, tried out first."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.model.attention import enable_prefix_attention
from tralign_fast.model.checkpointing import lean_checkpoints
from tralign_fast.model.cpu import speed_up_linears
from tralign_fast.model.fused_lora import fuse_lora
from tralign_fast.model.graphs import graph_decoder
from tralign_fast.model.last_mlp import LAST_MLP, leave_prompts_out_of_last_mlp
from tralign_fast.model.layer_kernels import use_layer_kernels
from tralign_fast.model.masks import watch_masks
from tralign_fast.model.patching import Patches, causal_lm_of, has_forward
from tralign_fast.model.rotary import fewer_rotary_operators
from tralign_fast.model.router import record_router_logits
from tralign_fast.model.scoring import enable_logprobs, sequence_logps
from tralign_fast.ops.backend import warn_once


class PreparedModel:
    """What `prepare_model` did to a model: `packs` says whether it can run packed rows.

    `undo()`, or leaving a `with` block, takes everything back, also when others have prepared the
    model in the meantime, or taken theirs back. It does not keep the model alive, and a model
    whose `PreparedModel` is dropped stays prepared.
    """

    def __init__(self, model: PreTrainedModel, packs: bool, undo: contextlib.ExitStack) -> None:
        self.packs = packs
        self._model = weakref.ref(model)
        self._undo = undo

    def compile_layers(self, **options: Any) -> None:
        """`compile_layers` of the model, until the undo."""
        model = self._model()
        assert model is not None
        self._undo.callback(compile_layers(model, **options))

    def undo(self) -> None:
        """Gives the model back as it was; a second time does nothing."""
        self._undo.close()

    def __enter__(self) -> PreparedModel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def prepare_model(
    model: PreTrainedModel,
    *,
    packing: bool = True,
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
    backend: str = "auto",
    fused_lora: bool = True,
    cuda_graphs: bool | None = False,
    layer_kernels: str | Collection[str] = "auto",
    checkpointed_layers: float | None = None,
    probe: bool = True,
) -> PreparedModel:
    """Makes `sequence_logps` work on `model`, and finds out whether it can run packed rows.

    Both are tried on twelve tokens: the log-probs must equal those of the model's own logits, and
    the hidden states of a packed row those of separate sequences. An attention that cannot do
    packed rows (a recurrent layer, sinks, position biases, a mask of its own, …) is left alone with
    one warning, and the caller uses padded batches. Without `probe` nothing is tried, and `packing`
    is the answer. With `fused_lora` PEFT's plain LoRA layers run as one node of autograd each. With
    `cuda_graphs` packed rows go through the decoder as CUDA graphs (`model.graphs`), with None
    where the GPU waits for launches.

    `layer_kernels` are those of another library for norms, gated MLPs and rotary embeddings:
    "auto" takes Liger's on a GPU, where it is installed, each that is as good as the model's own
    code on its own modules (which is tried without `probe` too); "liger" says so where it cannot;
    "none" takes none; a collection of "norm", "mlp" and "rotary" is "liger" for those alone. Rotary
    embeddings without a kernel run in fewer operators with the same bits, but for "none".
    `checkpointed_layers` is how many layers gradient checkpointing is of, from the first on, or
    under 1 which share; None: all. Of a model that is prepared twice the newest options hold, until
    their undo. `logits_budget_mb`, `vocab_filter`, `kept` and `backend` are
    those of `linear_logprobs`.

    Raises:
        ValueError: the model's head is not `softcap(scale · (W h + b))`, its 4-bit weights were
            repacked for inference, its PEFT type cannot be scored, `layer_kernels` or `kept` is
            unknown, or it has fewer layers than `checkpointed_layers`. The model is as it was.
    """
    _check_peft_type(model)
    options: dict[str, Any] = {"vocab_filter": vocab_filter, "kept": kept, "backend": backend}
    with contextlib.ExitStack() as undo:
        undo.callback(_keep_4bit_differentiable(model))
        undo.callback(enable_logprobs(model, logits_budget_mb=logits_budget_mb, **options))
        undo.callback(record_router_logits(model))
        undo.callback(speed_up_linears(model))
        if fused_lora:
            undo.callback(fuse_lora(model))
        undo.callback(lean_checkpoints(model, checkpointed_layers))
        is_there = next(model.parameters()).device.type != "meta"
        probe = probe and is_there
        with _evaluating(model):
            if is_there:
                run = functools.partial(_run, model)
                undo.callback(use_layer_kernels(model, layer_kernels, run))
            if layer_kernels != "none":
                undo.callback(fewer_rotary_operators(model))
            if probe:
                _check_head(model)
            packs = packing and _enable_packing(model, undo, probe)
        if packs and cuda_graphs is not False:
            undo.callback(graph_decoder(model, always=bool(cuda_graphs)))
        elif cuda_graphs:
            warn_once("cuda_graphs=True has no effect: graphs are of packed rows")
        return PreparedModel(model, packs, undo.pop_all())
    raise AssertionError  # an ExitStack may swallow exceptions; this one has nothing that does


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def compile_layers(model: PreTrainedModel, **options: Any) -> Callable[[], None]:
    """Compiles the decoder layers in place, with `torch.compile(**options)`; returns its undo.

    A layer whose MLP runs on the scored rows alone stays as it is. Its graphs break off at the MLP
    and fit the other layers as well: gradient checkpointing would now and then run those again by
    another graph than the first time, which saves other tensors.

    Raises:
        ValueError: no layers were found.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        name = type(causal_lm_of(model)).__name__
        raise ValueError(f"torch_compile: found no decoder layers in {name}; leave it out")
    patches = Patches()
    for layer in layers:
        if any(has_forward(module, LAST_MLP) for module in layer.modules()):
            continue
        _compile(layer, patches, options)
    return patches.undo


def _compile(layer: Any, patches: Patches, options: dict[str, Any]) -> None:
    if "__call__" in vars(GradientCheckpointingLayer):  # transformers checkpoints around a call
        # as `Module.compile` does it
        patches.attribute(layer, "_compiled_call_impl", torch.compile(layer._call_impl, **options))
        return
    # later ones checkpoint inside of `forward`, and Dynamo compiles nothing of a checkpoint where
    # attention stays outside of the graphs
    compiled = torch.compile(type(layer).forward.__wrapped__, **options)

    def forward(_, self, *args, **kwargs):
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            run = functools.partial(compiled, self, **kwargs)
            return self._gradient_checkpointing_func(run, *args)
        return compiled(self, *args, **kwargs)

    patches.forward(layer, "compiled", forward)


def _keep_4bit_differentiable(model: nn.Module) -> Callable[[], None]:
    """Keeps bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU: its packed
    product has no backward, and whatever lies before it would silently be left untrained."""
    patches = Patches()
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = module.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
            if getattr(state, "packing_format_for_cpu", False):
                patches.undo()
                raise ValueError(
                    f"{name}: bitsandbytes has repacked its 4-bit weight for inference, which has "
                    "no backward; load the model again and train it before anything is evaluated"
                )
            patches.attribute(module, "support_avx512bf16_for_cpu", False)
    return patches.undo


# PEFT's types that cannot be scored, and why.
_REFUSED = {
    "MULTITASK_PROMPT_TUNING": "needs a task id for every row, which preference data does not have",
    "POLY": "needs a task id for every row, which preference data does not have",
    "ADAPTION_PROMPT": "keeps the forward that the model had when it was made",
}


def _check_peft_type(model: PreTrainedModel) -> None:
    peft_type = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if peft_type is not None and (why := _REFUSED.get(peft_type.value)) is not None:
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__}: PEFT's {peft_type.value} {why}; use "
            "PROMPT_TUNING or LORA"
        )


# Two prompts with two completions each: a sharing error shows as an error of order one.
_PROBE = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [3, 1], "chosen_ids": [9], "rejected_ids": [2, 5]},
]


def _run(model: PreTrainedModel) -> None:
    sequence_logps(model, _probe(model, "padded"))


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    batch = _probe(model, "padded")
    ours = sequence_logps(model, batch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[:, -batch.input_ids.shape[1] :]  # without PEFT's virtual tokens
    own = logits.flatten(0, 1)[batch.score_index].float().log_softmax(-1)
    theirs = batch.sum_per_sequence(own.gather(1, batch.targets[:, None])[:, 0])
    if not _close(ours, theirs, model.dtype):
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__}: its logits are not softcap(scale · (W h + b)) "
            f"as far as its config tells (log-probs {theirs.tolist()}, expected {ours.tolist()})"
        )


@torch.no_grad()
def _enable_packing(model: PreTrainedModel, undo: contextlib.ExitStack, probe: bool) -> bool:
    reason = _why_not_packed_by_peft(model)
    with contextlib.ExitStack() as own:
        # first: the attention that padded batches then run through is also the one compared with
        own.callback(enable_prefix_attention(causal_lm_of(model)))
        own.callback(leave_prompts_out_of_last_mlp(model))
        if reason is None and probe:
            reason = _why_not_packed(model)
        if reason is None:
            undo.push(own.pop_all())
            return True
    warn_once(
        f"{type(causal_lm_of(model)).__name__} cannot share prompts in a packed row ({reason}): "
        "tralign-fast uses padded batches"
    )
    return False


def _why_not_packed_by_peft(model: PreTrainedModel) -> str | None:
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        return f"{config.peft_type.value} puts virtual tokens before every row, not every sequence"
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA looks for its invocation once in every row"
    return None


def _why_not_packed(model: PreTrainedModel) -> str | None:
    with watch_masks() as watch:
        separate = sequence_logps(model, _probe(model, "padded"))
    if watch.reason is not None:
        return watch.reason
    try:
        shared = sequence_logps(model, _probe(model, "shared"))
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    if not _close(shared, separate, model.dtype):
        return "packed rows give other log-probs"
    return None


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
