"""`tralign-fast plan`: does a training fit a GPU, what would TRL hold, and what makes it fit?"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from tralign_fast.memory import MemoryReport, Workload, trace, trace_trl
from tralign_fast.memory.presets import PRESETS
from tralign_fast.ops.losses import LOSSES
from tralign_fast.reference import REFERENCES, reference_class

GIB = 1 << 30
# What a trace of tensors does not see: the CUDA context, workspaces of kernels, fragmentation.
HEADROOM = GIB
NOTE = (
    "Traced tensors only: neither the allocator's fragmentation nor kernel workspaces nor the CUDA "
    "context, for which 1 GiB is left."
)


def _option(default: Any, help: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class PlanOptions:
    """What to train on what; options are named as in `TRConfig`, or shorter."""

    model: str = field(
        metadata={"help": f"{', '.join(PRESETS)}; a config.json, a folder or a hub id."}
    )
    gpu_memory: str = _option("24GiB", "Memory of the GPU: 24GiB, 80GB, or a number of GiB.")
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
    lora_rank: int | None = _option(None, "Adapters on every linear layer; None: full fine-tuning.")
    lora_dtype: str = _option("bfloat16", "Of the adapters (PEFT's default is float32).")
    base_bits: int = _option(16, "4: the base of the adapters is quantised (NF4).")
    logits_budget_mb: float = _option(1024, "MiB of logits that may exist at a time.")
    trl: bool = _option(True, "Trace TRL on the same work, too.")
    json: bool = _option(False, "Print JSON, in bytes.")


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ValueError: an option that cannot be; the message names it and what was expected.
    """
    memory = parse_memory(options.gpu_memory)
    work = workload(options)
    asked = _traced("as asked", trace, work)
    theirs, why = _trace_trl(work) if options.trl else (None, "not asked for")
    fits = _fits(asked, memory)
    remedy = None if fits else find_remedy(work, memory)
    if options.json:
        print(json.dumps(_as_json(options, memory, asked, theirs, why, remedy), indent=2))
    else:
        print(_as_text(options, memory, asked, theirs, why, remedy))
    return 0


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
    if options.gradient_release:
        training |= _RELEASE
    return Workload(
        load_config(options.model),
        pairs=options.pairs,
        tokens=options.tokens,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        lora_dtype=options.lora_dtype,
        base_bits=options.base_bits,
        options=training,
    )


def load_config(model: str) -> Any:
    """The config of a preset, of a config.json, of a folder or of a hub id.

    Raises:
        ValueError: none of these.
    """
    from transformers import AutoConfig

    if model in PRESETS:
        preset = dict(PRESETS[model])
        return AutoConfig.for_model(preset.pop("model_type"), **preset)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--model {model}: expected {', '.join(PRESETS)}, a config.json, a folder or a hub id "
            f"({reason})"
        ) from error


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "80GB" (both: GiB, as cards are sold) or "24".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu-memory {text!r}: expected a size such as 24GiB")
    return int(float(match[1]) * GIB)


# --- what makes it fit ----------------------------------------------------------------------------

_RELEASE = {"gradient_release": True, "max_grad_norm": 0.0}
_NO_RELEASE = {"gradient_release": False, "max_grad_norm": 1.0}


def _with(work: Workload, options: dict[str, Any], **fields: Any) -> Workload:
    return dataclasses.replace(work, options={**work.options, **options}, **fields)


def changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """(what to change, the changed work), the least intrusive first: first what changes no loss,
    then the optimizer, then what is trained, then the batch."""
    options = work.options
    if not options["gradient_checkpointing"]:
        work = _with(work, {"gradient_checkpointing": True})
        yield "--gradient_checkpointing true", work
    place = options["reference"]
    if place in REFERENCES and reference_class(place).needs_second_model:
        work = _with(work, {"reference": "auto"})
        yield "--reference auto", work
    full = work.lora_rank is None
    if full:
        if not options.get("gradient_release") and "adamw" in options["optim"]:
            yield "--gradient_release true", _with(work, _RELEASE)
        if find_spec("bitsandbytes"):
            optim = {"optim": "adamw_bnb_8bit"}
            yield "--gradient_release true --optim adamw_bnb_8bit", _with(work, _RELEASE | optim)
        optim = {"optim": "adafactor"}
        yield "--gradient_release true --optim adafactor", _with(work, _RELEASE | optim)
    if not find_spec("peft"):
        return
    rank = 16 if work.lora_rank is None else work.lora_rank
    adamw = {**_NO_RELEASE, "optim": "adamw_torch_fused"}
    if full:
        yield f"--lora_rank {rank}", _with(work, adamw, lora_rank=rank)
    if work.base_bits == 16 and find_spec("bitsandbytes"):
        work = _with(work, adamw, lora_rank=rank, base_bits=4)
        yield f"--lora_rank {rank} --base_bits 4", work
    arguments = f"--lora_rank {rank} --base_bits {work.base_bits}"
    while work.tokens >= 512 * work.pairs:
        work = dataclasses.replace(work, tokens=work.tokens // 2)
        yield f"{arguments} --tokens {work.tokens}", work


def find_remedy(work: Workload, memory: int) -> tuple[str, MemoryReport] | None:
    """The first of `changes` that fits, traced; those whose weights and states alone do not fit are
    not traced."""
    weights = _weights(work)
    for change, changed in changes(work):
        if _floor(changed, weights) + HEADROOM > memory:
            continue
        report = _traced(change, trace, changed)
        if _fits(report, memory):
            return change, report
    return None


def _weights(work: Workload) -> tuple[int, int]:
    """(weights in all, those of linear layers that a 4-bit base quantises)."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(work.model)
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear)


def _floor(work: Workload, weights: tuple[int, int]) -> int:
    """Bytes that a set-up cannot do without: weights, and AdamW's states of a full fine-tuning."""
    total, linear = weights
    size = 2 if work.dtype == "bfloat16" else 4
    held = total * size - (linear * (size - 0.5) if work.base_bits == 4 else 0)
    if work.lora_rank is None and "adamw" in work.options["optim"]:
        held += 2 * total * (1 if "8bit" in work.options["optim"] else size)
    return int(held)


def _fits(report: MemoryReport, memory: int) -> bool:
    return report.peak + HEADROOM <= memory


# --- what is printed ------------------------------------------------------------------------------


def _traced(what: str, function: Callable[[Workload], MemoryReport], work: Workload) -> Any:
    print(f"tracing {what} ...", file=sys.stderr, flush=True)
    return function(work)


def _trace_trl(work: Workload) -> tuple[MemoryReport | None, str | None]:
    """(TRL's figures, None), or (None, why there are none)."""
    if not find_spec("trl"):
        return None, "TRL not installed"
    if work.options.get("gradient_release"):  # which TRL has not
        work = _with(work, _NO_RELEASE)
    moving = work.options["sync_ref_model"] and work.lora_rank is not None
    frozen = "TRL moves no reference of a PEFT model: traced with a frozen one" if moving else None
    try:
        return _traced("TRL on the same work", trace_trl, work), frozen
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"TRL could not be traced: {reason}"


_ROWS = [f.name for f in dataclasses.fields(MemoryReport)]


def _as_json(options, memory, asked, theirs, why, remedy) -> dict[str, Any]:
    return {
        "setup": dataclasses.asdict(options),
        "gpu_memory": memory,
        "headroom": HEADROOM,
        "tralign_fast": dataclasses.asdict(asked),
        "trl": None if theirs is None else dataclasses.asdict(theirs),
        "trl_note": why,
        "fits": _fits(asked, memory),
        "remedy": None
        if remedy is None
        else {"change": remedy[0], "tralign_fast": dataclasses.asdict(remedy[1])},
        "note": NOTE,
    }


def _as_text(options, memory, asked, theirs, why, remedy) -> str:
    columns = {"tralign-fast": asked}
    if theirs is not None:
        columns["TRL"] = theirs
    if remedy is not None:
        columns["changed"] = remedy[1]
    lines = [f"{'GiB':<14}" + "".join(f"{name:>14}" for name in columns)]
    for row in _ROWS:
        values = "".join(f"{getattr(r, row) / GIB:>14.2f}" for r in columns.values())
        lines.append(f"{row.replace('_', ' '):<14}{values}")
    lines.insert(-1, "-" * len(lines[0]))
    if why is not None and options.trl:
        lines.append(why)
    what = f"{options.model}, {options.pairs} pairs, {options.tokens} packed tokens"
    if _fits(asked, memory):
        lines.append(f"fits {memory / GIB:g} GiB: {what}")
    elif remedy is not None:
        lines.append(f"does not fit {memory / GIB:g} GiB: {what}; it fits with {remedy[0]}")
    else:
        lines.append(f"does not fit {memory / GIB:g} GiB: {what}; no change that was tried fits")
    return "\n".join([*lines, NOTE])
