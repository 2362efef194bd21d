"""What `tralign-fast plan` is asked, and the work that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from tralign_fast.memory.changes import RELEASE, autocast
from tralign_fast.memory.plan_answer import GIB
from tralign_fast.memory.presets import MODELS, PRESETS, preset_of
from tralign_fast.memory.time_model import CARDS
from tralign_fast.memory.workload import Workload
from tralign_fast.ops.logits_budget import STANDARD_MB
from tralign_fast.ops.losses import LOSSES
from tralign_fast.reference import REFERENCES
from tralign_fast.training.option_types import AT_LEAST_ONE, LAYERS


def _option(default: Any, help: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class PlanOptions:
    """What to train on what; options are named as in `TRConfig`, or shorter."""

    model: str = field(
        metadata={"help": f"{', '.join(PRESETS)}; a config.json, a folder or a hub id."}
    )
    dataset: str = _option("trl-lib/ultrafeedback_binarized", "For the command that is printed.")
    gpu_memory: str = _option("24GiB", "Memory of the GPU: 24GiB, 80GB, or a number of GiB.")
    gpus: Annotated[int, AT_LEAST_ONE] = _option(
        1, "GPUs among which FSDP2 shards weights, gradients and optimizer states."
    )
    nodes: Annotated[int, AT_LEAST_ONE] = _option(1, "Machines that the GPUs stand in.")
    card: str | None = _option(
        None, f"For the seconds of a step: {', '.join(CARDS)}. None: h100 for several GPUs."
    )
    tflops: float | None = _option(None, "TFLOP/s that its matrix products reach.")
    nvlink_gbs: float | None = _option(None, "GB/s that a GPU reaches inside of a machine.")
    interconnect_gbs: float | None = _option(None, "GB/s a GPU that machines reach between them.")
    method: str = _option("dpo", f"The loss: {', '.join(LOSSES)}.", "--loss_type")
    reference: str = _option("auto", f"auto, {', '.join(REFERENCES)}.")
    alpha: float = _option(
        0.6, "α, the policy's weight in the new reference.", "--ref_model_mixup_alpha"
    )
    sync: int = _option(
        512, "τ, optimizer steps between two updates; 0: frozen.", "--ref_model_sync_steps"
    )
    tokens: int = _option(4096, "Tokens of the packed row: half prompts, half completions.")
    pairs: int = _option(2, "Pairs in it (KTO: rows).", "--per_device_train_batch_size")
    optim: str = _option("adamw_torch_fused", "Optimizer, as in TrainingArguments.")
    gradient_release: bool = _option(False, "Free every gradient inside the backward.")
    dtype: str = _option("bfloat16", "Of the weights: bfloat16, or float32 under bf16 autocast.")
    gradient_checkpointing: bool = _option(True, "Compute activations again in the backward.")
    gradient_checkpointing_layers: Annotated[float | None, LAYERS] = _option(
        None, "Layers that it is of, from the first on. None: all."
    )
    lora_rank: int | None = _option(
        None, "Adapters on every linear layer; None: full fine-tuning.", "--lora_r"
    )
    lora_dtype: str | None = _option(
        None, "Of the adapters. None: as train has it, float32, on a quantised base bfloat16."
    )
    base_bits: int = _option(16, "4: the base of the adapters is quantised (NF4).")
    logits_budget_mb: float = _option(STANDARD_MB, "MiB of logits that may exist at a time.")
    alternatives: bool = _option(True, "Trace what else there is, and what fits which GPU.")
    trl: bool = _option(False, "Trace TRL on the same work, too; it takes as long again.")
    json: bool = _option(False, "Print JSON, in bytes.")
    plot: str | None = _option(None, "Draw the alternatives into this file, as plan.png.")
    more: dict[str, Any] = field(default_factory=dict, init=False)  # options of a recipe


def workload(options: PlanOptions) -> Workload:
    training: dict[str, Any] = {
        "loss_type": options.method,
        "reference": options.reference,
        "sync_ref_model": options.sync > 0,
        "optim": options.optim,
        "gradient_checkpointing": options.gradient_checkpointing,
        "logits_budget_mb": options.logits_budget_mb,
    }
    if options.sync > 0:
        schedule = {"ref_model_mixup_alpha": options.alpha, "ref_model_sync_steps": options.sync}
        training |= schedule
    if options.gradient_checkpointing_layers is not None:
        training["gradient_checkpointing_layers"] = options.gradient_checkpointing_layers
    if options.gradient_release:
        training |= RELEASE
    lora_dtype = options.lora_dtype or ("bfloat16" if options.base_bits == 4 else "float32")
    training |= autocast(options.dtype, options.lora_rank, lora_dtype)
    training |= options.more
    return Workload(
        load_config(options.model),
        pairs=options.pairs,
        tokens=options.tokens,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        lora_dtype=lora_dtype,
        base_bits=options.base_bits,
        options=training,
        gpus=options.gpus,
    )


def load_config(model: str) -> Any:
    """The config of a preset, of a config.json, of a folder or of a hub id.

    Raises:
        ValueError: none of these.
    """
    from transformers import AutoConfig

    if (name := preset_of(model)) is not None:
        preset = dict(PRESETS[name])
        return AutoConfig.for_model(preset.pop("model_type"), **preset)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--model {model}: expected {', '.join(PRESETS)}, a config.json, a folder or a hub id "
            f"({reason})"
        ) from error


def hub_id(model: str) -> str:
    """What `train --model` takes for a preset."""
    return MODELS[model][0] if model in MODELS else model


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "80GB" (both: GiB, as cards are sold) or "24".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu-memory {text!r}: expected a size such as 24GiB")
    return int(float(match[1]) * GIB)
