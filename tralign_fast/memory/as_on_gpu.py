"""The paths of a GPU on a machine that has none.

Fake tensors of a device that torch was not built for cannot run a backward, so the tensors say
"cpu". This library asks `ops.backend` for the device, which pretends; the few places where torch
and TRL look at it themselves are patched: foreach optimizers, TRL's Triton kernels. Liger's write
what was allocated before them, and do nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tralign_fast.memory.live import LiveTensors
from tralign_fast.ops.backend import pretend_gpu


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take the code paths of tensors on a GPU."""
    with pretend_gpu(), _patched(*_TORCH, *_liger()):
        yield


@contextlib.contextmanager
def trl_as_on_gpu() -> Iterator[None]:
    """TRL's chunked LM head: Triton tile operations, and cuBLAS products with an fp32 sum."""
    from trl.kernels import chunked_logprob as head

    function = head.ChunkedLogProbFunction
    with _patched(
        (head, "_use_triton", lambda device: True),
        (head, "_forward_kernel", _Kernel()),
        (head, "_backward_kernel", _Kernel()),
        (head, "_addmm_fp32", _do_nothing),
        (function, "forward", staticmethod(_tagged(function.forward))),
        (function, "backward", staticmethod(_tagged(function.backward))),
    ):
        yield


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have no data, and models of them can be moved and copied."""
    with FakeTensorMode(), _patched(*_FAKE):
        yield


@contextlib.contextmanager
def _patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """What torch and TRL look at has other values inside."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            create = name == "__deepcopy__"  # the others are there, or their owner has changed
            stack.enter_context(mock.patch.object(owner, name, value, create=create))
        yield


def _liger() -> list[tuple[Any, str, Any]]:
    if importlib.util.find_spec("liger_kernel") is None:
        return []
    try:
        from tralign_fast.model.liger_ops import kernels
    except Exception:  # one that cannot be imported is not used either, which is said there
        return []
    return [(module, name, _LigerKernel()) for module, name in kernels()]


class _Kernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return _do_nothing


class _LigerKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return launch_liger


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """TRL's tile operations in Triton, and a product added to its sum by cuBLAS."""


def launch_liger(*args: Any, **kwargs: Any) -> None:
    """In place of a launch of a kernel of Liger's."""


def _tagged(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _innermost_counter().tagging("logits tile"):
            return method(*args)

    return call


def _innermost_counter() -> LiveTensors:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, LiveTensors)]
    return modes[-1]


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`Module.to` for fake parameters: torch's swaps objects, and refuses where a weak reference
    is held, as fake tensors hold one."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = function(parameter)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


_TORCH = ((torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: ["cpu", "cuda"]),)
_FAKE = (
    (nn.Module, "_apply", _apply),
    (FakeTensorMode, "__deepcopy__", lambda mode, _: mode),  # a copied model stays in this mode
)
