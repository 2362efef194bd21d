"""What `tralign-fast plan` answers."""

from __future__ import annotations

from dataclasses import dataclass

from tralign_fast.memory.live import MemoryReport
from tralign_fast.memory.time_model import StepTime
from tralign_fast.memory.workload import Workload

GIB = 1 << 30
# What a trace of tensors does not see: the CUDA context, workspaces of kernels, fragmentation.
HEADROOM = GIB
NOTE = (
    "Traced tensors only: neither the allocator's fragmentation nor kernel workspaces nor the CUDA "
    "context, for which 1 GiB is left."
)


@dataclass(frozen=True)
class Alternative:
    """A change of the work and what it holds; `change` is empty for what was asked."""

    change: str
    work: Workload
    report: MemoryReport
    no_trace: str | None = None  # why the report of several GPUs is arithmetic


@dataclass(frozen=True)
class Fewer:
    """The fewest checkpointed layers with which what was asked still fits."""

    change: str
    report: MemoryReport
    card: str
    seconds: float | None = None  # of a step, by the model; None: there is none
    asked: float | None = None  # of one that checkpoints all layers


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
    fewer: Fewer | None = None

    @property
    def asked(self) -> Alternative:
        return self.tried[0]

    @property
    def chosen(self) -> Alternative | None:
        """What fits: as it was asked, or changed."""
        return self.asked if fits(self.asked.report, self.memory) else self.remedy


def fits(report: MemoryReport, memory: int) -> bool:
    return report.peak + HEADROOM <= memory
