"""The fused head against fp64: error at most twice PyTorch's in the same dtype, plus rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.diagonal import diagonal
from tralign_kernels import (
    head_tiles,
    launch,
    linear_logprob,
    linear_logprob_forward_,
    linear_logprob_naive,
)
from tralign_kernels.launch import DotLaunch
from tralign_kernels.logprob import logprob_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"softcap": 5.0, "logit_scale": 0.5, "inverse_temperature": 1.7},
    {"logit_scale": -0.5},
]
INF, NAN = float("inf"), float("nan")
# Two row blocks, and three work items of up to two column tiles each: the last tile and the last
# slice of the depth are ragged
N, V, H = 19, 150, 37
SMALL = DotLaunch(rows=16, columns=32, depth=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    for table in ("WIDE_LAUNCH", "SMALL_LAUNCH"):
        names = getattr(linear_logprob, table)
        monkeypatch.setattr(linear_logprob, table, dict.fromkeys(names, (SMALL,)))
    monkeypatch.setattr(head_tiles, "SPLIT", 64)


def make(rows: int, vocab: int, depth: int, dtype: torch.dtype, device: torch.device, seed=0):
    """hidden, weight, targets, bias: logits of a spread at which a few columns hold the mass."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth, generator=generator)
    weight = 3 * torch.randn(vocab, depth, generator=generator) / depth**0.5
    bias = torch.randn(vocab, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return (*(t.to(dtype).to(device) for t in (hidden, weight)), targets.to(device),
            bias.to(dtype).to(device))  # fmt: skip


def strided(matrix: Tensor, extra: int = 11) -> Tensor:
    """The left part of a buffer of NaN with wider rows."""
    buffer = matrix.new_full((matrix.shape[0], matrix.shape[1] + extra), NAN)
    buffer[:, : matrix.shape[1]] = matrix
    return buffer[:, : matrix.shape[1]]


def run(hidden, weight, targets, bias=None, widths=(), **options) -> tuple[Tensor, Tensor]:
    """(logsumexp, target_logit), a part of the vocabulary a call."""
    logsumexp = torch.tensor([[-INF, 0.0]], device=hidden.device).repeat(len(targets), 1)
    target_logit = torch.full(targets.shape, NAN, device=hidden.device)
    start = 0
    for width in widths or (len(weight),):
        rows = slice(start, start + width)
        part = None if bias is None else bias[rows]
        linear_logprob_forward_(
            hidden, weight[rows], targets, start, logsumexp, target_logit, bias=part, **options
        )
        start += width
    return logsumexp.sum(1), target_logit


def check(actual, hidden, weight, targets, bias=None, **options) -> None:
    inputs = [None if t is None else t.cpu() for t in (hidden, weight, targets, bias)]
    hidden, weight, targets, bias = inputs
    exact = linear_logprob_naive(hidden, weight, targets, bias=bias, **options)
    # of whole tensors: with AMX, PyTorch's bf16 product reads what lies beyond a row of 37
    logits = F.linear(hidden.contiguous(), weight.contiguous(), bias)
    torchs = logprob_naive(
        logits, targets, torch.zeros(len(targets)), dtype=torch.float32, **options
    )[:2]
    for got, torch_got, want in zip(actual, torchs, exact, strict=True):
        got = got.cpu()
        assert got.dtype == torch.float32
        assert got.isnan().equal(want.isnan())
        assert torch_got.isnan().equal(want.isnan())
        error, torch_error = (
            (x.double() - want).nan_to_num().abs().max() for x in (got, torch_got)
        )
        floor = 2**-24 * want.nan_to_num().abs().max()
        assert error <= 2 * torch_error + floor, (error, torch_error, floor)


@pytest.mark.parametrize(
    ("with_bias", "options", "dtype"), diagonal(2, [False, True], OPTIONS, DTYPES), ids=str
)
def test_options(device, with_bias, options, dtype) -> None:
    hidden, weight, targets, bias = make(N, V, H, dtype, device)
    targets[:6] = torch.tensor([0, 31, 32, 63, 64, V - 1])  # around tiles and items
    inputs = (strided(hidden), strided(weight), targets, bias if with_bias else None)
    check(run(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 64, 16), (17, 65, 17), (3, 128, 48)], ids=str)
def test_sizes_around_the_blocks(device, shape) -> None:
    for dtype in DTYPES:
        inputs = make(*shape, dtype, device)[:3]
        check(run(*inputs), *inputs)


