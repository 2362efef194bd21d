"""What the GPU did during a profiled window, from the trace that torch's profiler exports."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ranges that annotate others ("gpu_user_annotation") are no events of the device
_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class DeviceWork:
    busy_s: float  # at least one kernel runs
    kernels: int
    events: int  # kernels, copies and fills


def device_work(events: Iterable[Mapping[str, Any]]) -> DeviceWork:
    """Of the events of a Chrome trace, whose times are in microseconds."""
    spans, others = [], 0
    for event in events:
        category = event.get("cat")
        if category == "kernel":
            spans.append((event["ts"], event["ts"] + event["dur"]))
        elif category in _EVENTS:
            others += 1
    busy, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return DeviceWork(busy / 1e6, len(spans), len(spans) + others)


class Profile:
    """Kernels alone are recorded: with the host's operators the host would be slower.

    Raises:
        RuntimeError: by `stop`, the profiler has seen no kernel.
    """

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.__enter__()

    def stop(self) -> DeviceWork:
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            work = device_work(json.loads(path.read_text())["traceEvents"])
        if work.kernels == 0:
            raise RuntimeError("the profiler has seen no kernel")
        return work
