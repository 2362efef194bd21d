"""fp32 matrix products on an AMD CPU, through oneDNN.

PyTorch gives fp32 products to MKL. On an AMD processor with AVX-512 MKL reaches 60 to 90% of the
throughput of oneDNN, which PyTorch ships too and uses for bf16: on two cores of an EPYC (Zen 4) a
306 × 576 by 576 × 13,706 product runs at 121 GFLOP/s with the one and 201 with the other, the
products of SmolLM2's layers at 149 to 190 and 187 to 212. Everywhere else PyTorch's choice stands,
and for long sums too: oneDNN adds up in one chain, MKL in blocks of a few hundred, so the rounding
of the one grows with the length of the sum and that of the other less (1.5 times MKL's error at 576
terms, twice at 1,536).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tralign_fast.ops.backend import device_kind

_LONGEST_SUM = 1024  # terms


@functools.cache
def is_faster() -> bool:
    """Whether this is such a processor, and this PyTorch has the operator."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.is_file()
        and "AuthenticAMD" in cpuinfo.read_text()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fits(a: Tensor, *others: Tensor | None) -> bool:
    """Whether `product(a, …)` of these is better off here: fp32, plain, on the CPU."""
    return (
        not torch.compiler.is_compiling()  # first: the graph of a compiled layer breaks at the rest
        and is_faster()
        and a.shape[-1] <= _LONGEST_SUM
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(t) in (Tensor, nn.Parameter)  # no fake tensor, no DTensor
            and device_kind(t.device) == "cpu"
            and t.dtype == torch.float32
            and t.numel() > 0
            for t in (a, *others)
            if t is not None
        )
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., N) = a (..., K) @ b (N, K)ᵀ + bias (N,), outside of autograd.

    Fast if `a` is contiguous; `b` may be the transpose of a contiguous tensor.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, gradients included."""
    return _Linear.apply(x, weight, bias) if fits(x, weight, bias) else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # no view, which adapters could not add to in place (AdaLoRA, C3A, aLoRA)
        return product(x, weight, bias).data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradients(x, weight, grad, ctx.needs_input_grad)


def gradients(
    x: Tensor | None,  # (..., K)
    weight: Tensor,  # (N, K)
    grad: Tensor,  # (..., N)
    needs: Sequence[bool],  # gradient of x, of weight, of bias
    through_onednn: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `linear`, or with `through_onednn` off those of PyTorch's own."""
    grad_x, grad_weight, grad_bias = None, None, None
    if needs[0]:
        short = through_onednn and grad.shape[-1] <= _LONGEST_SUM
        grad_x = product(grad.contiguous(), weight.t()) if short else grad @ weight
    rows = grad.flatten(0, -2)  # (M, N)
    if needs[1]:
        assert x is not None
        # MKL: oneDNN wants this transposed, which costs what it saves
        grad_weight = rows.t() @ x.flatten(0, -2)
    if needs[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias
