"""ref ← (1-α)·ref + α·θ in place, for hundreds of tensors in one launch.

Letters: ref and θ a pair of tensors of one shape, α the mixing weight.

The kernel finds its tensors through a table of addresses on the device, so that one launch covers
every pair of one (ref dtype, θ dtype): an 8B model has 291 weights, and a launch each would leave
most of the small ones (norms) bound by launch latency. A program works on one chunk of one tensor.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Launch, backend, device_of

# 16 elements a thread on NVIDIA (8 on AMD, whose warps have 64 threads): two 16-byte loads of bf16
# in flight per operand. bf16 takes 32 registers on sm_80 and sm_90, at which all 2,048 threads of
# an SM reside, and 26 on gfx942 (python -m benchmarks.report).
EMA_LAUNCH = {"cuda": Launch(block=4096, num_warps=8), "hip": Launch(block=4096, num_warps=8)}

# Elements of one program: 8 blocks, so that the three dependent loads that find a tensor (chunk →
# row → address) are paid once per 200 kB of traffic; an 8B model makes 245k programs, a 1 MB map.
_CHUNK = 1 << 15
_COLUMNS = tl.constexpr(
    5
)  # of the table: addresses of ref and θ, elements, first chunk and counter
LANES = tl.constexpr(8)  # 16-bit random numbers that one Philox call yields (4 words of 32 bits)
# Philox4x32 passes BigCrush from 7 rounds on (Salmon et al. 2011, table 2); Triton's default of 10
# would be 1.4 times the integer work, most of what this kernel computes.
_PHILOX_ROUNDS = tl.constexpr(7)

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    """fp32 → `DTYPE`, round to nearest even."""
    # the interpreter converts fp32 → bf16 by cutting bits off: there this works on the bits
    if INTERPRETED:
        if tl.bfloat16 == DTYPE:
            word = tl.where(x == x, x, 0.0).to(tl.uint32, bitcast=True)
            word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
            word = tl.where(x == x, word, 0x7FC0)
            result = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            result = x.to(DTYPE)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def round_stochastic(x, noise, DTYPE: tl.constexpr):
    """fp32 → bf16 or fp16: one of the two neighbours of x, x on average. `noise`: 16 random bits.

    Random bits are added below the last bit that stays and the rest is cut: the probability of
    rounding up is the part cut off, exactly. Past the largest finite number (and for inf and NaN)
    the result is the nearest one, so that no finite weight becomes inf by bad luck.
    """
    magnitude = tl.abs(x)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    if tl.bfloat16 == DTYPE:
        # fp32 has 16 bits more than bf16, subnormals included
        largest = 3.3895313892515355e38
        rounded = ((magnitude.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000) | sign
    else:
        # 13 bits more than fp16 down to 2⁻¹⁴. Below, fp16 is spaced by 2⁻²⁴ throughout, which is
        # how fp32 cut by 13 bits is spaced in [2⁻¹⁴, 2⁻¹³]: move there and back. The move rounds to
        # 2⁻³⁷, so that the probability is off by at most 2⁻¹⁴ (the mean by under 4e-12).
        largest = 65504.0
        smallest_normal = 6.103515625e-05
        move = tl.where(magnitude < smallest_normal, smallest_normal, 0.0)
        word = ((magnitude + move).to(tl.uint32, bitcast=True) + (noise >> 3)) & 0xFFFFE000
        rounded = (word.to(tl.float32, bitcast=True) - move).to(tl.uint32, bitcast=True) | sign
    # exact in DTYPE already, so that the conversion only drops zero bits
    kept = tl.where(magnitude < largest, rounded.to(tl.float32, bitcast=True), x)
    return round_nearest(kept, DTYPE)


@triton.jit
def random_bits16(seed, counters, SHAPE: tl.constexpr):
    """`SHAPE` uint32, each 16 random bits, 8 along the last axis for each of the Philox `counters`.

    Element i of a counter depends on (seed, counter, i) alone: not on the launch.
    """
    a, b, c, d = tl.randint4x(seed, counters, n_rounds=_PHILOX_ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d))  # counters × 2 × 2
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), SHAPE)


@triton.jit
def move(ref, theta, weight):
    """fp32 ref + α·(θ - ref) from the nearer end; `weight` is `signed_weight(α)`.

    From an infinite end that would be NaN: there the result is that end, NaN between ∞ and -∞.
    """
    # the multiply-add is explicit, so that every backend and the interpreter round alike
    nearer = tl.where(weight > 0.0, ref, theta)
    moved = tl.fma(theta - ref, tl.full(ref.shape, weight, tl.float32), nearer)
    return tl.where(tl.abs(nearer) == float("inf"), ref + theta, moved)


@triton.jit(do_not_specialize=["seed"])
def _ema_kernel(
    table_ptr,  # (tensors, 5) int64
    chunk_tensor_ptr,  # (chunks,) int32: the tensor that a chunk belongs to
    weight,  # signed_weight(α)
    seed,
    REF: tl.constexpr,  # dtypes
    THETA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunk_tensor_ptr + chunk).to(tl.int64) * _COLUMNS
    begin = (chunk - tl.load(row_ptr + 3)) * CHUNK  # int64, as the table; the rest fits in int32
    ref_ptr = tl.load(row_ptr).to(tl.pointer_type(REF)) + begin  # pyright: ignore[reportArgumentType]
    theta_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(THETA)) + begin  # pyright: ignore[reportArgumentType]
    size = tl.minimum(tl.load(row_ptr + 2) - begin, CHUNK).to(tl.int32)
    counter = tl.load(row_ptr + 4) + begin // LANES
    if ALIGNED:
        # an address read from memory may be anything to the compiler, which would then load
        # element by element (2 bytes of bf16) instead of 16 bytes a thread
        ref_ptr = tl.multiple_of(ref_ptr, 16)
        theta_ptr = tl.multiple_of(theta_ptr, 16)
        size = tl.multiple_of(size, LANES)
    for offset in range(0, size, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < size
        ref = tl.load(ref_ptr + index, mask=inside, other=0.0).to(tl.float32)
        theta = tl.load(theta_ptr + index, mask=inside, other=0.0).to(tl.float32)
        moved = move(ref, theta, weight)
        if STOCHASTIC:
            counters = counter + offset // LANES + tl.arange(0, BLOCK // LANES)
            noise = random_bits16(seed, counters, (BLOCK,))  # pyright: ignore[reportArgumentType]
            result = round_stochastic(moved, noise, REF)
        else:
            result = round_nearest(moved, REF)
        tl.store(ref_ptr + index, result, mask=inside)


@torch.no_grad()
def ema_update_(
    ref_tensors: list[Tensor],  # any shapes, fp32, bf16 or fp16, contiguous; written in place
    tensors: list[Tensor],  # the same shapes, fp32, bf16 or fp16, contiguous
    alpha: float,
    *,
    rounding: Literal["nearest", "stochastic"],
    seed: int = 0,
) -> None:
    """`torch._foreach_lerp_(ref_tensors, tensors, alpha)` in fp32, rounded once, in one pass.

    Equals `ref.copy_(torch.lerp(ref.float(), θ.float(), alpha))` for each pair with
    `rounding="nearest"`; `"stochastic"` has that (before its rounding) as its mean. An fp32 ref is
    rounded to nearest either way. α = 1 copies (bits, or nearest where the dtypes differ), with no
    noise; α = 0 does nothing. Traffic: ref and θ are read once, ref is written once; memory: a
    table of 40 bytes a tensor and 4 bytes per 32,768 elements.

    The random bits of an element follow from (seed, the tensors before it in the list, its index):
    the same call gives the same bits on every device and with every launch configuration.
    """
    assert len(ref_tensors) == len(tensors), (len(ref_tensors), len(tensors))
    assert 0.0 <= alpha <= 1.0, alpha
    assert rounding in ("nearest", "stochastic"), rounding
    _check_pairs(ref_tensors, tensors)
    alpha = torch.tensor(alpha, dtype=torch.float32).item()
    if alpha == 0.0:
        return
    weight = signed_weight(alpha)
    for (device, ref_dtype, dtype, aligned), rows in _group(ref_tensors, tensors).items():
        if alpha == 1.0:
            torch._foreach_copy_(*_as_bits(rows, ref_dtype == dtype))
            continue
        table, chunk_tensor = _build_table(rows, device)
        launch = EMA_LAUNCH[backend()]
        with device_of(table):
            _ema_kernel[(chunk_tensor.numel(),)](
                table,
                chunk_tensor,
                weight,
                seed,
                REF=TRITON_DTYPE[ref_dtype],
                THETA=TRITON_DTYPE[dtype],
                STOCHASTIC=rounding == "stochastic" and ref_dtype != torch.float32,
                ALIGNED=aligned,
                CHUNK=_CHUNK,
                BLOCK=launch.block,
                num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
            )


def signed_weight(alpha: float) -> float:
    """α if α < ½, else α - 1, of α rounded to fp32.

    As torch.lerp: from the nearer end, ref + α·(θ - ref) or θ + (α - 1)·(θ - ref), so that α → 1
    gives θ without cancellation. Of α in fp32, α - 1 is exact from ½ on.
    """
    alpha = torch.tensor(alpha, dtype=torch.float32).item()
    return alpha if alpha < 0.5 else alpha - 1.0


def _as_bits(rows: Sequence["_Row"], same: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The refs and the θ; of one dtype, as integers: a GPU's copy of bf16 has one NaN for all."""
    refs, thetas = [row.ref for row in rows], [row.theta for row in rows]
    if not same:
        return refs, thetas
    bits = {4: torch.int32, 2: torch.int16}[refs[0].itemsize]
    return [t.view(bits) for t in refs], [t.view(bits) for t in thetas]


