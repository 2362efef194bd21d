"""ref ← (1-α)·ref + α·(W + s·B·A) in place; B·A is never in device memory.

Letters: R rows and C columns of the weight, r the rank of the adapter, α the mixing weight, s the
adapter's scale (lora_alpha / r).

A program makes one tile of B·A in registers, r at a time, and moves the same tile of ref. All of B
and A is a hundredth of W, and stays in the L2 cache: the traffic is that of `ema_update_`.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import (
    LANES,
    TRITON_DTYPE,
    move,
    random_bits16,
    round_nearest,
    round_stochastic,
    signed_weight,
)
from .launch import FLOAT_PRECISION, DotLaunch, architecture, device_of, dot

# The product is short (r = 8 to 64, one or a few slices of depth) and the tile's traffic is what
# takes time: 32 elements a thread on NVIDIA, few enough that several programs share an SM. sm_90
# was timed: on an H200, (14336, 4096) bf16 at r = 16, 3.6 TB/s where 64×64 has 3.3 and a copy 4.2.
LORA_LAUNCH = {
    "sm_80": DotLaunch(64, 64, 16, 4, 1),
    "sm_90": DotLaunch(32, 128, 16, 4, 1),
    "sm_100": DotLaunch(64, 64, 16, 4, 1),
    "gfx942": DotLaunch(64, 64, 16, 4, 1),
}


@triton.jit(do_not_specialize=["seed"])
def _lora_merge_kernel(
    ref_ptr,  # (R, C), written
    weight_ptr,  # (R, C)
    a_ptr,  # (r, C)
    b_ptr,  # (R, r)
    R,
    C,
    rank,
    ref_stride,
    weight_stride,
    a_stride,
    b_stride,
    scale,
    weight,  # signed_weight(α)
    seed,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # columns vary fastest, so that programs that run together touch memory that lies together
    column_blocks = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // column_blocks * ROWS).to(tl.int64) + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < R, column < C
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, DEPTH):
        k = first + tl.arange(0, DEPTH)
        b = tl.load(
            b_ptr + row[:, None] * b_stride + k[None, :],
            mask=row_inside[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + k.to(tl.int64)[:, None] * a_stride + column[None, :],
            mask=(k < rank)[:, None] & column_inside[None, :],
            other=0.0,
        )
        product = dot(b, a, product, PRECISION)
    inside = row_inside[:, None] & column_inside[None, :]
    ref_ptr += row[:, None] * ref_stride + column[None, :]
    weight_ptr += row[:, None] * weight_stride + column[None, :]
    ref = tl.load(ref_ptr, mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
    theta = tl.fma(product, tl.full(product.shape, scale, tl.float32), theta)
    moved = move(ref, theta, weight)
    dtype: tl.constexpr = ref_ptr.dtype.element_ty
    if STOCHASTIC:
        # ⌈C/8⌉ counters a row: an element's bits depend on its place alone, not on the tile
        first = row * tl.cdiv(C, LANES) + tl.program_id(0) % column_blocks * (COLUMNS // LANES)
        counters = first[:, None] + tl.arange(0, COLUMNS // LANES)[None, :]
        noise = random_bits16(seed, counters, (ROWS, COLUMNS))  # pyright: ignore[reportArgumentType]
        result = round_stochastic(moved, noise, dtype)
    else:
        result = round_nearest(moved, dtype)
    tl.store(ref_ptr, result, mask=inside)


@torch.no_grad()
def lora_merge_(
    ref: Tensor,  # (R, C) fp32, bf16 or fp16, unit column stride, any row stride; written in place
    weight: Tensor,  # (R, C), likewise
    a: Tensor,  # (r, C) fp32, bf16 or fp16, likewise
    b: Tensor,  # (R, r) of A's dtype, likewise
    scale: float,
    alpha: float,
    *,
    rounding: Literal["nearest", "stochastic"],
    seed: int = 0,
) -> None:
    """`ref.lerp_(weight + scale * b @ a, alpha)` in fp32, rounded once, in one pass.

    α = 1 is the merged weight itself, rounded as the others. The product of an fp32 adapter is
    computed to fp32's precision (see `linear_logprob`). Traffic: ref and weight are read once, ref
    is written once; memory: none. The random bits follow from (seed, row, column).
    """
    R, C = ref.shape
    rank = a.shape[0]
    assert weight.shape == (R, C), (weight.shape, ref.shape)
    assert a.shape == (rank, C), (a.shape, ref.shape)
    assert b.shape == (R, rank), (b.shape, a.shape, ref.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert 0.0 <= alpha <= 1.0, alpha
    assert rounding in ("nearest", "stochastic"), rounding
    for tensor in (ref, weight, a, b):
        assert tensor.dtype in TRITON_DTYPE, tensor.dtype
        assert tensor.shape[1] <= 1 or tensor.stride(1) == 1, tensor.stride()
    if alpha == 0.0 or ref.numel() == 0:
        return
    name = architecture(ref.device)
    launch = LORA_LAUNCH[name]
    programs = triton.cdiv(R, launch.rows) * triton.cdiv(C, launch.columns)
    assert programs < 2**31, (R, C)
    with device_of(ref):
        _lora_merge_kernel[(programs,)](
            ref,
            weight,
            a,
            b,
            R,
            C,
            rank,
            ref.stride(0),
            weight.stride(0),
            a.stride(0),
            b.stride(0),
            float(scale),
            signed_weight(alpha),
            seed,
            STOCHASTIC=rounding == "stochastic" and ref.dtype != torch.float32,
            PRECISION=FLOAT_PRECISION[name],
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
            num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
        )


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """What `lora_merge_` launches on `backend`, as `ema.aot_configurations`.

    Of the dtypes: those of LoRA training, a weight and its reference of one dtype with an adapter
    of that dtype or of fp32. Aligned: C, r and the row strides are multiples of 16.
    """
    architectures = ["sm_80", "sm_90", "sm_100"] if backend == "cuda" else ["gfx942"]
    configurations = []
    for target in architectures:
        for base, adapter in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16",) * 2):
            for stochastic in (False, True) if base != "fp32" else (False,):
                for aligned in (True, False):
                    configurations.append(
                        _configuration(target, base, adapter, stochastic, aligned)
                    )
    return configurations


def _configuration(
    target: str, base: str, adapter: str, stochastic: bool, aligned: bool
) -> dict[str, Any]:
    launch = LORA_LAUNCH[target]
    constexprs = {
        "STOCHASTIC": stochastic,
        "PRECISION": FLOAT_PRECISION[target],
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
    }
    R = C = 4096
    rank, size = 16, {"fp32": 4, "bf16": 2, "fp16": 2}
    name = f"lora_merge {base}<-{adapter}" + (" stochastic" if stochastic else " nearest")
    divisible = (*range(4), 5, 6, 7, 8, 9, 10) if aligned else range(4)
    return {
        "name": name + " unaligned" * (not aligned),
        "targets": (target,),
        "fn": _lora_merge_kernel,
        "signature": {
            "ref_ptr": f"*{base}",
            "weight_ptr": f"*{base}",
            "a_ptr": f"*{adapter}",
            "b_ptr": f"*{adapter}",
            "R": "i32",
            "C": "i32",
            "rank": "i32",
            **dict.fromkeys(("ref_stride", "weight_stride", "a_stride", "b_stride"), "i32"),
            "scale": "fp32",
            "weight": "fp32",
            "seed": "i32",
            **dict.fromkeys(constexprs, "constexpr"),
        },
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in divisible},
        "options": {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        "representative": base == "bf16" and adapter == "fp32" and stochastic and not aligned,
        "shape": f"R={R} C={C} r={rank}",
        **traffic(R, C, rank, size[base], size[adapter], launch),
    }


def traffic(
    R: int, C: int, rank: int, size: int, adapter_size: int, launch: DotLaunch
) -> dict[str, int]:
    """Bytes that the kernel asks for, and that any kernel must."""
    adapters = (triton.cdiv(C, launch.columns) * R + triton.cdiv(R, launch.rows) * C) * rank
    weights = 3 * R * C * size  # ref and θ read, ref written
    return {
        "moved": weights + adapters * adapter_size,
        "minimum": weights + (R + C) * rank * adapter_size,
    }


def lora_merge_naive(
    ref: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    alpha: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The moved reference in `dtype`, out of place, in plain PyTorch."""
    theta = weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))
    return torch.lerp(ref.to(dtype), theta, alpha)
