"""`train --num_processes N --parallel ddp|fsdp2|zero3`: processes of this machine, by accelerate.

The run starts again in each of them, with the options of `recipes/parallel/<name>.yaml` under its
own. What a rank refuses is said by one of them (`cli._say_once`), and the launcher, which would
add a page of its own to it, says nothing.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from typing import Any

from tralign_fast.distributed.presets import preset
from tralign_fast.ops.backend import warn_once

# in which launchers say how many processes there are, as accelerate reads them
_WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def in_rank() -> bool:
    """Whether this is one of several processes that a launcher has started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_asked_for(processes: int | None, parallel: str | None) -> bool:
    return (processes is not None and processes > 1) and not in_rank()


def check_processes(processes: int | None, parallel: str | None) -> None:
    """Looks at what a process that starts no others was asked for.

    Raises:
        ValueError: it is alone, and shards were asked for.
    """
    world = next((int(os.environ[name]) for name in _WORLDS if name in os.environ), None)
    if parallel == "fsdp2" and world is None:
        raise ValueError(
            "parallel=fsdp2: expected several processes to shard weights over, got one; add "
            "--num_processes, or leave it out"
        )
    if processes is not None and world not in (None, processes):
        warn_once(f"num_processes={processes} has no effect: a launcher has started {world}")


def options_of(parallel: str | None) -> dict[str, Any]:
    """What a way to share the work sets in a `TRConfig`.

    Raises:
        ValueError: it needs a package that is not installed.
    """
    if parallel is None or parallel == "ddp":
        return {}
    if parallel == "zero3" and find_spec("deepspeed") is None:
        raise ValueError("parallel=zero3: DeepSpeed is not installed: pip install deepspeed")
    return preset(parallel)


def launch(processes: int, parallel: str, arguments: list[str]) -> int:
    """Starts `train` with these arguments in so many processes; the exit code is that of one that
    ended by itself.

    Raises:
        ValueError: as `options_of`.
    """
    options_of(parallel)
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = accelerate.launch_command_parser()
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // processes)
    args = parser.parse_args([
        "--multi_gpu", "--num_cpu_threads_per_process", str(threads),
        "--num_machines", "1", "--num_processes", str(processes),
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--module", "tralign_fast.cli", "train", *arguments,
    ])  # fmt: skip
    _keep_quiet()
    try:
        accelerate.multi_gpu_launcher(args)
    except ChildFailedError as error:
        return code_of([failure.exitcode for failure in error.failures.values()])
    except SignalException as end:  # sent to the launcher, which has passed it on
        return 128 + end.sigval
    return 0


def code_of(codes: list[int]) -> int:
    """Of processes of which one ended by itself and the launcher ended the rest (SIGTERM)."""
    own = [code for code in codes if code > 0]
    return max(own) if own else max(128 - code for code in codes)


def quieten_other_ranks() -> None:
    """Of the processes of a machine the first warns and shows progress for all."""
    if not in_rank() or os.environ.get("LOCAL_RANK", "0") == "0":
        return
    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _keep_quiet() -> None:
    """The launcher's own words on a rank that ended: the rank has said why."""
    if os.environ.get("TORCH_CPP_LOG_LEVEL") or os.environ.get("ACCELERATE_DEBUG_MODE"):
        return
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
