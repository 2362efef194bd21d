"""The multi-tensor reference update: bits if it rounds to nearest, statistics if it does not."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.diagonal import diagonal
from tests.kernels.conftest import ROUNDS_TWICE
from tralign_kernels import ema, ema_naive, ema_update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
PAIRS = list(itertools.product(DTYPES, DTYPES))
ALPHAS = [0.01, 0.4999, 0.5, 0.6, 0.99]
# nothing, a scalar, under, at and past a vector, a block and a chunk
SIZES = [0, 1, 7, 8, 4096, 4097, 2**15 + 40]
INF, NAN = float("inf"), float("nan")
INTEGER = {2: torch.int16, 4: torch.int32}


@triton.jit
def _fma_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, tl.fma(x, x, -1.0))


@pytest.fixture
def single_rounding(device) -> None:
    """Skips where Triton's interpreter rounds an fma twice (3.6 does, 3.9 does not)."""
    x, out = torch.tensor([1 + 2**-12], device=device), torch.zeros(1, device=device)
    _fma_kernel[(1,)](x, out)
    if out.item() == 2**-11:  # 2⁻²⁴ is lost when x·x is rounded
        pytest.skip(ROUNDS_TWICE)
    assert out.item() == 2**-11 + 2**-24


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(INTEGER[tensor.element_size()])


def randn(
    size: int, dtype: torch.dtype, device: torch.device, seed: int, offset: int = 0
) -> Tensor:
    """Random weights whose address is `offset` elements past an allocation."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator).to(dtype).to(device)
    buffer = torch.full((size + offset,), NAN, dtype=dtype, device=device)
    buffer[offset:] = values
    return buffer[offset:]


def update(ref: Tensor, theta: Tensor, alpha: float, rounding: str, seed: int = 0) -> Tensor:
    """The moved copy of `ref`."""
    moved = ref.clone()
    ema_update_([moved], [theta], alpha, rounding=rounding, seed=seed)
    return moved


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` around fp64 `exact`, in fp64; equal where it is one itself."""
    nearest = exact.to(dtype)
    away = [torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (-INF, INF)]
    below, above = (
        torch.where(side, nearest, other).double()
        for side, other in zip((nearest <= exact, nearest >= exact), away, strict=True)
    )
    return below, above


def check_mean(draws: Tensor, exact: Tensor) -> None:
    """(R, n) independent roundings of fp64 (n,) `exact`: neighbours, and right on average.

    A draw is `above` with probability p, its variance is p(1 - p)·(above - below)². Each column is
    tested at 5 standard errors (6e-7 by chance), and so is their mean, R·n draws.
    """
    below, above = neighbours(exact, draws.dtype)
    values = draws.double().cpu()
    assert ((values == below) | (values == above)).all()
    gap = above - below
    up = (values > below).double()
    p = torch.where(gap > 0, (exact - below) / gap.clamp_min(1e-300), 0.0)
    repeats = len(draws)
    error = (p * (1 - p) / repeats).sqrt()
    # where p is all but 0 or 1 a single draw decides: it is no normal distribution
    normal = p * (1 - p) * repeats > 25
    z = ((up.mean(0) - p) / error)[normal]
    assert z.numel() > 0
    assert z.abs().max() < 5, z.abs().max()
    assert (z.mean() * math.sqrt(z.numel())).abs() < 5, z.mean()


@pytest.mark.parametrize(("ref_dtype", "dtype", "alpha"), diagonal(3, DTYPES, DTYPES, ALPHAS))
def test_nearest_equals_lerp_bit_for_bit(device, single_rounding, ref_dtype, dtype, alpha) -> None:
    """torch.lerp on the CPU, whose vectorised code multiplies and adds in one rounding as well."""
    refs = [randn(size, ref_dtype, device, seed) for seed, size in enumerate(SIZES)]
    thetas = [randn(size, dtype, device, 100 + seed) for seed, size in enumerate(SIZES)]
    expected = ema_naive([r.cpu() for r in refs], [t.cpu() for t in thetas], alpha)
    ema_update_(refs, thetas, alpha, rounding="nearest")
    for ref, want in zip(refs, expected, strict=True):
        assert bits(ref).equal(bits(want))


