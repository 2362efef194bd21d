"""Several traces at a time: each in a copy of this process, which has imported all it needs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from tralign_fast.ops.backend import warn_once

_LEAST = 2  # fewer are not worth a process


def in_processes(function: Callable[[Any], Any], work: Sequence[Any]) -> Iterator[Any]:
    """`map(function, work)`, in as many processes as there are cores for it, if that is safe here.

    A process is copied only where no thread but this one runs, whose locks would stay locked in the
    copy, and where no GPU is in use, which a copy cannot share. What one fails at, or dies of, is
    left to this process, and all after it.

    Args:
        function: at a module's top, with what it returns picklable.

    Raises:
        Exception: the first that `function` raises.
    """
    processes = min(len(work), _cores())
    done = 0
    if processes >= _LEAST and _can_fork():
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, context, initializer=_begin) as pool:
            found = pool.map(function, work)
            try:
                for result in found:
                    yield result
                    done += 1
            except BrokenProcessPool:  # killed for memory
                warn_once(
                    "plan: a process that traced an alternative ended: the rest is traced one "
                    "after the other"
                )
            except Exception:  # its own error, which is raised below, with its traceback
                pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    yield from map(function, work[done:])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_fork() -> bool:
    return (
        os.name == "posix"
        and "fork" in multiprocessing.get_all_start_methods()
        and os.uname().sysname == "Linux"  # the libraries of macOS start threads of their own
        and threading.active_count() == 1
        and not torch.cuda.is_initialized()
    )


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and the parent says so
    torch.set_num_threads(1)
