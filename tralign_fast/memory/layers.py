"""The peak of a deep model from two shallow ones.

Decoder layers are alike, so that what is alive at a given moment of a step, such as "layer i has
its gradients", is a + b·L + c·i bytes in a model of L layers. The peak over all moments is no such
line (a shallow model has it at the head's logits, a deep one at the optimizer's step); each moment
is. So every moment of runs with 5 and 7 layers is drawn out to L, and the largest is the peak.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.trace import trace, trace_segments
from tralign_fast.memory.workload import Workload

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
    depth = getattr(work.model, "num_hidden_layers", 0)
    shallow = SHALLOW.get(_period(work.model))
    if depth < _LEAST or shallow is None:
        return trace(work)
    less, more = (_moments(trace_segments(with_layers(work, n))) for n in shallow)
    if set(less) != set(more):
        return trace(work)
    factor = (depth - shallow[0]) / (shallow[1] - shallow[0])
    drawn = [_drawn(less[key], more[key], factor) for key in less]
    return max(drawn, key=lambda report: report.peak)


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
