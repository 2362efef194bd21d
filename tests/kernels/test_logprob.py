"""The tile kernels against fp64: error at most twice PyTorch's in the same dtype, plus rounding."""

import math
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.diagonal import diagonal
from tralign_kernels import logprob, logprob_backward_, logprob_forward_, logprob_naive
from tralign_kernels.launch import Launch
from tralign_kernels.logprob import BACKWARD_LAUNCH, FORWARD_LAUNCH, tanh_and_slope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {"softcap": 30.0},
    {"logit_scale": 0.0625},
    {"inverse_temperature": 1 / 0.7},
    {"softcap": 5.0, "logit_scale": 0.5, "inverse_temperature": 1.7},
]
INF, NAN = float("inf"), float("nan")
V = 5104  # of the tests in tiles: the widths below
WIDTHS = (1000, 7, 4097)


def make(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a spread (4) at which a few columns hold the mass, targets, gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(0, columns, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator)
    return logits.to(device), targets.to(device), grad.to(device)


def no_column(rows: int, device: torch.device) -> Tensor:
    """The logsumexp before the first tile."""
    return torch.tensor([[-INF, 0.0]], device=device).repeat(rows, 1)


def run(
    logits: Tensor, targets: Tensor, grad: Tensor, widths: Sequence[int] = (), **options
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp, target_logit, d logits), tile by tile.

    Each tile is the left part of a buffer of NaN with wider rows; the rest must stay NaN.
    """
    rows, columns = logits.shape
    widths = widths or (columns,)
    assert sum(widths) == columns
    logsumexp = no_column(rows, device=logits.device)
    target_logit = torch.full((rows,), NAN, device=logits.device)
    d_logits = torch.full_like(logits, NAN)
    parts, start = [], 0
    for width in widths:
        buffer = logits.new_full((rows, width + 9), NAN)
        buffer[:, :width] = logits[:, start : start + width]
        parts.append((start, width, buffer))
        start += width
    for start, width, buffer in parts:
        logprob_forward_(buffer[:, :width], targets, start, logsumexp, target_logit, **options)
        assert buffer[:, :width].equal(logits[:, start : start + width]) or logits.isnan().any()
    for start, width, buffer in parts:
        logprob_backward_(buffer[:, :width], targets, start, logsumexp, grad, **options)
        assert buffer[:, width:].isnan().all()
        d_logits[:, start : start + width] = buffer[:, :width]
    return logsumexp.sum(1), target_logit, d_logits


def check(
    actual: Sequence[Tensor],
    logits: Tensor,
    targets: Tensor,
    grad: Tensor,
    tiles: int = 1,
    **options,
) -> None:
    """`actual` = (logsumexp, target_logit, d logits) against fp64.

    Rounding floor: half a unit in the last place of the largest value, for storing it. The running
    logsumexp is stored once a tile; the gradient inherits the error of that input, which
    exp(z - logsumexp) turns into a relative error of each probability.
    """
    logits, targets, grad = logits.cpu(), targets.cpu(), grad.cpu()
    exact = logprob_naive(logits, targets, grad, **options)
    torchs = logprob_naive(logits, targets, grad, dtype=torch.float32, **options)
    torchs = (*torchs[:2], torchs[2].to(logits.dtype))
    _, _, without_target = logprob_naive(
        logits, targets.new_full((), -1).expand_as(targets), grad, **options
    )
    half_units = [
        torch.finfo(t.dtype).eps / 2 * largest(want) for t, want in zip(torchs, exact, strict=True)
    ]
    logsumexp_floor = tiles * half_units[0]
    floors = (
        logsumexp_floor,
        half_units[1],
        half_units[2] + logsumexp_floor * largest(without_target),
    )
    for name, got, torch_got, want, floor in zip(
        ("logsumexp", "target_logit", "d_logits"), actual, torchs, exact, floors, strict=True
    ):
        got = got.cpu()
        assert got.dtype == torch_got.dtype, name
        assert got.isnan().equal(want.isnan()), name
        infinite = want.isinf()
        assert got[infinite].double().equal(want[infinite]), name
        error = largest(got.double() - want)
        torch_error = largest(torch_got.double() - want)
        assert error <= 2 * torch_error + floor, (name, error, torch_error, floor)


def largest(values: Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    return values[values.isfinite()].abs().max().item() if values.isfinite().any() else 0.0


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), diagonal(3, [1, 3, 17], [1, 7, 1000, 4097], DTYPES)
)
def test_one_tile(device, rows, columns, dtype) -> None:
    inputs = make(rows, columns, dtype, device)
    check(run(*inputs), *inputs)


@pytest.mark.parametrize(("offset", "dtype"), diagonal(3, [-1, 0, 1], DTYPES))
def test_widths_around_the_blocks(device, offset, dtype) -> None:
    for block in {launch.block for launch in (*FORWARD_LAUNCH.values(), *BACKWARD_LAUNCH.values())}:
        for width in (block + offset, 2 * block + offset):
            inputs = make(2, width, dtype, device)
            check(run(*inputs), *inputs)


@pytest.mark.parametrize(("options", "dtype"), diagonal(3, OPTIONS, DTYPES), ids=str)
def test_options(device, options, dtype) -> None:
    inputs = make(17, 1000, dtype, device)
    check(run(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize(("options", "dtype"), diagonal(3, [{}, *OPTIONS], DTYPES), ids=str)
def test_tiles(device, options, dtype) -> None:
    logits, targets, grad = make(9, V, dtype, device)
    # first and last column of each tile, the rest anywhere
    targets[:6] = torch.tensor([0, 999, 1000, 1006, 1007, V - 1])
    actual = run(logits, targets, grad, WIDTHS, **options)
    check(actual, logits, targets, grad, tiles=len(WIDTHS), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(device, dtype) -> None:
    """The running logsumexp is rounded once a tile."""
    inputs = make(2, 320, dtype, device)
    logsumexp, _, _ = run(*inputs, widths=(10,) * 32)
    exact, _, _ = logprob_naive(*(t.cpu() for t in inputs))
    # 32 roundings; of a random walk of half units, less than √32 of them
    assert (logsumexp.cpu().double() - exact).abs().max() <= 32**0.5 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("offset", [0, 1_000, -10_000, 100_000])
@pytest.mark.parametrize("widths", [(V,), WIDTHS])
def test_a_common_offset_costs_no_digits(device, offset, widths) -> None:
    """Log-probs and gradients as good as log_softmax makes them, which subtracts first."""
    logits, targets, grad = make(9, V, torch.float32, device)
    logits += offset
    logsumexp, target_logit = no_column(9, device), torch.full((9,), NAN, device=device)
    parts = [part.clone() for part in logits.split(widths, 1)]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    for part, start in zip(parts, starts, strict=True):
        logprob_forward_(part, targets, start, logsumexp, target_logit)
    for part, start in zip(parts, starts, strict=True):
        logprob_backward_(part, targets, start, logsumexp, grad)
    results = [(target_logit - logsumexp[:, 0] - logsumexp[:, 1]).cpu(), torch.cat(parts, 1).cpu()]
    for dtype in (torch.float32, torch.float64):
        leaf = logits.cpu().to(dtype).requires_grad_()
        out = leaf.log_softmax(1).gather(1, targets.cpu()[:, None])[:, 0]
        results += [out.detach(), *torch.autograd.grad(out, leaf, grad.cpu().to(dtype))]
    for ours, theirs, exact in zip(results[:2], results[2:4], results[4:], strict=True):
        error, allowed = largest(ours - exact), 2 * largest(theirs - exact)
        assert error <= allowed + 2**-24 * largest(exact), (error, allowed)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=str)
def test_int_options(device, options) -> None:
    """A Python int is a factor like any other (Triton would type it as an integer)."""
    inputs = make(3, 100, torch.float32, device)
    options = {**options, "logit_scale": 2, "inverse_temperature": 1}
    check(run(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_outside_every_tile(device, dtype) -> None:
    logits, _, grad = make(6, V, dtype, device)
    targets = torch.tensor([-100, -1, V, V + 1000, 2**40, 5], device=device)
    logsumexp, target_logit, d_logits = run(logits, targets, grad, WIDTHS)
    assert target_logit.isnan().tolist() == [True] * 5 + [False]
    check((logsumexp, target_logit, d_logits), logits, targets, grad, tiles=len(WIDTHS))


def test_target_in_another_tile_is_left_alone(device) -> None:
    logits, _, _ = make(4, 10, torch.float32, device)
    targets = torch.tensor([99, 100, 109, 110], device=device)
    target_logit = torch.full((4,), 7.0, device=device)
    logprob_forward_(logits, targets, 100, no_column(4, device), target_logit)
    expected = [7.0, logits[1, 0].item(), logits[2, 9].item(), 7.0]
    assert target_logit.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_do_not_overflow(device, dtype) -> None:
    # many rows: of a row, one or two columns have a gradient, too few to compare the worst of
    logits, targets, grad = make(64, 300, dtype, device)
    logits = (logits.float() * 1000).to(dtype)  # up to 2e4; fp16 ends at 65,504
    check(run(logits, targets, grad), logits, targets, grad)
    check(run(logits, targets, grad, softcap=30.0), logits, targets, grad, softcap=30.0)


@pytest.mark.parametrize(
    ("options", "dtype"), diagonal(2, [{}, {"softcap": 30.0}], DTYPES), ids=str
)
def test_masked_columns(device, options, dtype) -> None:
    """Logits of -inf: scattered, a whole first tile, a whole later tile, and a masked target."""
    logits, targets, grad = make(5, V, dtype, device)
    logits[0, ::3] = -INF
    logits[1, :1007] = -INF
    logits[2, 1007:] = -INF
    logits[3, targets[3]] = -INF
    targets[1], targets[2] = 5000, 3
    actual = run(logits, targets, grad, WIDTHS, **options)
    check(actual, logits, targets, grad, tiles=len(WIDTHS), **options)
    assert not actual[0].isnan().any()
    assert not actual[2].isnan().any()
    if not options:
        assert (actual[2][logits == -INF][:1700] == 0).all()  # row 0, whose target is elsewhere


def test_row_of_masked_columns(device) -> None:
    """Nothing left: logsumexp is -inf, as torch.logsumexp has it, and not NaN."""
    logits, targets, grad = make(2, V, torch.float32, device)
    logits[0] = -INF
    logsumexp, target_logit, d_logits = run(logits, targets, grad, WIDTHS)
    assert logsumexp[0] == -INF
    assert target_logit[0] == -INF
    kept = (logsumexp[1:], target_logit[1:], d_logits[1:])
    check(kept, logits[1:], targets[1:], grad[1:], tiles=len(WIDTHS))


# in the first and the last tile, in the first and the second block of a tile
@pytest.mark.parametrize(
    ("column", "dtype", "bad"), diagonal(2, [0, 500, 1003, 1007, V - 1], DTYPES, [NAN, INF])
)
def test_bad_logits_spoil_their_row_only(device, column, dtype, bad) -> None:
    logits, targets, grad = make(3, V, dtype, device)
    targets.fill_(700)
    logits[1, column] = bad
    logsumexp, target_logit, d_logits = run(logits, targets, grad, WIDTHS)
    assert not (target_logit - logsumexp)[1].isfinite()
    assert not d_logits[1].isfinite().any()
    keep = torch.tensor([0, 2])
    kept = [t.cpu()[keep] for t in (logsumexp, target_logit, d_logits)]
    inputs = [t.cpu()[keep] for t in (logits, targets, grad)]
    check(kept, *inputs, tiles=len(WIDTHS))


def test_tile_of_nan_after_a_good_one(device) -> None:
    logits, targets, grad = make(2, V, torch.float32, device)
    logits[0, 1000:] = NAN
    targets.fill_(1)
    logsumexp, _, _ = run(logits, targets, grad, WIDTHS)
    assert logsumexp.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_do(device, shape) -> None:
    rows = shape[0]
    logits = torch.empty(shape, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    logsumexp = torch.full((rows, 2), 1.5, device=device)
    target_logit = torch.full((rows,), NAN, device=device)
    logprob_forward_(logits, targets, 0, logsumexp, target_logit)
    logprob_backward_(logits, targets, 0, logsumexp, torch.ones_like(target_logit))
    assert (logsumexp == 1.5).all()
    assert target_logit.isnan().all()


def test_strided_vectors(device) -> None:
    """Every second target; the gradient of a sum, which is one number expanded."""
    logits, _, _ = make(4, 100, torch.float32, device)
    targets = torch.arange(8, device=device)[::2]
    grad = torch.tensor(0.5, device=device).expand(4)
    check(run(logits, targets, grad), logits, targets, grad)


def test_columns_must_be_contiguous(device) -> None:
    logits, targets, grad = make(4, 100, torch.float32, device)
    with pytest.raises(AssertionError):
        logprob_forward_(logits[:, ::2], targets, 0, no_column(4, device), grad.clone())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_without_bias(device, dtype) -> None:
    """The mean residual is zero within 4 standard errors."""
    logits, targets, _ = make(16, 4096, dtype, device)
    logits /= 8  # no column below the subnormals of fp16
    grad = torch.full((16,), 64.0, device=device)
    _, _, d_logits = run(logits, targets, grad)
    _, _, exact = logprob_naive(logits.cpu(), targets.cpu(), grad.cpu())
    residual = (d_logits.cpu().double() - exact) / exact
    standard_error = residual.std() / math.sqrt(residual.numel())
    assert residual.mean().abs() <= 4 * standard_error


def test_offsets_past_2_31(device, untouched_bytes) -> None:
    """Four rows, two of them past 2³¹ logits, with a stride that fits in int32."""
    stride, width = 2**30 + 64, 100
    memory = untouched_bytes(2 * (3 * stride + width), device).view(torch.bfloat16)
    logits = memory.as_strided((4, width), (stride, 1))
    source, targets, grad = make(4, width, torch.bfloat16, device)
    logits.copy_(source)
    logsumexp = no_column(4, device)
    target_logit = torch.full((4,), NAN, device=device)
    logprob_forward_(logits, targets, 0, logsumexp, target_logit)
    logprob_backward_(logits, targets, 0, logsumexp, grad)
    check((logsumexp.sum(1), target_logit, logits), source, targets, grad)


@triton.jit
def _tanh_kernel(x_ptr, tanh_ptr, slope_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    t, slope = tanh_and_slope(tl.load(x_ptr + index))
    tl.store(tanh_ptr + index, t)
    tl.store(slope_ptr + index, slope)


def test_tanh(device) -> None:
    """Relative errors as promised from 1e-30 to overflow, odd, ±1 at ±inf, NaN at NaN."""
    x = torch.cat([torch.logspace(-30, 4, 8160), torch.linspace(0.4, 0.6, 20), torch.zeros(12)])
    x[-4:] = torch.tensor([INF, 88.7, 100.0, 3e38])
    x = torch.cat([x, -x]).to(device)
    y, slope = torch.full_like(x, NAN), torch.full_like(x, NAN)
    _tanh_kernel[(1,)](x, y, slope, BLOCK=x.numel())
    exact = x.double().tanh()
    assert (y - exact).abs().le(2**-21 * exact.abs()).all()
    # sech² without cancellation. Past |x| = 40 it is under 1e-34 and may flush to 0. GPUs compute
    # exp(2u) as 2^(2u·log₂e), whose rounded exponent costs a relative |u|·2⁻²²
    exact = x.double().cosh().pow(-2)
    bound = 2**-20 + 2**-21 * x.double().abs().clamp_max(40)
    assert (slope - exact).abs().le(bound * exact + 1e-34).all()
    x[0] = NAN
    _tanh_kernel[(1,)](x, y, slope, BLOCK=x.numel())
    assert y[0].isnan()
    assert slope[0].isnan()


@pytest.mark.parametrize(("options", "dtype"), diagonal(3, [{}, *OPTIONS], DTYPES), ids=str)
def test_statistics(dtype, options, device):
    """In tiles, one of which is masked as a whole, against fp64 over all columns."""
    logits, targets, _ = make(6, V, dtype, device)
    logits[:, : WIDTHS[0]] = -INF if "softcap" not in options else 0.0
    targets = targets.clamp(min=WIDTHS[0])
    targets[::2] = logits.argmax(1)[::2]
    plain, tiles = (no_column(6, device), torch.full((6,), NAN, device=device)), []
    logsumexp, target_logit = no_column(6, device), torch.full((6,), NAN, device=device)
    statistics = torch.zeros(5, 6, device=device)
    statistics[2] = -INF
    start = 0
    for width in WIDTHS:
        tile = logits[:, start : start + width]
        logprob_forward_(tile, targets, start, *plain, **options)
        logprob_forward_(
            tile, targets, start, logsumexp, target_logit, statistics=statistics, **options
        )
        tiles.append(tile.double())
        start += width
    torch.testing.assert_close(logsumexp.sum(1), plain[0].sum(1), rtol=1e-6, atol=1e-6)
    assert target_logit.equal(plain[1])
    z = torch.cat(tiles, 1) * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    z = z * options.get("inverse_temperature", 1.0)
    p = z.softmax(1)
    entropy, squares, peak, top1, total = statistics.double()
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, p.square().sum(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(peak, z.amax(1), rtol=1e-5, atol=1e-5)
    assert top1.bool().equal(z.argmax(1) == targets)
    torch.testing.assert_close(total, z.sum(1), rtol=1e-5, atol=1e-2)


def test_an_argmax_is_the_first_of_the_largest(monkeypatch, device):
    """Wherever, by blocks of 16 columns, the target stands and another one a little lower, as high
    or higher; the last target is of another tile."""
    launches = dict.fromkeys(logprob.STATISTICS_LAUNCH, Launch(block=16, num_warps=1))
    monkeypatch.setattr(logprob, "STATISTICS_LAUNCH", launches)
    places = (0, 1, 15, 16, 17, 31, 32, 40, 49)
    cases = [(a, b, more) for a in places for b in places for more in (-1, 0, 1) if a != b]
    targets = torch.tensor([a for a, _, _ in cases] + [60])
    logits = torch.zeros(len(targets), 50)
    for row, (target, other, more) in zip(logits, cases, strict=False):
        row[target], row[other] = 5, 5 + more
    rows = len(targets)
    statistics = torch.zeros(5, rows, device=device)
    statistics[2] = -INF
    logprob_forward_(
        logits.to(device), targets.to(device), 0, no_column(rows, device),
        torch.full((rows,), NAN, device=device), statistics=statistics,
    )  # fmt: skip
    expected = [more < 0 or (more == 0 and a < b) for a, b, more in cases]
    assert statistics[3].bool().tolist() == [*expected, False]
