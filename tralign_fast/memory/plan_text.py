"""How a plan is printed: bars beside the card's line, what fits which card, the command."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import yaml

from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.plan_answer import GIB, HEADROOM, NOTE, Alternative, Fewer, Plan, fits
from tralign_fast.memory.plan_options import PlanOptions, hub_id
from tralign_fast.memory.time_model import DEFAULT_CARD, Layout
from tralign_fast.memory.time_model import as_text as time_text
from tralign_fast.memory.workload import Workload
from tralign_fast.ops.logits_budget import STANDARD_MB

CARDS = (12, 16, 24, 40, 48, 80, 141)  # GiB, as they are sold
_BAR = 40
_ROWS = [f.name for f in dataclasses.fields(MemoryReport)]
# options that a run has anyway
_DEFAULTS = {
    "loss_type": "dpo", "reference": "auto", "sync_ref_model": True,
    "logits_budget_mb": STANDARD_MB, "gradient_checkpointing": True, "gradient_release": False,
    "max_grad_norm": 1.0, "bf16": True,  # where there is a GPU
}  # fmt: skip


def recipe_of(options: PlanOptions, work: Workload) -> dict[str, Any]:
    """The options of `tralign-fast train` that make a run of that work."""
    pair = work.tokens // work.pairs
    recipe: dict[str, Any] = {
        "model": hub_id(options.model),
        "dataset": options.dataset,
        "output_dir": f"runs/{hub_id(options.model).rstrip('/').split('/')[-1].lower()}",
        "dtype": work.dtype,
        "per_device_train_batch_size": work.pairs,
        "max_length": pair - pair // 4,  # half of a pair is prompt, a quarter each completion
    }
    recipe |= {n: v for n, v in work.options.items() if _DEFAULTS.get(n) != v}
    if work.lora_rank is not None:
        recipe |= {"use_peft": True, "lora_r": work.lora_rank, "lora_alpha": work.lora_rank}
    if work.base_bits == 4:
        recipe["load_in_4bit"] = True
    if options.gpus > 1:
        recipe |= {"num_processes": options.gpus, "parallel": "fsdp2"}
    return recipe


def command_of(recipe: dict[str, Any], nodes: int = 1) -> str:
    """The same as a command line; on several machines one that each of them runs."""
    words = []
    start = "tralign-fast train"
    if nodes > 1:
        recipe = {**recipe}
        here = recipe.pop("num_processes") // nodes
        start = (
            f"torchrun --nnodes {nodes} --nproc_per_node {here} --rdzv_backend c10d \\\n  "
            "--rdzv_endpoint HOST:29500 -m tralign_fast train"
        )
    for name, value in recipe.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"--{name} {shlex.quote(text)}")
    return " \\\n  ".join([start, *words])


def as_json(options: PlanOptions, plan: Plan) -> dict[str, Any]:
    chosen = plan.chosen
    recipe = None if chosen is None else recipe_of(options, chosen.work)
    remedy = plan.remedy
    return {
        "setup": {k: v for k, v in dataclasses.asdict(options).items() if k != "more"},
        "gpu_memory": plan.memory,
        "headroom": HEADROOM,
        "tralign_fast": dataclasses.asdict(plan.asked.report),
        "trl": None if plan.theirs is None else dataclasses.asdict(plan.theirs),
        "trl_note": plan.why,
        "fits": fits(plan.asked.report, plan.memory),
        "remedy": remedy and {
            "change": remedy.change, "tralign_fast": dataclasses.asdict(remedy.report)
        },
        "fewer_checkpointed": plan.fewer and dataclasses.asdict(plan.fewer),
        "alternatives": {a.change: a.report.peak for a in plan.tried[1:]},
        "cards": {str(card): a and (a.change or "as asked") for card, a in by_card(plan).items()},
        "time": plan.time and dataclasses.asdict(plan.time),
        "time_note": plan.no_time,
        "recipe": recipe,
        "command": recipe and command_of(recipe, options.nodes),
        "note": NOTE,
        "arithmetic": {a.change or "as asked": a.no_trace for a in plan.tried if a.no_trace},
    }  # fmt: skip


def by_card(plan: Plan) -> dict[int, Alternative | None]:
    """Card in GiB -> the first of what was tried that fits it."""
    return {
        card: next((a for a in plan.tried if fits(a.report, card * GIB)), None) for card in CARDS
    }


def as_text(options: PlanOptions, plan: Plan) -> str:
    parts = [_table(plan)]
    if plan.why:
        parts.append(plan.why)
    parts += ["", _bars(plan), "", _cards(plan), "", _answer(options, plan)]
    if plan.fewer is not None:
        parts.append(_room(plan.fewer))
    if plan.time is not None:
        layout, card = Layout(options.gpus, options.nodes), options.card or DEFAULT_CARD
        parts += ["", time_text(plan.time, layout, card)]
    if plan.no_time is not None:
        parts += ["", f"no seconds of a step: {plan.no_time}"]
    if plan.chosen is not None:
        recipe = recipe_of(options, plan.chosen.work)
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        parts += [
            "",
            command_of(recipe, options.nodes),
            "",
            "the same as a recipe (train --config FILE):",
            "",
            text,
        ]
    return "\n".join([*parts, NOTE, *_of_several(options, plan)])


def _of_several(options: PlanOptions, plan: Plan) -> list[str]:
    """How the figures of one of several GPUs were found."""
    if options.gpus == 1:
        return []
    arithmetic: dict[str, list[str]] = {}
    for tried in plan.tried:
        if tried.no_trace is not None:
            arithmetic.setdefault(tried.no_trace, []).append(tried.change or "as asked")
    lines = [f"by arithmetic, not traced ({why}): {', '.join(w)}" for why, w in arithmetic.items()]
    if len(arithmetic) < len(plan.tried):
        lines.append(
            f"Each of {options.gpus} GPUs: the first one's step under FSDP2 is traced, without the "
            "buffers that NCCL holds."
        )
    if any(tried.work.base_bits == 4 for tried in plan.tried):
        lines.append("A 4-bit base is whole on every GPU, unless bnb_4bit_quant_storage is set.")
    return lines


def _table(plan: Plan) -> str:
    columns = {"as asked": plan.asked.report}
    if plan.theirs is not None:
        columns["TRL"] = plan.theirs
    if plan.remedy is not None:
        columns["changed"] = plan.remedy.report
    lines = [f"{'GiB':<14}" + "".join(f"{name:>14}" for name in columns)]
    for row in _ROWS:
        if row == "gathered" and not any(r.gathered for r in columns.values()):
            continue  # one GPU
        values = "".join(f"{getattr(r, row) / GIB:>14.2f}" for r in columns.values())
        lines.append(f"{row.replace('_', ' '):<14}{values}")
    lines.insert(-1, "-" * len(lines[0]))
    return "\n".join(lines)


def _bars(plan: Plan) -> str:
    """A bar of each alternative, its 1 GiB of headroom shaded, and the card's line through all."""
    most = max([plan.memory, *(a.report.peak + HEADROOM for a in plan.tried)])
    line = min(_BAR - 1, int(plan.memory / most * _BAR))
    width = max(len(a.change or "as asked") for a in plan.tried)
    rows = []
    for tried in plan.tried:
        peak = round(tried.report.peak / most * _BAR)
        whole = round((tried.report.peak + HEADROOM) / most * _BAR)
        bar = ["█" * peak + "░" * (whole - peak)][0].ljust(_BAR)
        bar = bar[:line] + "│" + bar[line + 1 :]
        mark = "fits" if fits(tried.report, plan.memory) else ""
        name = tried.change or "as asked"
        rows.append(f"{name:<{width}}  {bar} {tried.report.peak / GIB:7.2f} GiB  {mark}".rstrip())
    under = " " * (width + 2 + line) + f"└ {plan.memory / GIB:g} GiB"
    return "\n".join([*rows, under])


