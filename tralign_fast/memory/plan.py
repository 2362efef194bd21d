"""`tralign-fast plan`: does a training fit a GPU, what makes it fit, and with which command."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from tralign_fast.memory.changes import (
    NO_RELEASE,
    changes,
    floor_of,
    weights_of,
    with_options,
)
from tralign_fast.memory.fewer_checkpointed import fewest_checkpointed, may_checkpoint_fewer
from tralign_fast.memory.forked import in_processes
from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.plan_answer import HEADROOM, Alternative, Fewer, Plan, fits
from tralign_fast.memory.plan_options import PlanOptions, parse_memory, workload
from tralign_fast.memory.plan_plot import check_plot, save_plot
from tralign_fast.memory.plan_text import as_json, as_text
from tralign_fast.memory.sharding import trace_rank
from tralign_fast.memory.step_flops import sizes_of
from tralign_fast.memory.time_model import DEFAULT_CARD, Layout, Rates, rates_of, step_time
from tralign_fast.memory.trace import trace_trl
from tralign_fast.memory.workload import Workload


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ValueError: an option that cannot be; the message names it and what was expected.
    """
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
    layout, card = Layout(options.gpus, options.nodes), options.card or DEFAULT_CARD
    jobs: list[Any] = [functools.partial(_tried, each) for each in [("", work), *sure]]
    if asks := options.alternatives and may_checkpoint_fewer(work, memory):
        jobs.append(functools.partial(_fewer, work, memory, rates or rates_of(card), layout, card))
    tried = list(in_processes(_done, jobs))
    fewer = tried.pop() if asks else None
    remedy = None
    if not fits(tried[0].report, memory):
        remedy = next((a for a in tried[1:] if fits(a.report, memory)), None)
        if remedy is None:
            remedy = _first_that_fits(others[len(sure) :], tried, memory)
    theirs, why = _trace_trl(work) if options.trl else (None, None)
    plan = Plan(memory, tried, remedy, theirs, why, fewer=fewer)
    if rates is None:
        return plan
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
    weights = weights_of(tried[0].work)
    for change, changed in others:
        if floor_of(changed, weights) / changed.gpus + HEADROOM <= memory:
            tried.append(_tried((change, changed)))
            if fits(tried[-1].report, memory):
                return tried[-1]
    return None


def _sure(others: list[tuple[str, Workload]], work: Workload) -> int:
    """How many of the changes, from the first on, are traced whatever the others say: all but those
    that go on making the batch of the last one smaller."""
    adapted = [w.lora_rank is not None and w.tokens < work.tokens for _, w in others]
    return adapted.index(True) if True in adapted else len(others)


def _done(job: Callable[[], Any]) -> Any:
    return job()


def _fewer(*arguments: Any) -> Fewer | None:
    return _traced("fewer checkpointed layers", lambda _: fewest_checkpointed(*arguments), None)


def _tried(asked: tuple[str, Workload]) -> Alternative:
    change, work = asked
    report, why = _traced(change or "as asked", trace_rank, work)
    return Alternative(change, work, report, why)


def _traced(what: str, function: Callable[[Any], Any], work: Workload | None) -> Any:
    print(f"tracing {what} ...", file=sys.stderr, flush=True)
    return function(work)


def _trace_trl(work: Workload) -> tuple[MemoryReport | None, str | None]:
    """(TRL's figures, None), or (None, why there are none)."""
    if not find_spec("trl"):
        return None, "TRL not installed"
    if work.options.get("gradient_release"):  # which TRL has not
        work = with_options(work, NO_RELEASE)
    moving = work.options["sync_ref_model"] and work.lora_rank is not None
    frozen = "TRL moves no reference of a PEFT model: traced with a frozen one" if moving else None
    try:
        return _traced("TRL on the same work", trace_trl, work), frozen
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"TRL could not be traced: {reason}"