class _Row(NamedTuple):
    ref: Tensor
    theta: Tensor
    first_counter: int  # Philox counters used by the tensors before this one


def _group(
    ref_tensors: Sequence[Tensor], tensors: Sequence[Tensor]
) -> dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[_Row]]:
    """The non-empty pairs by what needs a launch of its own.

    Aligned: both addresses are multiples of 16 bytes and the size one of 8, hence every mask is
    constant over 16 bytes too. True of the weights of language models; the rest goes element-wise.
    """
    groups = defaultdict(list)
    counter = 0
    for ref, theta in zip(ref_tensors, tensors, strict=True):
        numel = ref.numel()
        if numel:
            aligned = (ref.data_ptr() | theta.data_ptr()) % 16 == 0 and numel % LANES.value == 0
            key = (ref.device, ref.dtype, theta.dtype, aligned)
            groups[key].append(_Row(ref, theta, counter))
        counter += -(-numel // LANES.value)  # triton.cdiv takes a millisecond for 400 tensors
    return groups


def _build_table(
    rows: Sequence[_Row], device: torch.device
) -> tuple[Tensor, Tensor]:  # (tensors, 5) int64, (chunks,) int32
    values, chunks = [], 0
    for ref, theta, first_counter in rows:
        numel = ref.numel()
        values.append((ref.data_ptr(), theta.data_ptr(), numel, chunks, first_counter))
        chunks += -(-numel // _CHUNK)
    table = torch.tensor(values, dtype=torch.int64).to(device)
    # made on the device: a map of an 8B model would be a megabyte to copy, and the host to wait for
    indices = torch.arange(len(rows), dtype=torch.int32, device=device)
    counts = (table[:, 2] + (_CHUNK - 1)) // _CHUNK
    return table, indices.repeat_interleave(counts, output_size=chunks)


def _check_pairs(ref_tensors: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for ref, theta in zip(ref_tensors, tensors, strict=True):
        assert ref.shape == theta.shape, (ref.shape, theta.shape)
        for tensor in (ref, theta):
            assert tensor.dtype in TRITON_DTYPE, tensor.dtype
            assert tensor.is_contiguous(), tensor.stride()
        assert ref.device == theta.device, (ref.device, theta.device)
        # the kernel dereferences raw addresses: in the interpreter those must be host addresses
        assert not (INTERPRETED.value and ref.is_cuda), "interpreted kernels need CPU tensors"
    # a tied weight listed twice would be moved by two programs at once
    written = [ref.data_ptr() for ref in ref_tensors if ref.numel()]
    assert len(set(written)) == len(written), "a reference tensor is listed twice"


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """Every configuration that `ema_update_` can launch on `backend` ("cuda" or "hip").

    Keys: name, fn, signature, constexprs, attrs (what the launcher specialises on), options: what
    `triton.compile(ASTSource(fn, signature, constexprs, attrs), target, options)` takes.
    """
    launch = EMA_LAUNCH[backend]
    names = {tl.float32: "fp32", tl.bfloat16: "bf16", tl.float16: "fp16"}
    size = 4096 * 14336  # the largest matrix of a layer of Llama-3-8B
    configurations = []
    for ref in names:
        for theta in names:
            for stochastic in (False, True) if ref != tl.float32 else (False,):
                for aligned in (True, False):
                    constexprs = {
                        "REF": ref,
                        "THETA": theta,
                        "STOCHASTIC": stochastic,
                        "ALIGNED": aligned,
                        "CHUNK": _CHUNK,
                        "BLOCK": launch.block,
                    }
                    name = f"ema {names[ref]}<-{names[theta]}"
                    name += " stochastic" if stochastic else " nearest"
                    configurations.append(
                        {
                            "name": name if aligned else name + " unaligned",
                            "fn": _ema_kernel,
                            "signature": {
                                "table_ptr": "*i64",
                                "chunk_tensor_ptr": "*i32",
                                "weight": "fp32",
                                "seed": "i32",
                                **dict.fromkeys(constexprs, "constexpr"),
                            },
                            "constexprs": constexprs,
                            "attrs": {(i,): [["tt.divisibility", 16]] for i in (0, 1)},
                            "options": {"num_warps": launch.num_warps},
                            "shape": f"{size} elements",
                            **traffic(size, ref.primitive_bitwidth, theta.primitive_bitwidth),
                        }
                    )
    return configurations


def traffic(size: int, ref_bits: int, theta_bits: int) -> dict[str, int]:
    """Bytes that the kernel asks for, the table included, and that any kernel must."""
    weights = size * (2 * ref_bits + theta_bits) // 8
    return {"moved": weights + triton.cdiv(size, _CHUNK) * (4 + 5 * 8), "minimum": weights}


def ema_naive(
    ref_tensors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    alpha: float,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The update, out of place, in plain PyTorch.

    In `dtype` (fp64: the mean of the stochastic rounding), or if None as the kernel does with
    `rounding="nearest"`: fp32 arithmetic, rounded to the dtype of ref.
    """
    pairs = zip(ref_tensors, tensors, strict=True)
    if dtype is not None:
        return [torch.lerp(ref.to(dtype), theta.to(dtype), alpha) for ref, theta in pairs]
    return [torch.lerp(ref.float(), theta.float(), alpha).to(ref.dtype) for ref, theta in pairs]
