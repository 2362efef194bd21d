"""How few layers need checkpointing: what memory is left over keeps activations of the others."""

from __future__ import annotations

from tralign_fast.memory.changes import depth_of, floor_of, weights_of
from tralign_fast.memory.layers import by_layers, checkpointing, trace_deep
from tralign_fast.memory.plan_answer import HEADROOM, Fewer, fits
from tralign_fast.memory.sharding import OTHERWISE
from tralign_fast.memory.step_flops import sizes_of
from tralign_fast.memory.time_model import Layout, Rates, step_time
from tralign_fast.memory.workload import Workload


def may_checkpoint_fewer(work: Workload, memory: int) -> bool:
    """Whether all layers are checkpointed, and the work can fit the memory so."""
    options = work.options
    if not options["gradient_checkpointing"]:
        return False
    if options.get("gradient_checkpointing_layers") is not None:
        return False
    return floor_of(work, weights_of(work)) / work.gpus + HEADROOM <= memory


def fewest_checkpointed(
    work: Workload, memory: int, rates: Rates, layout: Layout, card: str
) -> Fewer | None:
    """The smallest number with which the work fits, from traces of one and of all but one; None:
    it fits with no fewer than all, or the model is not regular enough."""
    try:
        peaks = by_layers(work, lambda report: fits(report, memory))
    except (ValueError, *OTHERWISE):  # what was asked says so, in its own trace
        return None
    if peaks is None:
        return None
    layers = next(n for n in range(1, depth_of(work)) if fits(peaks(n), memory))
    report, change = peaks(layers), f"--gradient_checkpointing_layers {layers}"
    if layers == 1 and fits(none := trace_deep(checkpointing(work, 0)), memory):
        layers, report, change = 0, none, "--gradient_checkpointing false"
    try:
        sizes = sizes_of(work.model)
        seconds, asked = (
            step_time(each, sizes, rates, layout).total
            for each in (checkpointing(work, layers), work)
        )
    except ValueError:  # a mixture of experts
        return Fewer(change, report, card)
    return Fewer(change, report, card, seconds, asked)
