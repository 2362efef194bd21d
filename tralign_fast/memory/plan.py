"""`tralign-fast plan`: does a training fit a GPU, what makes it fit, and with which command."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any

from tralign_fast.memory import MemoryReport, Workload, trace_trl
from tralign_fast.memory.forked import in_processes
from tralign_fast.memory.presets import MODELS, PRESETS, preset_of
from tralign_fast.memory.sharding import trace_rank
from tralign_fast.memory.step_flops import sizes_of
from tralign_fast.memory.time_model import (
    CARDS,
    DEFAULT_CARD,
    Layout,
    Rates,
    StepTime,
    rates_of,
    step_time,
)
from tralign_fast.ops.logits_budget import STANDARD_MB
from tralign_fast.ops.losses import LOSSES
from tralign_fast.reference import REFERENCES, reference_class
from tralign_fast.training.option_types import AT_LEAST_ONE

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


@dataclass(frozen=True)
class Alternative:
    """A change of the work and what it holds; `change` is empty for what was asked."""

    change: str
    work: Workload
    report: MemoryReport
    no_trace: str | None = None  # why the report of several GPUs is arithmetic


@dataclass(frozen=True)
class Plan:
    """Answers of `tralign-fast plan`."""

    memory: int
    tried: list[Alternative]  # the first is what was asked
    remedy: Alternative | None
    theirs: MemoryReport | None
    why: str | None
    time: StepTime | None = None  # of what is chosen, or else was asked
    no_time: str | None = None  # why there is none

    @property
    def asked(self) -> Alternative:
        return self.tried[0]

    @property
    def chosen(self) -> Alternative | None:
        """What fits: as it was asked, or changed."""
        return self.asked if fits(self.asked.report, self.memory) else self.remedy


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ValueError: an option that cannot be; the message names it and what was expected.
    """
    from tralign_fast.memory.plan_plot import check_plot, save_plot
    from tralign_fast.memory.plan_text import as_json, as_text

    if options.plot is not None:
        check_plot(options.plot)
    plan = make_plan(options)
    print(json.dumps(as_json(options, plan), indent=2) if options.json else as_text(options, plan))
    if options.plot is not None:
        save_plot(plan, options.plot)
        print(f"drawn into {options.plot}", file=sys.stderr)
    return 0


def make_plan(options: PlanOptions) -> Plan:
    """Traces what was asked and, if it does not fit or the options say so, what else there is."""
    memory, work = parse_memory(options.gpu_memory), workload(options)
    rates = _rates(options)
    # those that are traced whatever the others say can be traced at the same time
    others = list(changes(work))
    sure = others[: _sure(others, work)] if options.alternatives else []
    tried = list(in_processes(_tried, [("", work), *sure]))
    remedy = None
    if not fits(tried[0].report, memory):
        remedy = next((a for a in tried[1:] if fits(a.report, memory)), None)
        if remedy is None:
            remedy = _first_that_fits(others[len(sure) :], tried, memory)
    theirs, why = _trace_trl(work) if options.trl else (None, None)
    plan = Plan(memory, tried, remedy, theirs, why)
    if rates is None:
        return plan
    layout = Layout(options.gpus, options.nodes)
    try:
        time = step_time((plan.chosen or plan.asked).work, sizes_of(work.model), rates, layout)
    except ValueError as error:
        return dataclasses.replace(plan, no_time=str(error))
    return dataclasses.replace(plan, time=time)


def _rates(options: PlanOptions) -> Rates | None:
    """What the seconds of a step are reckoned with, if they were asked for.

    Raises:
        ValueError: GPUs that do not fill the nodes, a card that is not known, or no rate.
    """
    if options.gpus % options.nodes:
        raise ValueError(f"--nodes {options.nodes}: expected a divisor of --gpus {options.gpus}")
    own = (options.tflops, options.nvlink_gbs, options.interconnect_gbs)
    if options.gpus == 1 and options.card is None and own == (None, None, None):
        return None
    return rates_of(options.card or DEFAULT_CARD, *own)


def _first_that_fits(
    others: list[tuple[str, Workload]], tried: list[Alternative], memory: int
) -> Alternative | None:
    """Traces one after the other, those that can fit, into `tried`."""
    weights = _weights(tried[0].work)
    for change, changed in others:
        if _floor(changed, weights) / changed.gpus + HEADROOM <= memory:
            tried.append(_tried((change, changed)))
            if fits(tried[-1].report, memory):
                return tried[-1]
    return None


def _sure(others: list[tuple[str, Workload]], work: Workload) -> int:
    """How many of the changes, from the first on, are traced whatever the others say: all but those
    that go on making the batch of the last one smaller."""
    adapted = [w.lora_rank is not None and w.tokens < work.tokens for _, w in others]
    return adapted.index(True) if True in adapted else len(others)


def _tried(asked: tuple[str, Workload]) -> Alternative:
    change, work = asked
    report, why = _traced(change or "as asked", trace_rank, work)
    return Alternative(change, work, report, why)


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
    lora_dtype = options.lora_dtype or ("bfloat16" if options.base_bits == 4 else "float32")
    training |= _autocast(options.dtype, options.lora_rank, lora_dtype)
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


def _autocast(dtype: str, rank: int | None, lora_dtype: str) -> dict[str, Any]:
    """fp32 weights, of a model or of its adapters, are computed with in bf16."""
    return {"bf16": dtype == "float32" or (rank is not None and lora_dtype == "float32")}


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
    then the optimizer, then what is trained, then the batch. With several GPUs a smaller batch of
    all weights comes before adapters, and the 8-bit optimizer, which has no step on shards, is left
    out."""
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
        if find_spec("bitsandbytes") and work.gpus == 1:
            optim = {"optim": "adamw_bnb_8bit"}
            yield "--gradient_release true --optim adamw_bnb_8bit", _with(work, _RELEASE | optim)
        optim = {"optim": "adafactor"}
        change = "--gradient_release true --optim adafactor"
        yield change, _with(work, _RELEASE | optim)
        fewer = work.tokens // 2
        if work.gpus > 1 and fewer >= 256 * work.pairs:
            yield f"{change} --tokens {fewer}", _with(work, _RELEASE | optim, tokens=fewer)
    if not find_spec("peft"):
        return
    rank = 16 if work.lora_rank is None else work.lora_rank
    adamw = {**_NO_RELEASE, "optim": "adamw_torch_fused"}
    if full:
        autocast = _autocast(work.dtype, rank, "float32")
        lora = _with(work, {**adamw, **autocast}, lora_rank=rank, lora_dtype="float32")
        yield f"--lora_rank {rank}", lora
    if work.base_bits == 16 and find_spec("bitsandbytes"):
        few = {**adamw, **_autocast(work.dtype, rank, "bfloat16")}
        work = _with(work, few, lora_rank=rank, base_bits=4, lora_dtype="bfloat16")
        yield f"--lora_rank {rank} --base_bits 4", work
    arguments = f"--lora_rank {rank} --base_bits {work.base_bits}"
    while work.tokens >= 512 * work.pairs:
        work = dataclasses.replace(work, tokens=work.tokens // 2)
        yield f"{arguments} --tokens {work.tokens}", work


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


def fits(report: MemoryReport, memory: int) -> bool:
    return report.peak + HEADROOM <= memory


def _traced(what: str, function: Callable[[Workload], Any], work: Workload) -> Any:
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