# 1 to 6 blocks of 16, the last one ragged
@pytest.mark.parametrize(("group", "rows"), diagonal(3, [16, 32, 64], [16, 33, 64, 90]))
def test_groups_of_rows(device, group, rows, monkeypatch) -> None:
    """Every item is one group's: nothing is left out, and nothing changes but the order."""
    inputs = make(rows, V, 48, torch.bfloat16, device)[:3]  # aligned: small tiles have one group
    whole = run(*inputs)
    monkeypatch.setattr(head_tiles, "GROUP", group)
    grouped = run(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(grouped, whole, strict=True))
    check(grouped, *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_rounded_as_a_linear_layer_rounds_them(device, dtype) -> None:
    """Integers, whose sums are exact in any order: the very logits of F.linear, past 8 bits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-9, 10, size, generator=generator).to(dtype).to(device)
        for size in ((N, H), (V, H))
    )
    bias = torch.full((V,), 0.375, dtype=dtype, device=device)
    targets = torch.randint(0, V, (N,), generator=generator).to(device)
    logits = F.linear(hidden.float(), weight.float(), bias.float()).to(dtype)
    _, target_logit = run(hidden, weight, targets, bias)
    assert target_logit.equal(logits.gather(1, targets[:, None])[:, 0].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_vocabulary(device, dtype) -> None:
    hidden, weight, targets, bias = make(N, V, H, dtype, device)
    inputs = (hidden, weight, targets, bias)
    check(run(*inputs, widths=(70, 1, 79)), *inputs)


def test_target_outside_the_vocabulary(device) -> None:
    hidden, weight, targets, _ = make(N, V, H, torch.float32, device)
    targets[:5] = torch.tensor([-100, -1, V, V + 1000, 2**40])
    actual = run(hidden, weight, targets)
    assert actual[1].isnan().tolist() == [True] * 5 + [False] * (N - 5)
    check(actual, hidden, weight, targets)


def test_descriptors_and_few_programs_change_no_bit(device, monkeypatch) -> None:
    """TMA and a persistent grid, as on sm_90, where fewer programs than items run."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make(N, V, 48, dtype, device)
        want = run(*inputs)
        other = SMALL._replace(tma=True, persistent=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                linear_logprob, "WIDE_LAUNCH", dict.fromkeys(linear_logprob.WIDE_LAUNCH, (other,))
            )
            if device.type == "cpu":  # no descriptor on Ampere
                assert linear_logprob.is_aligned(inputs[0])
                actual = run(*inputs)
                assert all(a.equal(b) for a, b in zip(actual, want, strict=True))
            # what TMA cannot address is loaded through pointers
            inputs = make(N, V, 37, dtype, device)
            assert not linear_logprob.is_aligned(inputs[0])
            check(run(*inputs), *inputs)


def test_every_run_gives_the_same_bits(device) -> None:
    inputs = make(N, V, H, torch.bfloat16, device)
    first, second = run(*inputs), run(*inputs)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_masked_columns(device) -> None:
    """A bias of -inf: a whole item, a masked target, a row with nothing left."""
    hidden, weight, targets, bias = make(3, V, H, torch.float32, device)
    bias[:64] = -INF
    targets[:] = torch.tensor([3, 70, 149])
    logsumexp, target_logit = run(hidden, weight, targets, bias)
    want = linear_logprob_naive(
        *(t.cpu() for t in (hidden, weight, targets)), bias=bias.cpu(), dtype=torch.float32
    )
    torch.testing.assert_close(logsumexp.cpu(), want[0], rtol=1e-6, atol=1e-6)
    assert target_logit[0] == -INF
    bias.fill_(-INF)
    logsumexp, _ = run(hidden, weight, targets, bias)
    assert (logsumexp == -INF).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_rows_spoil_themselves_only(device, bad) -> None:
    hidden, weight, targets, _ = make(N, V, H, torch.float32, device)
    hidden[4, 3] = bad
    logsumexp, target_logit = run(hidden, weight, targets)
    assert not (target_logit - logsumexp)[4].isfinite()
    keep = torch.arange(N) != 4
    check((logsumexp[keep], target_logit[keep]), hidden[keep], weight, targets[keep])


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_do(device, shape) -> None:
    hidden, weight = torch.ones(shape[0], 8, device=device), torch.ones(shape[1], 8, device=device)
    targets = torch.zeros(shape[0], dtype=torch.int64, device=device)
    logsumexp, target_logit = run(hidden, weight, targets)
    assert (logsumexp == -INF).all()
    assert target_logit.isnan().all()


def test_offsets_past_2_31(device, untouched_bytes) -> None:
    """Rows of hidden and of the weight past 2³¹ elements, with strides that fit in int32."""
    stride, rows, depth = 2**30 + 64, 3, 24
    source, weight, targets, _ = make(rows, rows, depth, torch.bfloat16, device)
    memory = untouched_bytes(2 * (2 * stride + depth), device).view(torch.bfloat16)
    far = memory.as_strided((rows, depth), (stride, 1))
    far.copy_(source)
    check(run(far, weight, targets), source, weight, targets)
    far.copy_(weight)
    check(run(source, far, targets), source, weight, targets)


def test_invariants_are_asserted(device) -> None:
    hidden, weight, targets, bias = make(4, 10, 8, torch.float32, device)
    for bad in (
        (hidden[:, :4], weight, targets),  # depths
        (hidden, weight.double(), targets),  # dtypes
        (hidden.bfloat16(), weight, targets),
        (hidden.repeat(1, 2)[:, ::2], weight, targets),  # strided columns
        (hidden, weight, targets.int()),
        (hidden, weight, targets, bias[:5]),
    ):
        with pytest.raises(AssertionError):
            run(*bad)


def test_autotuning_only_on_request(monkeypatch) -> None:
    """The default without TRALIGN_AUTOTUNE=1, else the fastest, timed once a shape."""
    timed = []

    def do_bench(call, return_mode):
        timed.append(call())
        return timed[-1]

    monkeypatch.setattr(launch, "INTERPRETED", type("Flag", (), {"value": False}))
    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(launch, "_fastest", {})
    assert launch.pick((3, 1, 2), "shape", lambda c: c) == 3
    assert timed == []
    monkeypatch.setenv("TRALIGN_AUTOTUNE", "1")
    assert [launch.pick((3, 1, 2), "shape", lambda c: c) for _ in range(2)] == [1, 1]
    assert timed == [3, 1, 2]