@pytest.mark.parametrize(("ref_dtype", "dtype"), PAIRS)
def test_nearest_against_fp64(device, ref_dtype, dtype) -> None:
    """Error at most twice that of torch's own update in the dtype of ref, plus half a unit."""
    ref, theta = randn(5000, ref_dtype, device, 1), randn(5000, dtype, device, 2)
    for alpha in ALPHAS:
        (exact,) = ema_naive([ref], [theta], alpha, dtype=torch.float64)
        moved = update(ref, theta, alpha, "nearest")
        torchs = ref.lerp(theta.to(ref_dtype), alpha)
        floor = torch.finfo(ref_dtype).eps / 2 * exact.abs().max()
        error, torch_error = ((x.double() - exact).abs().max() for x in (moved, torchs))
        assert error <= 2 * torch_error + floor


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_one_call_moves_hundreds_of_tensors(device, single_rounding, rounding, monkeypatch) -> None:
    """Mixed sizes, dtypes and alignments; one launch for what may share one."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 700, (300,), generator=generator).tolist()
    refs, thetas = [], []
    for i, (size, (ref_dtype, dtype)) in enumerate(zip(sizes, itertools.cycle(PAIRS))):
        refs.append(randn(size, ref_dtype, device, i, offset=i % 3))
        thetas.append(randn(size, dtype, device, 1000 + i, offset=i % 2))
    expected = ema_naive([r.cpu() for r in refs], [t.cpu() for t in thetas], 0.3)

    launches, kernel = [], ema._ema_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(ema, "_ema_kernel", Counted())
    ema_update_(refs, thetas, 0.3, rounding=rounding)
    assert len(launches) <= 2 * len(PAIRS)
    assert sum(grid[0] for grid in launches) == sum(size > 0 for size in sizes)  # a chunk each
    for ref, want in zip(refs, expected, strict=True):
        if rounding == "nearest" or ref.dtype == torch.float32:
            assert bits(ref).equal(bits(want))
        else:
            below, above = neighbours(want.double(), ref.dtype)  # want is the nearer of the two
            step = (above - below).clamp_min(torch.finfo(ref.dtype).eps * want.double().abs())
            assert ((ref.cpu().double() - want.double()).abs() <= step * 1.0001).all()


@pytest.mark.parametrize(
    ("ref_dtype", "dtype", "offsets", "rounding"),
    diagonal(2, DTYPES, DTYPES, [(1, 0), (0, 1), (3, 3)], ["nearest", "stochastic"]),
)
def test_misaligned_tensors(device, ref_dtype, dtype, offsets, rounding) -> None:
    """The same bits as aligned ones, random bits included, and nothing beside them is touched."""
    size = 4104
    ref, theta = randn(size, ref_dtype, device, 1), randn(size, dtype, device, 2)
    want = update(ref, theta, 0.3, rounding)
    buffer = torch.full((size + 20,), NAN, dtype=ref_dtype, device=device)
    start = offsets[0]
    buffer[start : start + size] = ref
    theta = randn(size, dtype, device, 2, offset=offsets[1])
    ema_update_([buffer[start : start + size]], [theta], 0.3, rounding=rounding)
    assert bits(buffer[start : start + size]).equal(bits(want))
    assert buffer[:start].isnan().all()
    assert buffer[start + size :].isnan().all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_one_copies_bits(device, dtype, rounding) -> None:
    """-0, subnormals, inf and the payloads of NaN too."""
    integer = INTEGER[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    info = torch.iinfo(integer)
    words = torch.randint(info.min, info.max + 1, (9001,), generator=generator, dtype=integer)
    theta = words.view(dtype).to(device)
    moved = update(torch.zeros_like(theta), theta, 1.0, rounding)
    assert bits(moved).equal(words)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("ref_dtype", "dtype"), PAIRS)
def test_alpha_one_converts_to_nearest(device, ref_dtype, dtype, rounding) -> None:
    ref, theta = randn(1000, ref_dtype, device, 1), randn(1000, dtype, device, 2)
    assert bits(update(ref, theta, 1.0, rounding)).equal(bits(theta.to(ref_dtype)))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("alpha", [0.0, 1e-60])  # the latter is 0 in fp32
def test_alpha_zero_does_nothing(device, alpha, rounding) -> None:
    for dtype in DTYPES:
        ref, theta = randn(100, dtype, device, 1), torch.full((100,), NAN, device=device)
        assert bits(update(ref, theta, alpha, rounding)).equal(bits(ref))


@pytest.mark.parametrize(
    ("dtype", "alpha", "rounding"),
    diagonal(2, DTYPES, [0.3, 0.5, 0.7], ["nearest", "stochastic"]),
)
def test_inf_and_nan_stay(device, dtype, alpha, rounding) -> None:
    """Those of (1-α)·ref + α·θ: equal infinities stay, where torch.lerp makes them NaN."""
    special = torch.tensor([INF, -INF, NAN, 1.0, 1.0, 1.0, INF, INF, -INF, NAN, 2.0], dtype=dtype)
    other = torch.tensor([1.0, 1.0, 1.0, INF, -INF, NAN, INF, -INF, -INF, NAN, 2.0], dtype=dtype)
    special, other = special.to(device), other.to(device)
    for ref, theta in ((special, other), (other, special)):
        want = (1 - alpha) * ref.cpu() + alpha * theta.cpu()
        moved = update(ref, theta, alpha, rounding).cpu()
        assert moved.isfinite().tolist() == [False] * 10 + [True]
        assert moved.isnan().equal(want.isnan())
        assert moved[~want.isnan()].equal(want[~want.isnan()])


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_does_not_overflow(device, dtype) -> None:
    """Past the largest number it rounds to nearest: a finite weight is not inf by bad luck."""
    largest = torch.finfo(dtype).max
    gap = 2.0 ** math.frexp(largest)[1] - largest
    exact = torch.tensor([largest - gap / 2, largest, largest + gap / 4], dtype=torch.float64)
    theta = exact.repeat_interleave(512).float().to(device)
    ref = theta.to(dtype)
    moved = update(ref, theta, 0.75, "stochastic").double().cpu()
    assert ref.isfinite().all()
    assert ((moved - theta.double().cpu()).abs() <= gap).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_of_representable_numbers(device, dtype) -> None:
    """No noise where there is nothing to round: equal weights stay equal."""
    ref = randn(5000, dtype, device, 0)
    for alpha in (0.1, 0.9):
        assert bits(update(ref, ref.clone(), alpha, "stochastic")).equal(bits(ref))


@pytest.mark.parametrize(
    ("dtype", "alpha", "theta_dtype"), diagonal(2, HALVES, [0.01, 0.7], DTYPES)
)
def test_stochastic_rounding_is_unbiased(device, dtype, alpha, theta_dtype) -> None:
    """Weights of many magnitudes, rounded 300 times: each has its own mean."""
    size, repeats = 512, 300
    scale = torch.logspace(-3, 2, size).to(device)
    ref = (randn(size, torch.float32, device, 1) * scale).to(dtype)
    theta = (randn(size, torch.float32, device, 2) * scale).to(theta_dtype)
    exact = torch.lerp(ref.cpu().float(), theta.cpu().float(), alpha).double()
    moved = update(ref.repeat(repeats), theta.repeat(repeats), alpha, "stochastic", seed=5)
    check_mean(moved.view(repeats, size), exact)


def test_stochastic_rounding_of_fp16_subnormals(device) -> None:
    """Below 2⁻¹⁴ fp16 is spaced by 2⁻²⁴: the probability is exact to 2⁻¹⁴ there too."""
    values = torch.cat([torch.linspace(0, 4 * 2**-24, 65), torch.linspace(2**-15, 2**-13, 64)])
    theta = torch.cat([values, -values]).to(device)
    repeats = 3000
    ref = torch.zeros(repeats * theta.numel(), dtype=torch.float16, device=device)
    moved = update(ref, theta.repeat(repeats), 0.75, "stochastic")
    exact = torch.lerp(torch.zeros(theta.numel()), theta.cpu(), 0.75).double()
    check_mean(moved.view(repeats, -1), exact)


def test_stochastic_rounding_of_bf16_subnormals(device) -> None:
    """bf16 has fp32's exponents: its subnormals (spaced by 2⁻¹³³) need no case of their own."""
    theta = torch.full((40000,), 2.0**-134, device=device)
    moved = update(theta.to(torch.bfloat16), theta, 0.75, "stochastic")
    assert torch.tensor([0.0, 2.0**-133], dtype=torch.bfloat16).equal(moved.cpu().unique())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_small_step_arrives(device, dtype) -> None:
    """α = 0.01 between weights 1% apart: of the movement, all of it; to nearest, hardly any."""
    size, alpha = 2**17, 0.01
    ref = (1 + 0.3 * randn(size, torch.float32, device, 1)).to(dtype)
    theta = (ref.float() * (1 + 0.01 * randn(size, torch.float32, device, 2))).to(dtype)
    step = alpha * (theta.double() - ref.double())
    share = {}
    for rounding in ("nearest", "stochastic"):
        moved = update(ref, theta, alpha, rounding).double() - ref.double()
        share[rounding] = ((moved * step.sign()).sum() / step.abs().sum()).item()
        error = ((moved - step).std() * math.sqrt(size) / step.abs().sum()).item()
        if rounding == "stochastic":
            assert abs(share[rounding] - 1) < 4 * error < 0.2
    assert share["nearest"] < 0.5


def test_random_bits_of_neighbours_are_independent(device) -> None:
    """Half-way between two numbers: the coins of elements 1 to 64, a block and a chunk apart."""
    size = 2**16
    ref = torch.ones(size, dtype=torch.bfloat16, device=device)
    theta = torch.full((size,), 1 + 2**-7, device=device)
    moved = update(ref, theta, 0.5, "stochastic").float()
    coins = torch.where(moved > 1, 1.0, -1.0).cpu()
    assert coins.mean().abs() < 4.5 / math.sqrt(size)
    for lag in (*range(1, 65), 512, 4096, 2**15):
        correlation = (coins[lag:] * coins[:-lag]).mean()
        assert correlation.abs() < 4.5 / math.sqrt(size - lag), lag


@pytest.mark.parametrize("dtype", HALVES)
def test_seed(device, dtype) -> None:
    """One seed gives one result; another seed, another tensor and another place another."""
    ref, theta = randn(1000, dtype, device, 1), randn(1000, dtype, device, 2)
    seeds = (0, 1, 2**31, 2**40 + 1, 2**63 - 1)
    results = [update(ref, theta, 0.3, "stochastic", seed) for seed in seeds]
    for seed, result in zip(seeds, results, strict=True):
        assert bits(update(ref, theta, 0.3, "stochastic", seed)).equal(bits(result))
    for a, b in itertools.combinations(results, 2):
        assert not bits(a).equal(bits(b))
    twins = [ref.clone(), ref.clone()]
    ema_update_(twins, [theta, theta], 0.3, rounding="stochastic", seed=0)
    assert bits(twins[0]).equal(bits(results[0]))
    assert not bits(twins[1]).equal(bits(results[0]))


