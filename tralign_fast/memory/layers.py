"""The peak of a deep model from two shallow ones.

Decoder layers are alike, so that what is alive at a given moment of a step, such as "layer i has
its gradients", is a + b·L + c·i bytes in a model of L layers. The peak over all moments is no such
line (a shallow model has it at the head's logits, a deep one at the optimizer's step); each moment
is. So every moment of runs with 5 and 7 layers is drawn out to L, and the largest is the peak.

A moment is a line in the number N of checkpointed layers, too, between a run that checkpoints one
and a run that checkpoints all but one. Only in the backward of those N it is what the latter has
there: what the other layers kept is gone by then.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from tralign_fast.memory.changes import depth_of, with_options
from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.trace import trace, trace_segments
from tralign_fast.memory.workload import Workload
from tralign_fast.model.checkpointed_layers import how_many

SHALLOW: dict[int | None, tuple[int, int]] = {
    1: (5, 7),
    2: (6, 8),
}  # by how many kinds of layers take turns
_LEAST = 16  # layers from which it is faster than the whole
_EDGE = 2  # layers at either end of a pass that may hold something of their own


def trace_deep(work: Workload) -> MemoryReport:
    """As `trace`, in the time of twelve layers; a model that is not so regular is traced whole.

    Raises:
        ValueError: as `trace`.
    """
    layers = checkpointed_of(work)
    if layers is not None and layers in (0, depth_of(work)):
        work = checkpointing(work, layers)
    elif layers is not None:
        peaks = by_layers(work)
        return trace(work) if peaks is None else peaks(layers)
    moments = _deep_moments(work)
    return trace(work) if moments is None else _peak(moments.values())


def checkpointed_of(work: Workload) -> int | None:
    """How many layers the work checkpoints of all; None: all or none, as it says.

    Raises:
        ValueError: more than there are.
    """
    layers = work.options.get("gradient_checkpointing_layers")
    if layers is None or not work.options.get("gradient_checkpointing", True):
        return None
    return how_many(layers, depth_of(work), type(work.model).__name__)


def checkpointing(work: Workload, layers: int) -> Workload:
    """The work with so many layers checkpointed, in the plainest words."""
    some = None if layers in (0, depth_of(work)) else layers
    options = {"gradient_checkpointing": layers > 0, "gradient_checkpointing_layers": some}
    return with_options(work, options)


def by_layers(
    work: Workload, goes_on: Callable[[MemoryReport], bool] = lambda _: True
) -> Callable[[int], MemoryReport] | None:
    """What the work holds if so many of its layers are checkpointed, at least one and not all;
    None: it has to be traced whole to know.

    The first layer and the last one are not as the others: the one's input is there anyway, and the
    other's MLP runs on scored rows alone. So the lines are drawn between one and all but one.

    Args:
        goes_on: asked with what it holds if all but one are; False: nothing else is wanted, and
            None is returned.

    Raises:
        ValueError: as `trace`.
    """
    most = _deep_moments(work, lambda depth: depth - 1)
    if most is None or not goes_on(_peak(most.values())):
        return None
    least = _deep_moments(work, lambda _: 1)
    if least is None or set(least) != set(most):
        return None

    def peak(count: int) -> MemoryReport:
        share = (count - 1) / (depth_of(work) - 2)
        lines = [_drawn(least[key], most[key], share) for key in most]
        again = (r for key, r in most.items() if key[1] == "last" and key[2] <= count)
        return _peak([*lines, *again])

    return peak


def _deep_moments(
    work: Workload, checkpointed: Callable[[int], int] | None = None
) -> dict[tuple[Any, ...], MemoryReport] | None:
    """Every moment of a run, from shallow ones; None: the model is not deep, or not so regular.

    Args:
        checkpointed: how many layers are, of so many; None: as the work says.
    """
    depth = getattr(work.model, "num_hidden_layers", 0)
    shallow = SHALLOW.get(_period(work.model))
    if depth < _LEAST or shallow is None:
        return None
    works = [with_layers(work, n) for n in shallow]
    if checkpointed is not None:
        works = [checkpointing(w, checkpointed(n)) for w, n in zip(works, shallow, strict=True)]
    less, more = (_moments(trace_segments(each)) for each in works)
    if set(less) != set(more):
        return None
    factor = (depth - shallow[0]) / (shallow[1] - shallow[0])
    return {key: _drawn(less[key], more[key], factor) for key in less}


def _peak(reports: Iterable[MemoryReport]) -> MemoryReport:
    return max(reports, key=lambda report: report.peak)


def with_layers(work: Workload, count: int) -> Workload:
    """The work with a model of so many decoder layers."""
    config = copy.deepcopy(work.model)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = count
    if kinds:
        config.layer_types = kinds[:count]
    return dataclasses.replace(work, model=config)


def _period(config: Any) -> int | None:
    """How many kinds of layers take turns; None: in no order."""
    kinds = getattr(config, "layer_types", None) or ["alike"]
    period = len(dict.fromkeys(kinds))
    return period if all(k == kinds[i % period] for i, k in enumerate(kinds)) else None


def _moments(
    segments: Iterable[tuple[Any, MemoryReport]],
) -> dict[tuple[Any, ...], MemoryReport]:
    """Peaks by (pass, which layer from its beginning or end, which segment of the layer).

    A pass visits layers upwards or downwards.
    """
    passes: list[list[tuple[int, list[MemoryReport]]]] = []
    direction, last = 0, None
    outside: list[MemoryReport] = []
    for label, report in segments:
        if label is None or label[1] is None:
            outside.append(report)
            continue
        layer = label[1]
        step = 0 if last is None else layer - last
        if last is None or abs(step) > 1 or (step and direction and step != direction):
            passes.append([])
            direction = 0
        direction = step or direction
        if not passes[-1] or passes[-1][-1][0] != layer:
            passes[-1].append((layer, []))
        passes[-1][-1][1].append(report)
        last = layer
    found: dict[tuple[Any, ...], MemoryReport] = {("outside", i): r for i, r in enumerate(outside)}
    for number, visited in enumerate(passes):
        count = len(visited)
        for place, (_, reports) in enumerate(visited):
            edge = ("first", place) if place < count / 2 else ("last", count - place)
            if edge[1] >= _EDGE + (edge[0] == "last"):
                continue
            for index, report in enumerate(reports):
                found[(number, *edge, index)] = report
    return found


def _drawn(less: MemoryReport, more: MemoryReport, factor: float) -> MemoryReport:
    names = [f.name for f in dataclasses.fields(MemoryReport) if f.name != "peak"]
    values = {}
    for name in names:
        low, high = getattr(less, name), getattr(more, name)
        values[name] = max(0, round(low + (high - low) * factor))
    return MemoryReport(**values, peak=sum(values.values()))
