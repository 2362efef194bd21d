"""What makes a training take less memory, mildest first, and what one cannot do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from tralign_fast.memory.workload import Workload
from tralign_fast.reference import REFERENCES, reference_class

RELEASE = {"gradient_release": True, "max_grad_norm": 0.0}
NO_RELEASE = {"gradient_release": False, "max_grad_norm": 1.0}


def with_options(work: Workload, options: dict[str, Any], **fields: Any) -> Workload:
    """The work with some options of `TRConfig` and fields of its own changed."""
    return dataclasses.replace(work, options={**work.options, **options}, **fields)


def changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """(what to change, the changed work), the least intrusive first: first what changes no loss,
    then the optimizer, then what is trained, then the batch. With several GPUs a smaller batch of
    all weights comes before adapters, and the 8-bit optimizer, which has no step on shards, is left
    out."""
    options = work.options
    if not options["gradient_checkpointing"]:
        work = with_options(work, {"gradient_checkpointing": True})
        yield "--gradient_checkpointing true", work
    elif options.get("gradient_checkpointing_layers") is not None:
        work = with_options(work, {"gradient_checkpointing_layers": None})
        yield f"--gradient_checkpointing_layers {depth_of(work)}", work
    place = options["reference"]
    if place in REFERENCES and reference_class(place).needs_second_model:
        work = with_options(work, {"reference": "auto"})
        yield "--reference auto", work
    full = work.lora_rank is None
    if full:
        if not options.get("gradient_release") and "adamw" in options["optim"]:
            yield "--gradient_release true", with_options(work, RELEASE)
        if find_spec("bitsandbytes") and work.gpus == 1:
            optim = {"optim": "adamw_bnb_8bit"}
            yield (
                "--gradient_release true --optim adamw_bnb_8bit",
                with_options(work, RELEASE | optim),
            )
        optim = {"optim": "adafactor"}
        change = "--gradient_release true --optim adafactor"
        yield change, with_options(work, RELEASE | optim)
        fewer = work.tokens // 2
        if work.gpus > 1 and fewer >= 256 * work.pairs:
            yield f"{change} --tokens {fewer}", with_options(work, RELEASE | optim, tokens=fewer)
    if not find_spec("peft"):
        return
    rank = 16 if work.lora_rank is None else work.lora_rank
    adamw = {**NO_RELEASE, "optim": "adamw_torch_fused"}
    if full:
        mixed = autocast(work.dtype, rank, "float32")
        lora = with_options(work, {**adamw, **mixed}, lora_rank=rank, lora_dtype="float32")
        yield f"--lora_rank {rank}", lora
    if work.base_bits == 16 and find_spec("bitsandbytes"):
        few = {**adamw, **autocast(work.dtype, rank, "bfloat16")}
        work = with_options(work, few, lora_rank=rank, base_bits=4, lora_dtype="bfloat16")
        yield f"--lora_rank {rank} --base_bits 4", work
    arguments = f"--lora_rank {rank} --base_bits {work.base_bits}"
    while work.tokens >= 512 * work.pairs:
        work = dataclasses.replace(work, tokens=work.tokens // 2)
        yield f"{arguments} --tokens {work.tokens}", work


def depth_of(work: Workload) -> int:
    """Decoder layers of its model."""
    return work.model.get_text_config().num_hidden_layers


def autocast(dtype: str, rank: int | None, lora_dtype: str) -> dict[str, Any]:
    """fp32 weights, of a model or of its adapters, are computed with in bf16."""
    return {"bf16": dtype == "float32" or (rank is not None and lora_dtype == "float32")}


def weights_of(work: Workload) -> tuple[int, int]:
    """(weights in all, those of linear layers that a 4-bit base quantises)."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(work.model)
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear)


def floor_of(work: Workload, weights: tuple[int, int]) -> int:
    """Bytes that a set-up cannot do without: weights, and AdamW's states of a full fine-tuning."""
    total, linear = weights
    size = 2 if work.dtype == "bfloat16" else 4
    held = total * size - (linear * (size - 0.5) if work.base_bits == 4 else 0)
    if work.lora_rank is None and "adamw" in work.options["optim"]:
        held += 2 * total * (1 if "8bit" in work.options["optim"] else size)
    return int(held)
