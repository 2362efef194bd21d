"""TRL's trainers with a moving reference and with this library's LM head.

`TrustRegionCallback` moves the reference; `use_fast_logprobs` changes what TRL computes behind its
fused LM head, and nothing else of TRL.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tralign_fast.integrations.callback import TrustRegionCallback
from tralign_fast.ops.logprobs import linear_logprobs_and_statistics
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform

__all__ = ["TrustRegionCallback", "use_fast_logprobs"]

KNOWN_VERSIONS = "1.16"
# What TRL's forward looks up: the autograd function of its head, whose `apply` takes _ARGUMENTS,
# and the question whether only labelled positions are scored.
_HEAD, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"
_ARGUMENTS = [
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
]  # fmt: skip
_OUTPUTS = STATISTICS
_OURS = "_tralign_"
_numbers = itertools.count()  # of patched functions; an id would come back with a later function


def use_fast_logprobs(
    trainer_or_model: Any, *, logits_budget_mb: float | None = None, backend: str = "auto"
) -> Callable[[], None]:
    """Puts `linear_logprobs` behind TRL's fused LM head; returns the function that undoes it.

        undo = use_fast_logprobs(trainer)   # a DPOTrainer, KTOTrainer, GRPOTrainer, ...

    The forward stays TRL's, with its losses and metrics. Of its head, three things change: only
    scored positions pass it on every device (TRL passes the prompt and the padding too where there
    is no Triton), the logits are kept for the backward if they fit the budget (three products
    instead of four), and the gradient of the weight is written once in the weight's dtype (TRL
    sums it in a second buffer of (V, H) fp32).

    GRPO's and RLOO's passes are these too: policy with entropy, reference and old policy, in their
    chunks of the batch and at their temperature. The entropy carries no gradient: a loss that asks
    for one (GRPO's `entropy_coef`) raises.

    `modules_to_save=["lm_head"]` (the active adapter's copy, the original where it is off) and
    `torch_compile=True` are as in TRL.

    Args:
        trainer_or_model: one of TRL's trainers (its policy and its reference model are changed), or
            a model that went through `trl.trainer.utils.add_fused_lm_head`.
        logits_budget_mb, backend: as in `linear_logprobs`.

    Raises:
        ValueError: not TRL's, a head that is not linear, quantised, on meta or with LoRA factors
            (of which TRL's head knows nothing), in use already, or Liger's head on top.
        RuntimeError: a TRL whose head is not the one known. Nothing is changed then.
    """
    _check_liger(trainer_or_model)
    found = [_find_head(model) for model in _models_of(trainer_or_model)]
    head = _Head(logits_budget_mb, backend)
    undos = [_swap_names(function, head) for function in found]

    def undo() -> None:
        for one in undos:
            one()

    return undo


def _check_liger(target: Any) -> None:
    """Liger's layers are welcome; its own head is put over TRL's when training starts."""
    args = getattr(target, "args", None)
    if not getattr(args, "use_liger_kernel", False):
        return
    if (getattr(args, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy", True):
        raise ValueError(
            "use_fast_logprobs: use_liger_kernel=True would put Liger's head over this one: set "
            'liger_kernel_config={"fused_linear_cross_entropy": False}'
        )


def _models_of(target: Any) -> list[Any]:
    """The policy and, if there is one, the reference model, without wrappers."""
    from accelerate.utils import extract_model_from_parallel

    if isinstance(target, nn.Module):
        models = [target]
    elif isinstance(getattr(target, "model", None), nn.Module):
        models = [target.model, getattr(target, "ref_model", None)]
    else:
        raise ValueError(
            f"use_fast_logprobs: expected a TRL trainer or a model, got {type(target).__name__}"
        )
    models = [
        extract_model_from_parallel(model, keep_torch_compile=False)
        for model in models
        if model is not None
    ]
    return [m.get_base_model() if hasattr(m, "get_base_model") else m for m in models]


def _find_head(model: Any) -> FunctionType:
    """The forward that TRL gave the model, checked to be the one known, under any wrappers."""
    from trl import __version__ as installed
    from trl.trainer import utils

    name = type(model).__name__
    function = getattr(model, "forward", None)
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is not None and code.co_filename == inspect.getfile(utils):
            break
        function = getattr(function, "__wrapped__", None)
    if function is None:
        raise ValueError(
            f"{name} has no fused LM head of TRL: pass a trainer of trl>={KNOWN_VERSIONS} (DPO, "
            "KTO, GRPO, RLOO, SFT), or call trl.trainer.utils.add_fused_lm_head first; Liger's "
            "fused_linear_cross_entropy takes it away"
        )
    names = function.__code__.co_names
    if any(n.startswith(_OURS) for n in names):
        raise ValueError(f"{name}: use_fast_logprobs is in use already; undo it first")
    theirs = getattr(utils, _HEAD, None)
    known = (
        {_HEAD, _COMPACT} <= set(names)
        and theirs is not None
        and list(inspect.signature(theirs.forward).parameters)[1:] == _ARGUMENTS
        and inspect.signature(theirs.forward).parameters["outputs"].default == _OUTPUTS
    )
    if not known:
        raise RuntimeError(
            f"use_fast_logprobs knows the fused LM head of TRL {KNOWN_VERSIONS}, and TRL "
            f"{installed} has another one: install trl~={KNOWN_VERSIONS}.0 (nothing was "
            "changed)"
        )
    _check_linear(model)
    return function


def _check_linear(model: Any) -> None:
    """Raises unless TRL's forward finds all of the head, in floats, at `lm_head.weight`."""
    name = type(model).__name__
    for head in _heads_of(model.get_output_embeddings()):
        _check_one(name, head)


def _heads_of(head: Any) -> list[Any]:
    """What `head.weight` may mean: PEFT's wrapper for `modules_to_save` gives that of the active
    adapter's copy, and that of the original where the adapter is off."""
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return [head.original_module, *copies.values()]
    return [head]


def _check_one(name: str, head: Any) -> None:
    weight = getattr(head, "weight", None)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{name}: lm_head has LoRA factors or the like, which TRL's fused head leaves out: "
            'take it out of target_modules, and train it with modules_to_save=["lm_head"]'
        )
    if not isinstance(head, nn.Linear) or weight is None:
        raise ValueError(
            f"{name}: expected a linear output embedding (lm_head), got {type(head).__name__}"
        )
    if weight.is_meta:
        raise ValueError(f"{name}: lm_head is on meta; load its weights first")
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}: lm_head is quantised ({weight.dtype}); leave it out of the quantisation "
            "(llm_int8_skip_modules)"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name}: lm_head is sharded by DeepSpeed ZeRO-3, whose shards are gathered by TRL's "
            "own head only; use ZeRO-2 or FSDP2"
        )