def test_seed_does_not_depend_on_the_launch(device, monkeypatch) -> None:
    ref, theta = randn(9000, torch.bfloat16, device, 1), randn(9000, torch.bfloat16, device, 2)
    want = update(ref, theta, 0.3, "stochastic")
    small = {backend: ema.Launch(block=1024, num_warps=4) for backend in ema.EMA_LAUNCH}
    monkeypatch.setattr(ema, "EMA_LAUNCH", small)
    monkeypatch.setattr(ema, "_CHUNK", 2048)
    assert bits(update(ref, theta, 0.3, "stochastic")).equal(bits(want))


@pytest.mark.parametrize(
    ("size", "ref_offset", "offset", "aligned"),
    [(64, 0, 0, True), (64, 1, 0, False), (64, 0, 1, False), (64, 8, 8, True), (63, 0, 0, False)],
)
def test_only_aligned_tensors_are_promised_to_be(device, size, ref_offset, offset, aligned) -> None:
    """The interpreter believes any promise of alignment, a GPU faults or writes past the end."""
    ref = randn(size, torch.bfloat16, device, 1, ref_offset)
    theta = randn(size, torch.bfloat16, device, 2, offset)
    ((key, _),) = ema._group([ref], [theta]).items()
    assert key == (ref.device, ref.dtype, theta.dtype, aligned)


def test_lists_may_be_empty(device) -> None:
    ema_update_([], [], 0.5, rounding="nearest")
    ema_update_(
        [torch.empty(0, device=device)], [torch.empty(0, device=device)], 0.5, rounding="nearest"
    )


def test_weights_that_require_gradients(device) -> None:
    """Parameters and shapes of any rank are taken as they are."""
    ref = torch.nn.Parameter(torch.zeros(3, 4, 5, device=device))
    theta = torch.nn.Parameter(torch.ones(3, 4, 5, device=device))
    for alpha in (0.25, 1.0):
        ema_update_([ref], [theta], alpha, rounding="nearest")
        assert (ref == alpha).all()


def test_invariants_are_asserted(device) -> None:
    a, b = torch.zeros(4, 4, device=device), torch.ones(4, 4, device=device)
    for refs, thetas in (
        ([a], [b, b]),  # lengths
        ([a], [b[:2]]),  # shapes
        ([a.t()[:2]], [b[:2]]),  # not contiguous
        ([a[:2]], [b.t()[:2]]),
        ([a, a], [b, b]),  # a tied weight, twice
        ([a.double()], [b]),  # a dtype without a kernel
    ):
        with pytest.raises(AssertionError):
            ema_update_(refs, thetas, 0.5, rounding="nearest")
    for alpha in (-0.1, 1.1, NAN):
        with pytest.raises(AssertionError):
            ema_update_([a], [b], alpha, rounding="nearest")
    with pytest.raises(AssertionError):
        ema_update_([a], [b], 0.5, rounding="up")


def test_offsets_past_2_31(device, untouched_bytes) -> None:
    """The last chunk of a tensor of 2³¹ + 4,096 elements: its row of the table, launched alone."""
    size = 2**31 + 4096
    ref, theta = (untouched_bytes(2 * size, device).view(torch.bfloat16) for _ in range(2))
    last = size // ema._CHUNK * ema._CHUNK
    ref[last:], theta[last:] = 1.0, 3.0
    # program 0 is chunk size // CHUNK of the tensor: the first lies that many programs before it
    row = [ref.data_ptr(), theta.data_ptr(), size, -(size // ema._CHUNK), 0]
    launch = ema.EMA_LAUNCH["cuda"]
    ema._ema_kernel[(1,)](
        torch.tensor([row], device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        0.25,
        0,
        REF=ema.TRITON_DTYPE[torch.bfloat16],
        THETA=ema.TRITON_DTYPE[torch.bfloat16],
        STOCHASTIC=True,
        ALIGNED=True,
        CHUNK=ema._CHUNK,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    assert last > 2**31 - ema._CHUNK
    assert (ref[last:] == 1.5).all()
    assert (ref[:4096] == 0).all() or device.type != "cpu"  # that memory is not cleared