def _cards(plan: Plan) -> str:
    lines = ["card     the first of these that fits"]
    for card, found in by_card(plan).items():
        text = "none" if found is None else f"{found.change or 'as asked'}"
        peak = "" if found is None else f" ({found.report.peak / GIB:.1f} GiB)"
        lines.append(f"{card:>3} GiB  {text}{peak}")
    return "\n".join(lines)


def _room(fewer: Fewer) -> str:
    """What the memory that is left over is good for."""
    line = f"room for activations: {fewer.change} holds {fewer.report.peak / GIB:.2f} GiB"
    if fewer.seconds is None or fewer.asked is None:
        return line
    return (
        f"{line}; a step takes {fewer.seconds:.3f} s in place of {fewer.asked:.3f} ({fewer.card}, "
        "a model: docs/scaling.md)"
    )


def _answer(options: PlanOptions, plan: Plan) -> str:
    gpus = f" on each of {options.gpus} GPUs" if options.gpus > 1 else ""
    what = f"{options.model}, {options.pairs} pairs, {options.tokens} packed tokens{gpus}"
    if fits(plan.asked.report, plan.memory):
        return f"fits {plan.memory / GIB:g} GiB: {what}"
    if plan.remedy is not None:
        fix = plan.remedy.change
        return f"does not fit {plan.memory / GIB:g} GiB: {what}; it fits with {fix}"
    return f"does not fit {plan.memory / GIB:g} GiB: {what}; no change that was tried fits"