def _swap_names(function: FunctionType, head: _Head) -> Callable[[], None]:
    """Lets one function of TRL look up our head under its own name; returns the undo.

    The function object stays, and with it whatever wraps it (accelerate's autocast wraps the
    reference's forward inside the trainer's constructor); other models keep TRL's head.
    """
    before = function.__code__
    number = next(_numbers)
    mine = {name: f"{_OURS}{number}{name}" for name in (_HEAD, _COMPACT)}
    function.__globals__.update({mine[_HEAD]: head, mine[_COMPACT]: _scores_labels_only})
    function.__code__ = before.replace(co_names=tuple(mine.get(n, n) for n in before.co_names))
    # the names go with the function; neither they nor the undo keep it, and its model, alive
    forget = weakref.finalize(function, _remove, function.__globals__, [*mine.values()])
    forget.atexit = False

    def undo() -> None:
        alive = forget.peek()
        if alive is not None:
            alive[0].__code__ = before
            forget()

    return undo


def _remove(namespace: dict[str, Any], names: list[str]) -> None:
    for name in names:
        namespace.pop(name, None)


def _scores_labels_only(device: torch.device) -> bool:
    # elsewhere (Neuron) a number of positions that changes with the batch means a compilation each
    return device.type in ("cpu", "cuda", "xpu", "mps")


class _PerToken(NamedTuple):
    """What TRL's head returns, (N,) each."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class _Head:
    """Stands where TRL's autograd function stands."""

    def __init__(self, logits_budget_mb: float | None, backend: str) -> None:
        self.options: Any = {"logits_budget_mb": logits_budget_mb, "backend": backend}

    def apply(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> _PerToken:
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        transform = LogitTransform(logit_scale, softcap, temperature)
        logps, extras = linear_logprobs_and_statistics(
            hidden, weight, targets, [name for name in _OUTPUTS if name in outputs],
            bias=bias, transform=transform, **self.options,
        )  # fmt: skip
        if "entropy" in extras and logps.requires_grad:
            extras["entropy"] = _NoGradient.apply(extras["entropy"], logps)
        return _PerToken(logps, *(extras.get(name) for name in _OUTPUTS))


class _NoGradient(torch.autograd.Function):
    """The entropy, tied to the graph: a loss that needs its gradient hears that there is none."""

    @staticmethod
    def forward(ctx, entropy: Tensor, logps: Tensor) -> Tensor:
        # DDP's outputs leave through one node, which calls this backward without a gradient
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None
        raise ValueError(
            "use_fast_logprobs: the loss needs a gradient of the entropy (entropy_coef, "
            "use_adaptive_entropy), and this head computes none; undo it for this run"
        )
