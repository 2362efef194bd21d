"""In-place update of reference weights: `ref ← (1-α)·ref + α·θ`, θ with or without an adapter."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tralign_fast.ops.backend import device_kind, kernel, pick_backend, warn_once
from tralign_fast.ops.checks import FLOAT_NAMES, FLOATS

# 512 K elements in fp32 are 2 MB: the buffers of a chunk stay in a CPU's cache, and the operators'
# own time (an eighth of that: 1.9 times as long in all) does not count.
_CHUNK = 1 << 19
# Dtypes of the Triton kernel; fp64 weights take the torch backend.
_FUSED = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)  # where rounding="stochastic" has something to round


@torch.no_grad()
def ema_update_(
    ref_tensors: Iterable[Tensor],
    tensors: Iterable[Tensor],
    alpha: float,
    *,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    generator: torch.Generator | None = None,
) -> None:
    """Moves `ref_tensors` towards `tensors` in place.

    It is `torch._foreach_lerp_(ref_tensors, tensors, alpha)`, but the arithmetic is fp32 whatever
    the dtypes (fp32, bf16, fp16; a pair may differ; fp64 if one of a pair is), with one rounding at
    the end. A bf16 weight has 8 bits: a movement under 1/512 of the weight rounds to nothing, so
    with small α a reference in bf16 stops short (α = 0.01: after a third of its way, where weights
    are a tenth of their size apart).
    `rounding="stochastic"` rounds up with probability equal to the part that is cut off, so that
    the expected update is exact; α = 1 copies, with no rounding noise. Infinities (a masked bias)
    are those of (1-α)·ref + α·θ: what is equal stays.

    Memory: 6 MB of buffers beside the tensors, and a copy of a strided reference; none on a GPU
    with Triton.

    Args:
        ref_tensors: reference weights, written in place. One that is listed twice, as a tied weight
            is by `state_dict()`, moves once.
        tensors: policy weights, the same shapes in the same order.
        alpha: α in [0, 1]; 1 copies bits, 0 does nothing.
        rounding: how a bf16 or fp16 reference is rounded. Nothing else is: the default is unbiased.
        generator: source of the random bits (one draw seeds the whole call, a second one shards
            beside whole tensors: from the same state come the same bits); None: torch's default.

    Raises:
        ValueError: α out of range, unknown rounding, lists that do not match, quantised weights, or
            a reference listed twice with two policy weights that differ.

    Source: Gorbatovski et al. 2024, arXiv 2404.09656, eq. 2 (soft update) and 3 (hard update).
    """
    _check_options("ema_update_", alpha, rounding)
    ref_tensors, tensors = [*ref_tensors], [*tensors]  # `model.parameters()` is read once
    refs, thetas = [local_shard(t) for t in ref_tensors], [local_shard(t) for t in tensors]
    _check_match(refs, thetas)
    if any(is_quantised(t) for both in (ref_tensors, tensors) for t in both):
        raise ValueError("ema_update_: quantised weights cannot move; leave them out")
    for group in _drawing_alike(ref_tensors, rounding):
        some = [refs[i] for i in group], [thetas[i] for i in group]
        _move_(*_without_repeats(*some), alpha, rounding, generator)


def _drawing_alike(ref_tensors: Sequence[Tensor], rounding: str) -> list[list[int]]:
    """The places of tensors that draw random bits from one seed.

    Tensor parallelism cuts some weights and leaves others whole, which every process has to round
    alike. One process's shards may be larger than another's: they draw apart from these.
    """
    places = range(len(ref_tensors))
    cut = [i for i in places if hasattr(ref_tensors[i], "to_local")]
    if rounding == "nearest" or len(cut) in (0, len(ref_tensors)):
        return [[*places]]
    return [sorted({*places} - {*cut}), cut]


def _move_(
    refs: list[Tensor],
    thetas: list[Tensor],
    alpha: float,
    rounding: str,
    generator: torch.Generator | None,
) -> None:
    """`ema_update_` of tensors that are none of them twice there."""
    if alpha == 0.0 or not refs:
        return
    on_gpu = all(
        device_kind(r.device) == "cuda" and t.device == r.device
        for r, t in zip(refs, thetas, strict=True)
    )
    if (
        on_gpu
        and pick_backend("auto", refs[0].device) == "triton"
        and all(t.is_contiguous() and t.dtype in _FUSED for t in (*refs, *thetas))
    ):
        seed = 0 if alpha == 1.0 else _draw_seed(generator)
        kernel("ema_update_")(refs, thetas, alpha, rounding=rounding, seed=seed)
        return
    if alpha == 1.0:
        torch._foreach_copy_(refs, thetas)
        return
    _update_(refs, thetas, alpha, rounding, generator)


def _update_(
    refs: list[Tensor],
    thetas: list[Tensor],
    alpha: float,
    rounding: str,
    generator: torch.Generator | None,
) -> None:
    """The torch backend: pairs of one dtype by foreach, which computes halves in fp32 and rounds
    once; the others, and stochastic rounding, in buffers."""
    foreach = FLOATS if rounding == "nearest" else (torch.float64, torch.float32)
    pairs = list(zip(refs, thetas, strict=True))
    exact = [(r, t) for r, t in pairs if r.dtype == t.dtype in foreach]
    others = [(r, t) for r, t in pairs if not r.dtype == t.dtype in foreach]
    if exact:
        _lerp_([r for r, _ in exact], [t for _, t in exact], alpha)
    if others:
        move_ = _Mover(others[0][0].device, alpha, rounding, generator)
        for ref, theta in others:
            move_(ref, theta)


def _lerp_(refs: list[Tensor], thetas: list[Tensor], alpha: float) -> None:
    """`torch._foreach_lerp_`, but where it leaves an infinite end, which lerp makes NaN."""
    nearer = refs if alpha < 0.5 else thetas
    norms = torch._foreach_norm(nearer)
    ends = []
    if not math.isfinite(sum(float(norm) for norm in norms)):
        odd = [i for i, norm in enumerate(norms) if not norm.isfinite()]
        ends = [(refs[i], nearer[i].isinf(), refs[i] + thetas[i]) for i in odd]
    torch._foreach_lerp_(refs, thetas, alpha)
    for ref, is_end, end in ends:
        ref.copy_(torch.where(is_end, end, ref))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Mover:
    """ref ← lerp(ref, θ, α) in fp32 or fp64, rounded once, chunk by chunk in buffers of its own."""

    def __init__(
        self,
        device: torch.device,
        alpha: float,
        rounding: str,
        generator: torch.Generator | None,
    ) -> None:
        self.alpha, self.device = alpha, device
        self.noise = _Noise(device, _draw_seed(generator)) if rounding == "stochastic" else None
        self._buffers: dict[torch.dtype, Tensor] = {}

    def __call__(self, ref: Tensor, theta: Tensor) -> None:
        dtype = _compute_dtype(ref, theta)
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(2, _CHUNK, device=self.device, dtype=dtype)
        # a strided reference has no flat view to write through
        flat = ref.view(-1) if ref.is_contiguous() else ref.flatten()
        parts = zip(flat.split(_CHUNK), theta.reshape(-1).split(_CHUNK), strict=True)
        for ref_part, theta_part in parts:
            moved, other = self._buffers[dtype][:, : len(ref_part)]
            moved.copy_(ref_part).lerp_(other.copy_(theta_part), self.alpha)
            noise = self.noise if ref.dtype in _HALVES else None
            largest = torch.finfo(dtype if noise is None else ref.dtype).max
            ends = None
            if not _lies_within(moved, largest):
                moved, ends = self._with_ends(moved, ref_part.to(dtype), other, largest)
            if noise is not None:
                moved = moved.float()
                round_stochastically_(moved, ref.dtype, noise.draw(len(moved)))
            ref_part.copy_(moved if ends is None else torch.where(ends.isnan(), moved, ends))
        if not ref.is_contiguous():
            ref.copy_(flat.view_as(ref))

    def _with_ends(
        self, moved: Tensor, ref: Tensor, theta: Tensor, largest: float
    ) -> tuple[Tensor, Tensor]:
        """`moved`, with what it is from an infinite end, which lerp makes NaN; and what of it is
        not to be rounded at random, for bad luck would make it infinite: NaN elsewhere."""
        nearer = ref if self.alpha < 0.5 else theta
        moved = torch.where(nearer.isinf(), ref + theta, moved)
        return moved, torch.where(moved.abs() >= largest, moved, float("nan"))


def _lies_within(x: Tensor, bound: float) -> bool:
    """Whether all |x| are known to be smaller. On a device, which is not waited for, nothing is."""
    if x.numel() == 0:
        return True
    if device_kind(x.device) != "cpu":
        return False
    low, high = torch.aminmax(x)
    return -bound < float(low) and float(high) < bound  # so written, NaN is not


@torch.no_grad()
def lora_merge_(
    ref: Tensor,  # (R, C)
    weight: Tensor,  # (R, C)
    lora_a: Tensor,  # (r, C)
    lora_b: Tensor,  # (R, r)
    scale: float,
    alpha: float,
    *,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> None:
    """Moves a reference towards a weight with its adapter: `ref ← (1-α)·ref + α·(W + s·B·A)`.

    Equals `ref.lerp_(weight + scale * lora_b @ lora_a, alpha)` in fp32 (fp64), one rounding at the
    end as in `ema_update_`; α = 1 gives the merged weight. For a reference with weights of its own
    whose policy trains an adapter.

    Memory: none with Triton; else fp32 rows of the product, 2 MB at a time (a row at least), and
    the buffers of `ema_update_`.

    Args:
        ref: reference weight, written in place; fp32, bf16 or fp16.
        weight: the weight that the adapter belongs to.
        lora_a, lora_b: the factors, of one dtype.
        scale: s, lora_alpha / r.
        alpha: α in [0, 1]; 0 does nothing.
        rounding, generator: as `ema_update_`.
        backend: "auto" (Triton on a GPU, else PyTorch), "torch" or "triton".

    Raises:
        ValueError: α out of range, unknown rounding, or shapes and dtypes that do not match.
    """
    _check_options("lora_merge_", alpha, rounding)
    rank = lora_a.shape[0]
    shapes = [tuple(t.shape) for t in (ref, weight, lora_a, lora_b)]
    R, C = shapes[0] if ref.dim() == 2 else (-1, -1)
    if shapes != [(R, C), (R, C), (rank, C), (R, rank)] or lora_a.dtype != lora_b.dtype:
        raise ValueError(
            "lora_merge_: expected ref and weight (R, C), A (r, C) and B (R, r) of one dtype, got "
            f"{shapes}, {lora_a.dtype} and {lora_b.dtype}"
        )
    check_floats("lora_merge_", "the weight", ref.dtype, weight.dtype, lora_a.dtype)
    if alpha == 0.0 or ref.numel() == 0:
        return
    tensors = (ref, weight, lora_a, lora_b)
    if pick_backend(backend, ref.device) == "triton":
        if all(t.dtype in _FUSED and (t.shape[1] <= 1 or t.stride(1) == 1) for t in tensors):
            seed = _draw_seed(generator)
            kernel("lora_merge_")(*tensors, scale, alpha, rounding=rounding, seed=seed)
            return
        warn_once("lora_merge_: strided columns or fp64 have no kernel and take the torch backend")
    move_ = _Mover(ref.device, alpha, rounding, generator)
    step, dtype = max(1, _CHUNK // C), _compute_dtype(*tensors)
    for start in range(0, R, step):
        rows = slice(start, start + step)
        product = lora_b[rows].to(dtype) @ lora_a.to(dtype)
        move_(ref[rows], product.mul_(scale).add_(weight[rows]))


def round_stochastically_(
    x: Tensor,  # float32
    dtype: torch.dtype,  # bfloat16 or float16
    noise: Tensor,  # like x, int32, uniform in [0, 2^16); used up
) -> None:
    """Moves `x` in place to one of its two neighbours in `dtype`, unbiased.

    bf16 is the upper half of fp32: random bits are added to those that it lacks, and these are cut.
    So it is with the 13 bits that fp16 lacks once x is scaled by 2^-112, where the smallest normal
    numbers of both, 2^-14 and 2^-126, meet, and with them what is subnormal. Past the largest
    finite number of `dtype` the other neighbour is infinity.
    """
    # noise on the lowest bits of some NaN would carry into its sign; those of infinity are zeros
    x.nan_to_num_(float("nan"), float("inf"), float("-inf"))
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        bits.add_(noise).bitwise_and_(-(1 << 16))
    else:
        assert dtype == torch.float16, dtype
        x.mul_(2.0**-112)
        bits.add_(noise.bitwise_right_shift_(3)).bitwise_and_(-(1 << 13))
        x.mul_(2.0**112)


class _Noise:
    """Random bits for the chunks of one update, the same for the same seed.

    torch's generator takes a CPU 1.5 times as long as all the rest of an update. So 65,536 numbers
    are drawn, and every 65,536 elements have them XORed with one new number: what any three
    elements get is independent, which is all that the mean and the variance of a sum ask.
    """

    _DRAWN = 1 << 16

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn = self._fresh(1, self._DRAWN)
        self._buffer = self._drawn.repeat(-(-_CHUNK // self._DRAWN), 1)

    def draw(self, count: int) -> Tensor:
        """(count,) int32, uniform in [0, 2^16), count ≤ `_CHUNK`; valid until the next draw."""
        out = self._buffer[: -(-count // self._DRAWN)]
        torch.bitwise_xor(self._drawn, self._fresh(len(out), 1), out=out)
        return out.view(-1)[:count]

    def _fresh(self, *shape: int) -> Tensor:
        device = self._generator.device
        return torch.randint(
            1 << 16, shape, dtype=torch.int32, device=device, generator=self._generator
        )


def _draw_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(0, 2**31 - 1, (), generator=generator, device=device).item())


def local_shard(tensor: Tensor) -> Tensor:
    """A tensor, or this process's shard of a DTensor (FSDP2) or of a flat ZeRO-3 parameter: its
    storage, not a copy."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.detach()  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(tensor, "to_local"):
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor.detach()


