"""AdamW's step against fp64 and torch's own."""

import math

import pytest
import torch

from tests.diagonal import diagonal
from tests.kernels.test_ema import bits, check_mean
from tralign_kernels import AdamWOptions, adamw, adamw_naive, adamw_step_

INF, NAN = math.inf, math.nan
OPTIONS = AdamWOptions(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
SIZES = [1, 7, 4096, 4097, 2**15 + 40]


class Case:
    def __init__(self, size, dtype, state_dtype, device, step=2):
        generator = torch.Generator().manual_seed(size)
        m, g, w, v = torch.randn(4, size, generator=generator)
        self.weight, self.grad = w.to(dtype).to(device), g.to(dtype).to(device)
        self.states = [m.to(state_dtype).to(device), v.square().to(state_dtype).to(device)]
        self.step_count = torch.tensor(float(step - 1), device=device)
        self.found_inf = torch.zeros((), device=device)

    def step(self, options=OPTIONS, **random):
        adamw_step_(
            self.weight, self.grad, *self.states, self.step_count, self.found_inf, options, **random
        )

    def written(self):
        return [t.clone() for t in (self.weight, *self.states, self.step_count)]


@pytest.mark.parametrize(
    ("size", "step"), [*((size, 2) for size in SIZES), *((7, s) for s in (1, 1000, 1_000_000))]
)
def test_fp32_to_its_rounding(device, size, step):
    case = Case(size, torch.float32, torch.float32, device, step)
    want = adamw_naive(case.weight, case.grad, *case.states, step, OPTIONS)
    case.step()
    for found, expected in zip(case.written(), want, strict=False):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=5e-7)
    assert case.step_count == step
    assert case.found_inf == 0


@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.5)}, {"eps": 0.1, "weight_decay": 0.0}])
def test_it_is_torchs_adamw(device, options):
    case = Case(5000, torch.float32, torch.float32, device, step=1)
    for state in case.states:
        state.zero_()
    options = OPTIONS._replace(**options)
    weight = torch.nn.Parameter(case.weight.clone())
    theirs = torch.optim.AdamW([weight], **options._asdict())
    for _ in range(3):
        weight.grad = case.grad.clone()
        theirs.step()
        case.step(options)
        case.grad.mul_(-0.7)
    state = theirs.state[weight]
    for mine, expected in zip(
        case.written(), (weight.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False
    ):
        torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-6)
    assert case.step_count == state["step"]


@pytest.mark.parametrize("state_dtype", ["half", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_without_bias(device, dtype, state_dtype):
    """200 copies of 60 elements in one call: each has its own mean."""
    size, repeats = 60, 200
    state_dtype = dtype if state_dtype == "half" else state_dtype
    case = Case(size, dtype, state_dtype, device)
    want = adamw_naive(case.weight, case.grad, *case.states, 2, OPTIONS)
    case.weight, case.grad = case.weight.repeat(repeats), case.grad.repeat(repeats)
    case.states = [state.repeat(repeats) for state in case.states]
    case.step(seed=5, first_counter=7)
    for index in [0] if state_dtype == torch.float32 else [0, 1, 2]:
        check_mean(case.written()[index].view(repeats, size), want[index].cpu())


def test_bits_of_weight_and_states_are_independent(device):
    """Numbers that lie half-way between two: three coins an element."""
    size = 2**14
    case = Case(size, torch.bfloat16, torch.bfloat16, device, step=1)
    for tensor, value in zip(
        (case.weight, case.grad, *case.states), (1.0, 0.0, 1.0, 1.0), strict=False
    ):
        tensor.fill_(value)
    # m and v lose 2⁻⁹ of themselves, half of the spacing under 1; so does the weight
    options = AdamWOptions(1.0, (1 - 2**-9, 1 - 2**-9), 1e30, 2**-9)
    case.step(options, seed=3)
    coins = [torch.where(t.cpu() == 1, 1.0, -1.0) for t in case.written()[:3]]
    for coin in coins:
        assert coin.mean().abs() < 4.5 / math.sqrt(size)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (coins[a] * coins[b]).mean().abs() < 4.5 / math.sqrt(size)


def test_second_moments_in_bf16_fall(device):
    """β₂ = 0.999 takes a thousandth of v, a quarter of the spacing; to nearest v would stay."""
    case = Case(4096, torch.bfloat16, torch.bfloat16, device)
    case.grad.zero_()
    case.states[1].fill_(1.0)
    for seed in range(20):
        case.step(seed=seed)
    # a draw's standard deviation is 1.7e-3, twenty draws' mean over 4,096 elements has 1.2e-4
    assert case.states[1].double().mean().item() == pytest.approx(0.999**20, abs=1e-3)


@pytest.mark.parametrize(
    ("dtype", "size", "value"),
    diagonal(2, [torch.float32, torch.bfloat16], [7, 5000, 2**15 + 40], [INF, -INF, NAN]),
)
def test_a_gradient_that_is_not_finite(device, dtype, size, value):
    case = Case(size, dtype, dtype, device)
    case.grad[-2] = value
    before = case.written()
    for _ in range(2):
        case.step()
        assert all(torch.equal(a, b) for a, b in zip(before, case.written(), strict=False))
        assert case.found_inf == 1
        case.grad[-2] = 1.0  # the flag stays, of the parameter before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_number_never_becomes_infinite(device, dtype):
    case = Case(5000, dtype, dtype, device)
    largest = torch.finfo(dtype).max
    case.weight.fill_(largest)
    case.grad.fill_(-1.0)
    for seed in range(2):
        case.step(OPTIONS._replace(weight_decay=0.0, lr=1e-3), seed=seed)
    assert (case.weight == largest).all()


def test_bits_do_not_depend_on_the_launch(device, monkeypatch):
    results = []
    for chunk, block in ((1 << 15, 4096), (2048, 512)):
        monkeypatch.setattr(adamw, "_CHUNK", chunk)
        monkeypatch.setattr(adamw, "_BLOCK", block)
        case = Case(9001, torch.bfloat16, torch.bfloat16, device)
        case.step(seed=5)
        results.append([bits(t) for t in case.written()[:3]])
    assert all(a.equal(b) for a, b in zip(*results, strict=False))


@pytest.mark.parametrize(("size", "launches"), [(0, 0), (4096, 1), (4097, 2)])
def test_launches(device, size, launches, monkeypatch):
    count = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            count.append(grid)
            return self.kernel[grid]

    for name in ("_adamw_kernel", "_adamw_check_kernel"):
        monkeypatch.setattr(adamw, name, Counted(getattr(adamw, name)))
    case = Case(size, torch.bfloat16, torch.bfloat16, device)
    case.step()
    assert len(count) == launches == adamw.launches_of(case.weight)


def test_invariants_are_asserted(device):
    for change in (
        {"weight": torch.zeros(4, dtype=torch.float64, device=device)},
        {"grad": torch.zeros(4, dtype=torch.float16, device=device)},
        {"grad": torch.zeros(8, device=device)[::2]},
        {"step_count": torch.zeros((), dtype=torch.float64, device=device)},
        {"states": [torch.zeros(4, device=device), torch.zeros(3, device=device)]},
    ):
        case = Case(4, torch.float32, torch.float32, device)
        vars(case).update(change)
        with pytest.raises(AssertionError):
            case.step()
