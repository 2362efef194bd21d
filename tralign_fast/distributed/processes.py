"""Where the trainer meets several processes: what shards can hold, and what all must do alike."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.distributed.tensor_parallel import (
    is_sharded_by_transformers,
    sharing_processes,
)
from tralign_fast.model.prepare import PreparedModel, prepare_model
from tralign_fast.ops.backend import warn_once
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.sharding import gathered, is_sharded


def check_distribution(
    accelerator: Accelerator, place: type[ReferencePolicy], policy: PreTrainedModel | None = None
) -> None:
    """Raises ValueError where a reference cannot live in that place beside a sharded policy.

    Args:
        policy: the model, whose layers processes may share; None: none do.
    """
    fsdp, zero3 = _fsdp_plugin(accelerator), _zero3_plugin(accelerator)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError('FSDP version 1 is not supported: set fsdp_config={"version": 2}')
    sharded = "ZeRO-3" if zero3 is not None else "FSDP2" if fsdp is not None else None
    if policy is not None and sharing_processes(policy) > 1:
        sharded = "tensor parallelism"
    if sharded is not None and sharded not in place.can_be_sharded:
        raise ValueError(
            f'reference="{place.name}" cannot hold weights that {sharded} shards: use '
            'reference="resident", or hard updates (ref_model_mixup_alpha=1) with '
            'reference="snapshot"'
        )
    if place.needs_second_model and zero3 is not None and zero3.offload_param_device == "nvme":
        raise ValueError(
            f'reference="{place.name}" cannot move weights that ZeRO-3 keeps on a disk: set '
            'offload_param to "cpu" or "none", or use reference="snapshot"'
        )


def _fsdp_plugin(accelerator: Accelerator) -> Any:
    return getattr(accelerator.state, "fsdp_plugin", None)


def _zero3_plugin(accelerator: Accelerator) -> Any:
    """accelerate's DeepSpeed plugin where ZeRO-3 shards the weights, else None."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin if plugin is not None and plugin.zero_stage == 3 else None


def prepare_on_all(
    accelerator: Accelerator, model: PreTrainedModel, **options: Any
) -> PreparedModel:
    """`prepare_model`, with one answer for all: whether the model can take packed rows.

    The first process tries the model out: where FSDP fills the weights of the others later they are
    empty, and all must use the same layout.
    """
    if accelerator.num_processes == 1 or is_sharded(model):
        with gathered(model):  # loaded under ZeRO-3: all have its weights, and try them out
            return prepare_model(model, **options)
    prepared = prepare_model(model, **options) if accelerator.is_main_process else None
    packs = [prepared is not None and prepared.packs]
    broadcast_object_list(packs)
    if prepared is None:
        prepared = prepare_model(model, **{**options, "packing": packs[0]}, probe=False)
    return prepared


def take_off_autocast(model: PreTrainedModel) -> None:
    """Takes off what accelerate put over the forward for mixed precision.

    accelerate's own `unwrap_model` goes down to the undecorated function, past what transformers
    and this library have there.
    """
    model.__dict__.pop("_is_accelerate_prepared", None)  # by which it would not be put on again
    before = model.__dict__.pop("_original_forward", None)
    if before is None:
        return
    del model.forward
    if model.forward != before:
        model.forward = before


def take_over_compilation(accelerator: Accelerator, args: TrainingArguments) -> dict | None:
    """The options of torch.compile that a run was started with; None without.

    accelerate is left with nothing to compile. It would wrap the whole model, whose parameters then
    have other names, and compile every layer anew, where the graphs of one serve the others.

    Raises:
        ValueError: beside ZeRO-3, in whose compiled layers no gradient arises.
    """
    plugin: Any = accelerator.state.dynamo_plugin
    wanted = args.torch_compile or plugin.backend != DynamoBackend.NO
    if wanted and _zero3_plugin(accelerator) is not None:
        raise ValueError("torch_compile cannot compile layers that ZeRO-3 shards: use FSDP2")
    options = plugin.to_kwargs()
    if args.torch_compile:
        options |= {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    plugin.backend = DynamoBackend.NO
    if options.pop("fullgraph", False):
        warn_once("torch.compile: fullgraph is ignored, as attention stays outside of the graphs")
    options.setdefault("dynamic", True)  # packed rows have a length of their own each
    return options if wanted else None


def distribute_frozen(accelerator: Accelerator, model: PreTrainedModel, kept: bool) -> nn.Module:
    """A model that only runs forwards, sharded or replicated as the policy is.

    Args:
        kept: it runs as long as the policy does.
    """
    if is_sharded_by_transformers(model):
        return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    if _fsdp_plugin(accelerator) is not None:
        return fsdp2_prepare_model(accelerator, model)
    if (zero3 := _zero3_plugin(accelerator)) is None:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        if not kept:  # accelerate's list lives as long as the trainer
            accelerator._models.remove(prepared)
        return prepared
    import deepspeed  # pyright: ignore[reportMissingImports]

    zero3.set_moe_leaf_modules(model)
    config = copy.deepcopy(zero3.deepspeed_config)
    for part in ("optimizer", "scheduler"):
        config.pop(part, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def even_parts(
    accelerator: Accelerator, batch: PackedBatch | SplitBatch
) -> tuple[PackedBatch, ...]:
    """The parts of a batch that may be split, as many on every process: where weights are sharded
    all must run the model equally often. What is added weighs nothing."""
    parts = batch.parts
    if accelerator.num_processes == 1:
        return parts
    count = torch.tensor([len(parts)], device=accelerator.device)
    most = int(accelerator.gather(count).max())  # pyright: ignore[reportAttributeAccessIssue]
    return (*parts, *[dataclasses.replace(parts[-1], share=0.0)] * (most - len(parts)))
