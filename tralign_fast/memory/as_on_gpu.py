"""The paths of a GPU on a machine that has none.

Fake tensors of a device that torch was not built for cannot run a backward, so the tensors say
"cpu", and the few places where this library, torch and TRL look at the device are told that it is a
GPU: variable-length attention, one logits tile of `logits_budget_mb`, Triton's kernel of product
and reduction and its in-place tile operations (which allocate nothing), foreach optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tralign_fast.memory.live import LiveTensors
from tralign_fast.model import attention, scoring
from tralign_fast.ops import ema, logprobs, tiles


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take the code paths of tensors on a GPU."""

    def varlen(query: Tensor, options: Any) -> Any:
        usable = query.dtype != torch.float32 and attention._torch_varlen_parameters()
        return attention._torch_varlen if usable else None

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Triton's operations on tiles and reference weights: in place, no allocation."""

    def tile_operations(*_: Any) -> Any:
        return nothing, nothing

    def devices() -> list[str]:
        return ["cpu", "cuda"]

    with (
        mock.patch.object(attention, "_varlen_function", varlen),
        mock.patch.object(tiles, "CPU_TILE_BYTES", dict.fromkeys((2, 4, 8), 1 << 62)),
        mock.patch.object(logprobs, "tile_ops", tile_operations),
        mock.patch.object(logprobs, "_is_fused", return_value=True),
        mock.patch.object(logprobs, "_fused_forward_", nothing),
        mock.patch.object(ema, "_foreach_update_", nothing),
        mock.patch.object(scoring, "split_tied_weight", return_value=contextlib.nullcontext()),
        mock.patch.object(torch_optimizer, "_get_foreach_kernels_supported_devices", devices),
    ):
        yield


@contextlib.contextmanager
def trl_as_on_gpu() -> Iterator[None]:
    """TRL's chunked LM head: Triton tile operations, and cuBLAS products with an fp32 sum."""
    from trl.kernels import chunked_logprob

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Triton's tile operations, and a product added to its sum by cuBLAS."""

    def yes(device: torch.device) -> bool:
        return True

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return nothing

    function = chunked_logprob.ChunkedLogProbFunction

    def tagged(method: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            live = _innermost_counter()
            with live.tagging("logits tile"):
                return method(*args)

        return staticmethod(call)

    with (
        mock.patch.object(chunked_logprob, "_use_triton", yes),
        mock.patch.object(chunked_logprob, "_forward_kernel", Kernel()),
        mock.patch.object(chunked_logprob, "_backward_kernel", Kernel()),
        mock.patch.object(chunked_logprob, "_addmm_fp32", nothing),
        mock.patch.object(function, "forward", tagged(function.forward)),
        mock.patch.object(function, "backward", tagged(function.backward)),
    ):
        yield


def _innermost_counter() -> LiveTensors:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, LiveTensors)]
    return modes[-1]


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have no data, and models of them can be moved and copied."""
    with (
        FakeTensorMode(),
        mock.patch.object(nn.Module, "_apply", _apply),
        # a copied model stays in this mode
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda m, _: m, create=True),
    ):
        yield


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
