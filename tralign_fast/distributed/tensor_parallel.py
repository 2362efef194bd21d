"""Models whose layers several processes share (tensor parallelism), as transformers cuts them up.

`from_pretrained(..., tp_plan="auto")` makes the weights DTensors and gives every layer a forward of
its own. The trainer takes such a model as it is: attention runs on the heads that a process has,
the LM head on its part of the vocabulary (`ops.vocab_parallel`), and all processes of a group get
the same rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from tralign_fast.model.patching import causal_lm_of
from tralign_fast.ops.ema import local_shard


def sharing_processes(model: Any) -> int:
    """How many processes share the layers of a model, and get the same rows; 1: it has them all."""
    return getattr(causal_lm_of(model), "_tp_size", None) or 1


def is_sharded_by_transformers(model: Any) -> bool:
    """Whether transformers has cut the model up as it loaded it, by layers or by FSDP2."""
    return getattr(causal_lm_of(model), "_device_mesh", None) is not None


# Options of a `TRConfig` that read whole weights or rebuild layers.
_WHOLE_ALONE = ("log_kl_initial", "torch_compile")


def check_layers(model: PreTrainedModel, start: PreTrainedModel | None, args: Any) -> None:
    """Raises ValueError where processes cannot share the layers of a model as they are cut, its
    first reference is cut otherwise, or an option of the run wants whole layers."""
    processes = sharing_processes(model)
    if start is not None and sharing_processes(start) != processes:
        raise ValueError(
            f"ref_model is cut up with tp_size={sharing_processes(start)}, the policy with tp_size="
            f"{processes}: load both with the same distributed_config, or leave ref_model out"
        )
    if processes == 1:
        return
    if option := next((name for name in _WHOLE_ALONE if getattr(args, name)), None):
        raise ValueError(
            f"{option} is not supported beside tensor parallelism (tp_size={processes}): leave it "
            "out, or use FSDP2"
        )
    config: Any = causal_lm_of(model).config.get_text_config()
    name = type(causal_lm_of(model)).__name__
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    for count, what in ((heads, "attention heads"), (groups, "key-value heads")):
        if count % processes:
            raise ValueError(
                f"{name}: {count} {what} cannot be shared by {processes} processes (tp_size); "
                f"expected a tp_size that divides {heads} and {groups}"
            )
    mesh: Any = causal_lm_of(model)._device_mesh
    parts = mesh.size() if mesh is not None else processes
    if parts > processes and config.tie_word_embeddings and config.vocab_size % parts:
        raise ValueError(
            f"{name}: {config.vocab_size} tied embeddings cannot be shared evenly by {parts} "
            f"processes (tp_size={processes} beside fsdp_size={parts // processes}), and uneven "
            "shares train otherwise: expected a vocabulary of a multiple, or fsdp_size=1"
        )
    if not any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            f"{name}: tensor parallelism of this transformers cuts weights that are no DTensors, "
            "which cannot be trained here; expected 5.17 or newer"
        )


def gather_once(accelerator: Accelerator, processes: int) -> Callable[[Tensor], Tensor]:
    """`accelerator.gather_for_metrics`, of one of the processes that share each row: its own counts
    a row as often as it was seen, and cuts off the end of what that makes."""

    def gather(own: Tensor) -> Tensor:
        parts: Any = accelerator.gather(own)
        parts = parts.view(accelerator.num_processes, *own.shape)[::processes].flatten(0, 1)
        state = accelerator.gradient_state
        return (
            parts[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else parts
        )

    return gather


@torch.no_grad()
def copy_sharded(model: Any) -> PreTrainedModel:
    """A copy of a model that transformers has cut up: the forwards that it gave to the layers would
    run the original's weights in a deep copy.

    Raises:
        ValueError: an adapter lies over the model.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "a second model with an adapter cannot be cut up as the policy is: use hard updates "
            '(ref_model_mixup_alpha=1) with reference="snapshot"'
        )
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin: Any = type(model)(config)
    ours = dict(model.named_parameters(remove_duplicate=False))
    for path, module in twin.named_modules():
        for key, parameter in module._parameters.items():
            if (
                parameter is not None
            ):  # one each: transformers cuts tied weights before it ties them
                own = ours[f"{path}.{key}".removeprefix(".")]
                whole = torch.empty(own.shape, dtype=own.dtype, device="meta")
                module._parameters[key] = nn.Parameter(whole, own.requires_grad)
    mesh = getattr(model, "_mesh_manager", None) or model._device_mesh
    twin = type(model).maybe_distribute_model(twin, config.distributed_config, mesh)
    twin.to_empty(device=model.device)
    twin.tie_weights()
    for name, parameter in twin.named_parameters():
        local_shard(parameter).copy_(local_shard(ours[name]))
    buffers: dict[str, Tensor] = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    twin.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    _switch(model, twin)
    return twin


def _switch(model: nn.Module, twin: nn.Module) -> None:
    """Training mode and probabilities of dropping something, as they were switched since."""
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        other.training = own.training
        if hasattr(own, "p"):
            other.p = own.p  # pyright: ignore[reportAttributeAccessIssue]
