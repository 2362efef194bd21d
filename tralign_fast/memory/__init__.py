"""Peak memory of a real training step, traced without the memory.

The trainer itself runs, `TRTrainer.train()` from the dataloader to the optimizer and the update of
the reference, under `FakeTensorMode`: tensors have shapes and storages but no data. A dispatch mode
counts the storages that are alive. What it sees is tensors: not the allocator's fragmentation, nor
the workspaces of kernels, nor the CUDA context (about 0.5 GiB).

    with LiveTensors() as live:      # of real tensors too: how the tracer is checked
        ...
    live.report().peak

`measure` runs the same on a GPU, with data.
"""

from tralign_fast.extras import explained

try:
    from tralign_fast.memory.live import LiveTensors, MemoryReport
    from tralign_fast.memory.measure import Measured, measure
    from tralign_fast.memory.trace import trace, trace_trl
    from tralign_fast.memory.workload import Workload
except ModuleNotFoundError as error:
    raise explained(__name__, error) from None

__all__ = [
    "LiveTensors",
    "Measured",
    "MemoryReport",
    "Workload",
    "measure",
    "trace",
    "trace_trl",
]