def is_quantised(weight: Tensor) -> bool:
    """Whether the elements are not the numbers that a weight stands for: codes (bitsandbytes packs
    4-bit ones into any dtype), fp8 with scales elsewhere, or a tensor subclass of torchao's kind,
    which tells the dtype that it computes in."""
    local = local_shard(weight)
    return (
        local.dtype not in FLOATS
        or getattr(weight, "quant_state", None) is not None
        or is_traceable_wrapper_subclass(local)
    )


def _check_options(name: str, alpha: float, rounding: str) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name}: alpha must lie in [0, 1], got {alpha}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{name}: rounding must be nearest or stochastic, got {rounding!r}")


def _check_match(refs: list[Tensor], thetas: list[Tensor]) -> None:
    if len(refs) != len(thetas):
        raise ValueError(f"ema_update_: {len(refs)} reference tensors for {len(thetas)} tensors")
    for index, (ref, theta) in enumerate(zip(refs, thetas, strict=True)):
        if ref.shape != theta.shape:
            raise ValueError(
                f"ema_update_: tensor {index} has shape {tuple(theta.shape)}, its reference "
                f"{tuple(ref.shape)}; with sharded weights both must be sharded alike"
            )
        check_floats("ema_update_", f"tensor {index}", ref.dtype, theta.dtype)


