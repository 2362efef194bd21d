"""Adafactor's step against fp64: matrices, stacks, vectors; bits that must not depend on much."""

import math
from itertools import product

import pytest
import torch

from tests.diagonal import diagonal
from tests.kernels.test_ema import bits, check_mean
from tralign_kernels import (
    AdafactorOptions,
    AdafactorShard,
    adafactor,
    adafactor_naive,
    adafactor_step_,
)

INF, NAN = math.inf, math.nan
# one element; odd; one row, one column; a stack; groups and tiles that are not full
SHAPES = [(), (7,), (1, 1), (1, 70), (70, 1), (40, 12), (3, 16, 8), (2, 2, 3, 5), (35, 300)]
OPTIONS = AdafactorOptions(lr=0.1, step=3, decay=-0.8, eps=1e-30, eps_scale=1e-3, weight_decay=0.05)


class Case:
    """A weight with states and all that the kernel writes; what it writes first is NaN."""

    def __init__(self, shape, dtype, device, scale=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(size, generator=generator)

        self.weight = random(*shape).to(dtype).to(device)
        self.grad = (random(*shape) * scale).to(dtype).to(device)
        own = [shape] if len(shape) < 2 else [shape[:-1], shape[:-2] + shape[-1:]]
        self.squares = tuple((random(*s).square() * scale**2).to(device) for s in own)
        self.found_inf = torch.zeros((), device=device)
        self.left_out = torch.zeros(1, device=device)
        self.rms = torch.full((), NAN, device=device)

    def step(self, options=OPTIONS, **random):
        adafactor_step_(
            self.weight, self.grad, self.squares, self.found_inf, self.left_out, self.rms,
            options, **random,
        )  # fmt: skip

    def written(self):
        return [t.clone() for t in (self.weight, *self.squares, self.rms)]


@pytest.fixture(autouse=True)
def scratch_of_nan(monkeypatch):
    whole = adafactor._scratch
    monkeypatch.setattr(adafactor, "_scratch", lambda *a: [part.fill_(NAN) for part in whole(*a)])


@pytest.mark.parametrize(("scaled", "scale"), [(False, 1e-4), (False, 1.0), (True, 30.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_to_its_rounding(device, shape, scale, scaled):
    case = Case(shape, torch.float32, device, scale)
    options = OPTIONS._replace(scale=scaled)
    before = case.weight.clone()
    want, squares = adafactor_naive(case.weight, case.grad, case.squares, options)
    case.step(options)
    torch.testing.assert_close(case.weight.double(), want, rtol=1e-6, atol=5e-7)
    assert not torch.equal(case.weight, before)
    for found, expected in zip(case.squares, squares, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    if scaled:
        assert case.rms.item() == pytest.approx(before.double().square().mean().sqrt().item(), 1e-6)
    else:
        assert case.rms.isnan()
    assert case.found_inf == case.left_out == 0


@pytest.mark.parametrize("threshold", [1e-3, 1e3])
@pytest.mark.parametrize("shape", [(5000,), (300, 40), (9, 5001), (3, 8400)])
def test_several_programs_parts_and_groups(device, shape, threshold, monkeypatch):
    """Clipped and not; the first step, of empty states."""
    monkeypatch.setattr(adafactor, "_SUMS", 16)
    case = Case(shape, torch.float32, device)
    for square in case.squares:
        square.zero_()
    options = OPTIONS._replace(step=1, threshold=threshold)
    want, squares = adafactor_naive(case.weight, case.grad, case.squares, options)
    case.step(options)
    torch.testing.assert_close(case.weight.double(), want, rtol=1e-6, atol=5e-7)
    for found, expected in zip(case.squares, squares, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(133,), (2, 67)])
def test_halves_are_rounded_without_bias(device, shape, dtype):
    """200 copies, over which the means of squares are what they are over one."""
    repeats, size = 200, math.prod(shape)
    case = Case(shape, dtype, device)
    want, _ = adafactor_naive(case.weight, case.grad, case.squares, OPTIONS)
    case.weight, case.grad = (
        t.expand(repeats, *shape).flatten(0, 1).contiguous() for t in (case.weight, case.grad)
    )
    first = case.squares[0].repeat(repeats)
    case.squares = (first, *case.squares[1:])
    case.step(seed=4, first_counter=5)
    check_mean(case.weight.view(repeats, size), want.flatten().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (64, 64)])
def test_the_largest_number_never_becomes_infinite(device, shape, dtype):
    case = Case(shape, dtype, device)
    largest = torch.finfo(dtype).max
    case.weight.fill_(largest)
    case.grad.fill_(-1.0)  # an update that is far less than the spacing there
    for seed in range(2):
        case.step(OPTIONS._replace(weight_decay=0.0), seed=seed)
    assert (case.weight == largest).all()


# of the shape that takes the interpreter longest `make test` has three
LARGE = (3, 8400)
OF_LARGE = ((torch.float32, False, NAN), (torch.bfloat16, True, INF), (torch.bfloat16, False, -INF))
KINDS = ((torch.float32, torch.bfloat16), (False, True), (INF, -INF, NAN))
NOT_FINITE = [
    *diagonal(2, *KINDS, ((7,), (5000,), (40, 12), (3, 16, 8))),
    *(
        pytest.param(*case, LARGE, marks=() if case in OF_LARGE else pytest.mark.matrix)
        for case in product(*KINDS)
    ),
]


@pytest.mark.parametrize(("dtype", "scaled", "value", "shape"), NOT_FINITE)
def test_a_gradient_that_is_not_finite(device, dtype, shape, scaled, value):
    """Nothing is written but the flag and the count; nor at the next parameter."""
    case = Case(shape, dtype, device)
    case.grad.view(-1)[-2] = value
    before = case.written()
    for count in (1, 2):
        case.step(OPTIONS._replace(scale=scaled))
        assert all(
            torch.equal(bits(a), bits(b)) for a, b in zip(before, case.written(), strict=False)
        )
        assert case.found_inf == 1
        assert case.left_out == count
        case.grad.view(-1)[-2] = 1.0


@pytest.mark.parametrize("shape", [(7,), (40, 12)])
def test_finite_gradients_whose_squares_overflow_are_finite(device, shape):
    case = Case(shape, torch.float32, device)
    case.grad.view(-1)[0] = 1e30
    case.step()
    assert case.found_inf == 0


@pytest.mark.parametrize("shape", [(7,), (40, 12)])
def test_steps_that_were_left_out_do_not_count(device, shape):
    a, b = Case(shape, torch.float32, device), Case(shape, torch.float32, device)
    a.left_out.fill_(2.0)
    a.step(OPTIONS._replace(step=5))
    b.step(OPTIONS)
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(a.squares, b.squares, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [64, 70])
def test_bits_do_not_depend_on_the_launch(device, columns, monkeypatch):
    """Those of the noise: the statistics' sums may round differently, here they are exact."""
    results = []
    for tiles in ({64: 64, 256: 16, 1024: 4}, {1024: 4}, {16: 8}):
        monkeypatch.setattr(adafactor, "_TILES", tiles)
        case = Case((20, columns), torch.bfloat16, device)
        case.step(seed=3)
        results.append(bits(case.weight))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])
    other = Case((20, columns), torch.bfloat16, device)
    other.step(seed=3, first_counter=1000)
    assert not bits(other.weight).equal(results[0])


@pytest.mark.parametrize(
    ("shape", "launches"), [((9,), 1), ((5000,), 2), ((40, 12), 3), ((3, 16, 8), 3), ((0, 4), 0)]
)
def test_launches(device, shape, launches, monkeypatch):
    count = []
    for name in ("statistics", "factors", "update", "vector"):
        kernel = getattr(adafactor, f"_adafactor_{name}_kernel")

        class Counted:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                count.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(adafactor, f"_adafactor_{name}_kernel", Counted(kernel))
    case = Case(shape, torch.bfloat16, device)
    case.step()
    assert len(count) == launches == adafactor.launches_of(case.weight)


def test_invariants_are_asserted(device):
    for change in (
        {"weight": torch.zeros(4, 6, dtype=torch.float64, device=device)},
        {"grad": torch.zeros(4, 6, dtype=torch.float16, device=device)},
        {"grad": torch.zeros(6, 4, device=device).t()},
        {"squares": (torch.zeros(4, device=device),)},
        {"found_inf": torch.zeros(2, device=device)},
    ):
        case = Case((4, 6), torch.float32, device)
        vars(case).update(change)
        with pytest.raises(AssertionError):
            case.step()


@pytest.mark.parametrize(("scaled", "bad"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [(7,), (17000,), (3, 70), (3, 16, 8), (35, 300)])
def test_shards_step_as_the_whole_does(device, shape, scaled, bad):
    """Four shards, the last of which may have nothing; their sums are added up in between."""
    options = OPTIONS._replace(scale=scaled)
    whole = Case(shape, torch.float32, device)
    cases = [Case(shape, torch.float32, device) for _ in range(4)]
    if bad:
        for case in (whole, *cases):
            case.grad.view(-1)[-1] = INF
    size = -(-shape[0] // 4)
    parts = [slice(min(i * size, shape[0]), min((i + 1) * size, shape[0])) for i in range(4)]
    whole.step(options)
    steps = []
    for case, part in zip(cases, parts, strict=True):
        case.weight, case.grad = case.weight[part].clone(), case.grad[part].clone()
        own = (0,) if len(shape) == 2 else (0, 1)  # squares that are cut
        case.squares = tuple(
            s[part].clone() if i in own else s.clone() for i, s in enumerate(case.squares)
        )
        steps.append(AdafactorShard(
            case.weight, case.grad, shape, case.squares, case.found_inf, case.left_out,
            case.rms, options,
        ))  # fmt: skip
    sums = torch.stack([step.sums for step in steps]).sum(0)
    found_inf = torch.stack([case.found_inf for case in cases]).amax()
    assert float(found_inf) == float(whole.found_inf) == bad
    for step in steps:
        step.finish(sums, found_inf)
    held = [case for case in cases if case.weight.numel()]
    found = torch.cat([case.weight for case in held])
    torch.testing.assert_close(found, whole.weight, rtol=1e-6, atol=5e-7)
    for i, expected in enumerate(whole.squares):
        cut = len(shape) != 2 or i == 0
        pieces = torch.cat([c.squares[i] for c in held]) if cut else held[0].squares[i]
        torch.testing.assert_close(pieces, expected, rtol=2e-6, atol=0)
    assert {float(case.left_out) for case in cases} == {float(whole.left_out)} == {float(bad)}
    for case in held:
        if scaled and not bad:
            torch.testing.assert_close(case.rms, whole.rms)
