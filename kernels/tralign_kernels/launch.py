"""What the launchers share: where a kernel runs, and with which tile."""

import contextlib
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Interpreted kernels compute on the host, in NumPy, which has no bf16.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# How fp32 is multiplied (halves exactly; sums are fp32). NVIDIA's tensor cores do it as three
# products of TF32, of the leading 11 bits of a factor and the next 11: a relative error of about
# 2⁻²², where one product of TF32 would leave 2⁻¹¹. AMD's matrix cores take fp32 as it is.
FLOAT_PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "sm_100": "tf32x3", "gfx942": "ieee"}


class Launch(NamedTuple):
    """How an element-wise or row-wise kernel is launched on one family ("cuda" or "hip")."""

    block: int  # elements per iteration of a program
    num_warps: int


class DotLaunch(NamedTuple):
    """How a kernel built on a matrix product is launched on one architecture."""

    rows: int  # of the tile of the product that a program accumulates
    columns: int
    depth: int  # of the slices of both operands that are in flight
    num_warps: int
    num_stages: int
    tma: bool = False  # operands through tensor descriptors
    persistent: bool = False  # a program a multiprocessor, which takes work until none is left
    parts: int = 1  # 1 or 4: of the tile's columns, reduced one after the other


def backend() -> str:
    return "hip" if torch.version.hip else "cuda"


def architecture(device: torch.device) -> str:
    """The row of a launch table for `device`.

    Ampere's row is that of every other NVIDIA GPU too, consumer Blackwell (sm_120) included, which
    has neither the shared memory (99 KB) nor the tensor cores of sm_90 and sm_100.
    """
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


T = TypeVar("T")
_fastest: dict[Hashable, object] = {}


def pick(candidates: Sequence[T], key: Hashable, run: Callable[[T], object]) -> T:
    """The first of `candidates`; with TRALIGN_AUTOTUNE=1 the one whose `run` is fastest.

    Timed once a `key` and process. Off by default: timing stalls the first step of every shape, and
    another tile folds in another order, so that two runs could differ in their last bits.
    """
    if len(candidates) == 1 or os.environ.get("TRALIGN_AUTOTUNE") != "1" or INTERPRETED.value:
        return candidates[0]
    if key not in _fastest:

        def milliseconds(candidate: T) -> Any:
            return triton.testing.do_bench(lambda: run(candidate), return_mode="median")

        _fastest[key] = min(candidates, key=milliseconds)
    return _fastest[key]  # pyright: ignore[reportReturnType]


@triton.jit
def exp(x):
    """exp(x) in fp32, 0 where that is below 2⁻¹²⁶.

    `tl.exp` keeps such numbers: on NVIDIA by three more instructions beside the product and the
    power of two (a comparison and two products), on AMD by as many.
    """
    if INTERPRETED:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * 1.4426950408889634)  # as `tl.exp` does, rounding x·log₂e
    return result


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, accumulated in fp32. `PRECISION`: of fp32 operands (of halves it is exact)."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