def check_floats(name: str, what: str, *dtypes: torch.dtype) -> None:
    """Refuses quantised weights.

    Raises:
        ValueError: a dtype other than fp64, fp32, bf16 and fp16.
    """
    if not set(dtypes) <= set(FLOATS):
        raise ValueError(
            f"{name}: {what} is {', '.join(map(str, dtypes))} (reference first); expected "
            f"{FLOAT_NAMES}: quantised weights cannot move"
        )


def _without_repeats(refs: list[Tensor], thetas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each reference once: a tied weight would move twice."""
    first: dict[Hashable, int] = {}
    for index, (ref, theta) in enumerate(zip(refs, thetas, strict=True)):
        before = first.setdefault(_place(ref) if ref.numel() else ("empty", index), index)
        other = thetas[before]
        if _place(other) != _place(theta) and not torch.equal(other, theta):
            raise ValueError(
                f"ema_update_: tensors {before} and {index} share one reference weight, but their "
                "policy weights differ; tie both models' weights, or neither's"
            )
    return [refs[i] for i in first.values()], [thetas[i] for i in first.values()]


def _place(tensor: Tensor) -> Hashable:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def ema_naive(ref: Tensor, tensor: Tensor, alpha: float) -> Tensor:
    """The update in fp64, for tests."""
    return ref.double() * (1 - alpha) + tensor.double() * alpha
