"""ref ← (1-α)·ref + α·(W + s·B·A): against fp64, and the same through tralign_fast.ops.ema."""

import pytest
import torch

from tests.diagonal import diagonal
from tests.kernels.test_ema import check_mean
from tralign_fast.ops.ema import lora_merge_ as public_merge_
from tralign_kernels import ema_update_, lora_merge, lora_merge_, lora_merge_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]
NAN = float("nan")


def make(shape, rank, dtype, adapter_dtype, device, seed=0):
    """ref, weight, A, B: parts of buffers of NaN with wider rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    tensors = []
    for size, kind in (
        (shape, dtype), (shape, dtype), ((rank, columns), adapter_dtype),
        ((rows, rank), adapter_dtype),
    ):  # fmt: skip
        buffer = torch.full((size[0], size[1] + 7), NAN, dtype=kind, device=device)
        buffer[:, : size[1]] = torch.randn(size, generator=generator).to(kind).to(device)
        tensors.append(buffer[:, : size[1]])
    return tensors


def check(moved, ref, weight, a, b, scale, alpha):
    """Error at most twice that of torch's own update in fp32, rounded, plus half a unit."""
    inputs = [t.cpu() for t in (ref, weight, a, b)]
    exact = lora_merge_naive(*inputs, scale, alpha)
    torchs = lora_merge_naive(*inputs, scale, alpha, dtype=torch.float32).to(ref.dtype)
    floor = torch.finfo(ref.dtype).eps / 2 * exact.abs().max()
    error, torch_error = ((t.cpu().double() - exact).abs().max() for t in (moved, torchs))
    assert error <= 2 * torch_error + floor, (error, torch_error, floor)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "alpha"), diagonal(3, DTYPES, DTYPES, [0.01, 0.6, 1.0])
)
def test_nearest(device, dtype, adapter_dtype, alpha):
    ref, *others = make((70, 67), 5, dtype, adapter_dtype, device)
    moved = ref.clone()
    lora_merge_(moved, *others, 0.25, alpha, rounding="nearest")
    check(moved, ref, *others, 0.25, alpha)


@pytest.mark.parametrize(
    ("rank", "shape"), diagonal(3, [1, 16, 17], [(1, 1), (64, 64), (65, 129), (3, 8)]), ids=str
)
def test_sizes_around_the_blocks(device, shape, rank):
    """In place in a strided reference: what lies beside it is not touched."""
    ref, *others = make(shape, rank, torch.bfloat16, torch.float32, device)
    before, whole = ref.clone(), ref._base
    lora_merge_(ref, *others, 2.0, 0.3, rounding="stochastic")
    assert whole[:, shape[1] :].isnan().all()
    gap = torch.finfo(ref.dtype).eps * 2
    exact = lora_merge_naive(*(t.cpu() for t in (before, *others)), 2.0, 0.3)
    assert ((ref.cpu().double() - exact).abs() <= gap * exact.abs() + 1e-6).all()
    lora_merge_(moved := before.clone(), *others, 2.0, 0.3, rounding="nearest")
    check(moved, before, *others, 2.0, 0.3)


@pytest.mark.parametrize("dtype", HALVES)
def test_without_an_adapter_it_is_the_ema(device, dtype):
    """Rank 0, or B = 0: the very bits of ema_update_ with nearest rounding."""
    ref, weight, a, b = make((33, 40), 4, dtype, dtype, device)
    want = ref.clone()
    ema_update_([want], [weight.contiguous()], 0.3, rounding="nearest")
    for factors in ((a, torch.zeros_like(b)), (a[:0], b[:, :0])):
        moved = ref.clone()
        lora_merge_(moved, weight, *factors, 1.0, 0.3, rounding="nearest")
        assert moved.equal(want)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_right_on_average(device, dtype):
    ref, *others = make((8, 24), 4, dtype, torch.float32, device)
    draws = []
    for seed in range(150):
        moved = ref.clone()
        lora_merge_(moved, *others, 0.5, 0.1, rounding="stochastic", seed=seed)
        draws.append(moved.flatten().cpu())
    inputs = [t.cpu() for t in (ref, *others)]
    # the mean is that of the fp32 result, whose own error is far under a 16th of a gap
    exact = lora_merge_naive(*inputs, 0.5, 0.1, dtype=torch.float32).double()
    check_mean(torch.stack(draws), exact.flatten())


def test_seed_does_not_depend_on_the_launch(device, monkeypatch):
    ref, *others = make((70, 67), 5, torch.bfloat16, torch.bfloat16, device)
    results = []
    for columns in (64, 32):
        small = {k: v._replace(columns=columns) for k, v in lora_merge.LORA_LAUNCH.items()}
        monkeypatch.setattr(lora_merge, "LORA_LAUNCH", small)
        for seed in (3, 4):
            moved = ref.clone()
            lora_merge_(moved, *others, 0.5, 0.1, rounding="stochastic", seed=seed)
            results.append(moved)
    assert results[0].equal(results[2])
    assert not results[0].equal(results[1])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_public_function(device, dtype, rounding, monkeypatch):
    """Both backends within one unit of each other; the torch one in chunks of a few rows."""
    monkeypatch.setattr("tralign_fast.ops.ema._CHUNK", 300)
    ref, *others = make((70, 67), 5, dtype, torch.float32, device)
    results = []
    for backend in ("triton", "torch"):
        moved = ref.clone()
        generator = torch.Generator().manual_seed(0)
        public_merge_(
            moved, *others, 0.5, 0.3, rounding=rounding, backend=backend, generator=generator
        )
        results.append(moved.double())
    unit = torch.finfo(dtype).eps * results[1].abs() + 1e-6
    assert ((results[0] - results[1]).abs() <= 2 * unit).all()


def test_offsets_past_2_31(device, untouched_bytes):
    """Rows of ref past 2³¹ elements, with a stride that fits in int32."""
    stride, rows = 2**30 + 64, 3
    ref, *others = make((rows, 24), 4, torch.bfloat16, torch.bfloat16, device)
    memory = untouched_bytes(2 * ((rows - 1) * stride + 24), device).view(torch.bfloat16)
    far = memory.as_strided((rows, 24), (stride, 1))
    far.copy_(ref)
    lora_merge_(far, *others, 0.5, 0.3, rounding="nearest")
    check(far, ref, *others, 0.5, 0.3)


def test_nothing_to_do(device):
    ref, weight, a, b = make((4, 8), 2, torch.float32, torch.float32, device)
    before = ref.clone()
    lora_merge_(ref, weight, a, b, 1.0, 0.0, rounding="nearest")
    assert ref.equal(before)
    lora_merge_(ref[:0], weight[:0], a, b[:0], 1.0, 0.5, rounding="nearest")


def test_invariants_are_asserted(device):
    ref, weight, a, b = make((4, 8), 2, torch.float32, torch.float32, device)
    for bad in (
        (ref, weight[:2], a, b),  # shapes
        (ref, weight, a[:1], b),
        (ref, weight, a.double(), b),  # dtypes
        (ref.t(), weight.t(), b.t(), a.t()),  # strided columns
    ):
        with pytest.raises(AssertionError):
            lora_merge_(*bad, 1.0, 0.5, rounding="nearest")
    with pytest.raises(ValueError, match="expected ref and weight"):
        public_merge_(ref, weight, a[:1], b, 1.0, 0.5)
    with pytest.raises(ValueError, match="alpha"):
        public_merge_(ref, weight, a, b, 1.0, 1.5)
