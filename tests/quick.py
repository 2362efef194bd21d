"""What a short training or an interpreted kernel takes beside its work, once or not at all: what
other packages find out again and again, and the disk. No result is another one."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
from typing import Any


def wait_for_no_disk() -> None:
    """fsync takes 19 ms on a virtual machine, and every file of a checkpoint has one. What it is
    for, a power cut, no test can try; that it is called, tests/training/test_checkpoints.py does.
    """
    os.fsync = lambda descriptor: None


def look_up_packages_once() -> None:
    """accelerate reads a package's metadata at every `is_peft_available()`, forty times a training:
    8% of one of eight steps."""
    from accelerate.utils import imports

    if not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = functools.cache(imports._is_package_available)


def read_gguf_once() -> None:
    """gguf's reader makes an array of each of SmolLM2's tokens and merges: 2 s at every load."""
    import gguf

    own = gguf.GGUFReader
    if isinstance(own, type):
        kept: dict[str, Any] = {}
        gguf.GGUFReader = lambda path: kept.get(str(path)) or kept.setdefault(str(path), own(path))


def fork_arms() -> str:
    """How the arms of a benchmark are started: as forks of one process, of a test's own, that has
    imported what they import, which takes each 6 s."""
    imports = ["benchmarks.step_arm", "tralign_fast.training.trainer", "trl.trainer.dpo_trainer"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(imports)
    return "forkserver"


@functools.cache
def _builtins_of(package: Any) -> list[str]:
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def quicken_interpreter() -> None:
    """Triton's interpreter looks up at every call of a device function what of triton.language it
    must replace, which it has replaced at the launch, and at every operation makes a table of
    NumPy's types: together half of the time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    replaced = set()  # in this launch, by modules of functions
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    numpys, look_up = {}, interpreter._get_np_dtype

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function):
        if id(function.__globals__) not in replaced:
            replaced.add(id(function.__globals__))
            return patch(function)  # of the kernel itself, what undoes it

    def patch_builtin(package, *rest):
        for name in _builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    def get_np_dtype(dtype):
        if dtype.name not in numpys:
            numpys[dtype.name] = look_up(dtype)
        return numpys[dtype.name]

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang, interpreter._patch_builtin = patch_once, patch_builtin
    interpreter._get_np_dtype = get_np_dtype
