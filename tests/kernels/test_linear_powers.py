"""Powers in place of logits: the kernels against their equation, the head's gradients against fp64
beside PyTorch's in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

import tralign_kernels
from tests.diagonal import diagonal
from tests.ops.test_logprobs import assert_as_good_as_pytorch
from tralign_fast import linear_logprobs
from tralign_fast.ops import logprobs
from tralign_fast.ops.backend import warn_once
from tralign_fast.ops.logprobs import linear_logprobs_and_statistics, linear_logprobs_naive
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform
from tralign_kernels import (
    head_tiles,
    linear_logprob,
    linear_logprob_forward_,
    linear_powers,
    linear_powers_,
    linear_powers_naive,
    scale_rows_,
)
from tralign_kernels.launch import DotLaunch

HALF = torch.bfloat16
INF, NAN = float("inf"), float("nan")
# two row blocks, of which the last is ragged; three work items of up to two column tiles
N, V, H = 21, 144, 32
SMALL = DotLaunch(rows=16, columns=32, depth=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    launch_by(monkeypatch, SMALL)
    monkeypatch.setattr(head_tiles, "SPLIT", 64)


def launch_by(monkeypatch, launch) -> None:
    for table in ("WIDE_LAUNCH", "SMALL_LAUNCH", "POWERS_LAUNCH", "STATISTICS_LAUNCH"):
        names = getattr(linear_logprob, table)
        monkeypatch.setattr(linear_logprob, table, dict.fromkeys(names, (launch,)))
    # that module has the table by name
    monkeypatch.setattr(linear_powers, "POWERS_LAUNCH", linear_logprob.POWERS_LAUNCH)


def make(device, rows=N, vocab=V, seed=0):
    """hidden, weight, targets, bias, grad: products and sums of small integers, which are exact in
    any order, and logits of which some are rounded."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-5, 6, (rows, H), generator=g)
    weight = torch.randint(-9, 10, (vocab, H), generator=g) / 32
    targets = torch.randint(0, vocab, (rows,), generator=g)
    bias = torch.randint(-64, 65, (vocab,), generator=g) / 32
    tensors = (hidden.to(HALF), weight.to(HALF), targets, bias.to(HALF))
    return [t.to(device) for t in (*tensors, torch.randn(rows, generator=g))]


def scores(hidden, weight, bias, **options):
    """fp64 scores of rounded logits."""
    logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    scale = options.get("logit_scale", 1.0) * options.get("inverse_temperature", 1.0)
    return logits.to(HALF).double() * scale


def forward(hidden, weight, targets, bias, widths=(V,), **options):
    """(powers, logsumexp, log-probs): the forward's, and what it could not know."""
    logsumexp = torch.tensor([[-INF, 0.0]], device=hidden.device).repeat(len(targets), 1)
    target_logit = torch.full((len(targets),), NAN, device=hidden.device)
    powers = [hidden.new_full((len(targets), width), NAN) for width in widths]
    for repair in (False, True):
        logps = target_logit - logsumexp[:, 0] - logsumexp[:, 1]
        start = 0
        for tile in powers:
            part = slice(start, start + tile.shape[1])
            some = {"bias": None if bias is None else bias[part], **options}
            if repair:
                linear_powers_(
                    hidden, weight[part], targets, start, logsumexp, logps, tile, repair=True,
                    **some,
                )  # fmt: skip
            else:
                linear_logprob_forward_(
                    hidden, weight[part], targets, start, logsumexp, target_logit, powers=tile,
                    **some,
                )  # fmt: skip
            start = part.stop
    return torch.cat(powers, 1), logsumexp, logps


def expected(hidden, weight, targets, bias, grad, **options):
    """E, factor and logsumexp, of rounded logits: identity and scores stand in for the product."""
    z = scores(hidden, weight, bias, **options).cpu()
    powers, factor, logsumexp = linear_powers_naive(
        z, torch.eye(z.shape[1], dtype=torch.float64), targets.cpu(), grad.cpu()
    )
    slope = options.get("logit_scale", 1.0) * options.get("inverse_temperature", 1.0)
    return powers, factor * slope, logsumexp


def assert_powers(actual, want) -> None:
    actual = actual.double().cpu()
    assert actual.isnan().equal(want.isnan())
    # one rounding to bf16, and fp32's of exponents
    error = (actual - want).nan_to_num().abs()
    assert (error <= 2**-8 * want.nan_to_num().abs() + 1e-37).all(), error.max()


@pytest.mark.parametrize(
    ("widths", "with_bias", "options"),
    [((V,), False, {}), ((64, 80), True, {"logit_scale": 0.5, "inverse_temperature": 1.5})],
    ids=str,
)
def test_powers(device, widths, with_bias, options) -> None:
    hidden, weight, targets, bias, grad = make(device)
    targets[:6] = torch.tensor([0, 31, 32, 63, 64, V - 1])  # around tiles and items
    bias = bias if with_bias else None
    powers, logsumexp, _ = forward(hidden, weight, targets, bias, widths, **options)
    want, factor, total = expected(hidden, weight, targets, bias, grad, **options)
    assert_powers(powers, want)
    torch.testing.assert_close(logsumexp.sum(1).cpu().double(), total, rtol=1e-6, atol=1e-6)
    slope = options.get("logit_scale", 1.0) * options.get("inverse_temperature", 1.0)
    scaled = scale_rows_of(torch.ones(N, 1, device=device), logsumexp, grad, slope)
    torch.testing.assert_close(scaled[:, 0].cpu().double(), factor, rtol=1e-5, atol=1e-30)


def scale_rows_of(source, logsumexp, grad, slope=1.0):
    scaled = torch.full_like(source, NAN)
    scale_rows_(scaled, source, logsumexp, grad, slope)
    return scaled


@pytest.mark.parametrize(
    ("height", "rows"),
    [(-400.0, (3,)), (-60.0, (2, 17, 20)), (64.0, range(N)), (90.0, (3,)), (400.0, (2, 17, 20))],
    ids=str,
)
def test_rows_out_of_the_ordinary_are_made_again(device, height, rows) -> None:
    """Their logsumexp is their shift; the others of their block are left as they are."""
    hidden, weight, targets, _, grad = make(device)
    hidden[:, 0], weight[:, 0] = 0, 1
    hidden[list(rows), 0] = height  # of all the row's logits
    powers, logsumexp, _ = forward(hidden, weight, targets, None)
    want, factor, _ = expected(hidden, weight, targets, None, grad)
    assert_powers(powers, want)
    far = ((logsumexp[:, 0] < -30) | (logsumexp[:, 0] > 60)).cpu()
    assert far.nonzero()[:, 0].tolist() == [*rows]
    scaled = scale_rows_of(torch.ones(N, 1, device=device), logsumexp, grad)
    torch.testing.assert_close(scaled[:, 0].cpu().double(), factor, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(("height", "with_bias"), [(0.0, True), (200.0, False)])
def test_columns_made_again_are_those_of_the_forward(device, with_bias, height) -> None:
    hidden, weight, targets, bias, grad = make(device)
    hidden[:, 0], weight[:, 0] = 0, 1
    hidden[5:9, 0] = height
    bias = bias if with_bias else None
    _, logsumexp, logps = forward(hidden, weight, targets, bias)
    part = slice(64, V)
    again = hidden.new_full((N, V - 64), NAN)
    linear_powers_(
        hidden, weight[part], targets, 64, logsumexp, logps, again,
        bias=None if bias is None else bias[part],
    )  # fmt: skip
    assert_powers(again, expected(hidden, weight, targets, bias, grad)[0][:, part])


def test_descriptors_and_few_programs_change_no_bit(device, monkeypatch) -> None:
    """TMA and a persistent grid, as on sm_90."""
    if device.type != "cpu" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no descriptor on this GPU")
    hidden, weight, targets, bias, _ = make(device)
    hidden[:, 0], weight[:, 0] = 0, 1
    hidden[5, 0] = 200.0
    results = []
    for launch in (SMALL, SMALL._replace(tma=True, persistent=True)):
        with monkeypatch.context() as patch:
            launch_by(patch, launch)
            powers, logsumexp, logps = forward(hidden, weight, targets, bias)
            again = torch.full_like(powers, NAN)
            linear_powers_(hidden, weight, targets, 0, logsumexp, logps, again, bias=bias)
            results.append((powers, logsumexp, again))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def statistics_of(hidden, weight, targets, bias, widths=(V,), kept=1, **options):
    """(the running statistics, powers of the first `kept` tiles, logsumexp, target logits)."""
    rows = len(targets)
    logsumexp = torch.tensor([[-INF, 0.0]], device=hidden.device).repeat(rows, 1)
    target_logit = torch.full((rows,), NAN, device=hidden.device)
    table = torch.zeros(5, rows, device=hidden.device)
    table[2] = -INF
    powers, start = [], 0
    for index, width in enumerate(widths):
        part = slice(start, start + width)
        own = hidden.new_full((rows, width), NAN) if index < kept else None
        linear_logprob_forward_(
            hidden, weight[part], targets, start, logsumexp, target_logit, powers=own,
            statistics=table, bias=None if bias is None else bias[part], **options,
        )  # fmt: skip
        powers += [] if own is None else [own]
        start = part.stop
    return table, powers, logsumexp, target_logit


def assert_statistics(table, z, targets) -> None:
    """Against those of the scores in fp64; sums of fp32 numbers, of which none cancel."""
    entropy, squares, peak, top1, total = table.double().cpu()
    log_p = z.log_softmax(1)
    exact = torch.special.entr(log_p.exp()).sum(1)
    torch.testing.assert_close(entropy, exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(squares.log(), (2 * log_p).logsumexp(1), rtol=0, atol=1e-5)
    assert peak.equal(z.amax(1))
    assert top1.equal((z.argmax(1) == targets.cpu()).double())
    # the scores are of rounded logits, the sum is taken before
    size = 2**-8 * z.abs().mean(1) + 1e-6
    assert ((total / z.shape[1] - z.mean(1)).abs() <= size).all()


@pytest.mark.parametrize(
    ("parts", "widths", "with_bias", "options"),
    [
        (1, (V,), False, {}),
        (4, (64, 80), True, {"logit_scale": 0.5, "inverse_temperature": 1.5}),
        pytest.param(1, (64, 80), True, {"inverse_temperature": 1.5}, marks=pytest.mark.matrix),
        pytest.param(4, (V,), False, {}, marks=pytest.mark.matrix),
        pytest.param(4, (64, 80), False, {"logit_scale": -0.5}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_statistics(device, monkeypatch, widths, with_bias, options, parts) -> None:
    """Of powers that are stored and of columns that are not; half of the targets are the largest
    column, whose score others have too."""
    launch_by(monkeypatch, SMALL._replace(parts=parts))
    hidden, weight, targets, bias, _ = make(device)
    weight[[5, 40, 100]] = weight[[63, 60, 143]]
    bias[[5, 40, 100]] = bias[[63, 60, 143]]
    bias = bias if with_bias else None
    z = scores(hidden, weight, bias, **options).cpu()
    targets[::2] = z.argmax(1)[::2].to(device)
    targets[1::4] = (V - 1 - z.flip(1).argmax(1))[1::4].to(device)  # the last of equal ones
    table, powers, logsumexp, target_logit = statistics_of(
        hidden, weight, targets, bias, widths, **options
    )
    assert_statistics(table, z, targets)
    assert_powers(powers[0], z[:, : widths[0]].exp())
    torch.testing.assert_close(logsumexp.sum(1).cpu().double(), z.logsumexp(1))
    assert target_logit.cpu().double().equal(z.gather(1, targets.cpu()[:, None])[:, 0])


@pytest.mark.parametrize(
    ("kept", "height"),
    [
        (0, -80.0),
        (2, 80.0),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in ((0, 400.0), (2, -80.0))),
    ],
)
def test_statistics_of_large_and_of_peaked_scores(device, kept, height) -> None:
    """A common height of all scores, and rows of which one column has all of the mass."""
    hidden, weight, targets, _, _ = make(device)
    hidden[:, :2], weight[:, :2] = 0, 0
    weight[:, 0], weight[37, 1] = 1, 4
    hidden[:, 0], hidden[::3, 1] = height, 30
    z = scores(hidden, weight, None).cpu()
    assert (z.softmax(1).amax(1) > 1 - 1e-9).sum() >= 7
    targets[::3] = 37
    table, *_ = statistics_of(hidden, weight, targets, None, (64, 80), kept)
    assert_statistics(table, z, targets)


def test_statistics_of_masked_columns_and_of_targets_elsewhere(device) -> None:
    hidden, weight, targets, bias, _ = make(device)
    bias[64:128] = -INF  # a whole item
    targets[:4] = torch.tensor([-100, V, 2**40, 70])
    z = scores(hidden, weight, bias).cpu()
    targets[4] = int(z[4].argmax())
    table, *_ = statistics_of(hidden, weight, targets, bias)
    entropy, _, peak, top1, total = table.cpu()
    exact = torch.special.entr(z.softmax(1)).sum(1)
    torch.testing.assert_close(entropy.double(), exact, rtol=2e-6, atol=2e-6)
    assert peak.double().equal(z.amax(1))
    assert top1.equal((z.argmax(1) == targets.cpu()).float())
    assert top1[4] == 1
    assert (total == -INF).all()


def test_targets_outside_and_masked_columns(device) -> None:
    hidden, weight, targets, bias, _ = make(device)
    targets[:4] = torch.tensor([-100, V, 2**40, 70])
    bias[64:128] = -INF  # a whole item, and the target of one row
    powers, _, _ = forward(hidden, weight, targets, bias)
    z = scores(hidden, weight, bias).cpu()
    want = z.exp()
    rows = torch.arange(3, N)
    want[rows, targets[3:].cpu()] -= z.logsumexp(1)[3:].exp()
    assert_powers(powers, want)
    assert powers[3, 70] < 0
    assert (powers[4:, 64:128].where(powers[4:, 64:128] > 0, 0) == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_rows_spoil_themselves_only(device, bad) -> None:
    hidden, weight, targets, _, grad = make(device)
    hidden[4, 3] = bad
    powers, _, _ = forward(hidden, weight, targets, None)
    want, _, _ = expected(hidden, weight, targets, None, grad)
    keep = torch.arange(N) != 4
    assert_powers(powers[keep], want[keep])
    assert powers[4].isnan().any()


def test_invariants_are_asserted(device) -> None:
    hidden, weight, targets, _, _ = make(device)
    logsumexp, logps = torch.zeros(N, 2, device=device), torch.zeros(N, device=device)
    good = hidden.new_empty(N, V)
    for powers, options in (
        (good[:, 1:], {}),  # shape
        (good.half(), {}),
        (hidden.new_empty(N, V + 1)[:, :V], {}),  # rows that are not aligned
        (good, {"softcap": 5.0}),
    ):
        with pytest.raises(AssertionError):
            linear_powers_(hidden, weight, targets, 0, logsumexp, logps, powers, **options)


# --- the head -------------------------------------------------------------------------------------

WIDE = DotLaunch(rows=32, columns=128, depth=32, num_warps=4, num_stages=2)


def head(device, seed=0, rows=29, vocab=704, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 32, generator=g).to(device, HALF)
    weight = (scale * torch.randn(vocab, 32, generator=g) / 32**0.5).to(device, HALF)
    targets, grad = torch.randint(0, vocab, (rows,), generator=g), torch.randn(rows, generator=g)
    bias = torch.randn(vocab, generator=g).to(device, HALF)
    return hidden, weight, bias, targets.to(device), grad.to(device)


def run(function, inputs, needs=(True, True, True), dtype=HALF, **options):
    *leaves, targets, grad = inputs
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_(need)
        for t, need in zip(leaves, needs, strict=True)
    ]
    out = function(*leaves[:2], targets, bias=leaves[2], **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, wanted, grad.to(out)))]


def kept_powers(*args, **options):
    return linear_logprobs(*args, backend="triton", kept="powers", **options)


def plain(hidden, weight, targets, bias, **options):
    z = F.linear(hidden, weight, bias).float() * options.get("logit_scale", 1.0)
    z = z / options.get("temperature", 1.0)
    return z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def compare(inputs, budget, needs=(True, True, True), **options):
    ours = run(kept_powers, inputs, needs, logits_budget_mb=budget, **options)
    theirs = run(plain, inputs, needs, **options)
    exact = run(linear_logprobs_naive, inputs, needs, torch.float64, **options)
    assert all(g.dtype == HALF for g in ours[1:])
    assert_as_good_as_pytorch(ours, theirs, exact, HALF)
    for *both, truth in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        # along the gradient: what many roundings have in common would be a step too long
        mine, other = (float((g.double() * truth).sum() / truth.square().sum() - 1) for g in both)
        assert abs(mine) <= 2 * abs(other) + 2**-8
    return ours[0]


ALL, PART, NONE = 1024, 600 * 29 * 2 / 2**20, 0  # MiB: two tiles of 256 columns, of three
BUDGETS = {"all": ALL, "part": PART, "none": NONE}


@pytest.fixture
def narrow_tiles(monkeypatch):
    """A GPU's tiles have 2,048 columns; a CPU's of 256 are cut as a budget wants them."""
    launch_by(monkeypatch, WIDE)
    monkeypatch.setattr(head_tiles, "SPLIT", 256)
    monkeypatch.setattr(logprobs.tiles, "CPU_TILE_BYTES", {2: 256 * 29 * 2})


@pytest.mark.parametrize(
    ("case", "budget"),
    diagonal(
        3,
        [
            (False, {}),
            (True, {"logit_scale": 0.25, "temperature": 0.7}),
            (False, {"logit_scale": -0.5}),
        ],
        BUDGETS,
    ),
    ids=str,
)
def test_gradients(device, narrow_tiles, case, budget) -> None:
    with_bias, options = case
    hidden, weight, bias, *rest = head(device)
    inputs = (hidden, weight, bias if with_bias else None, *rest)
    compare(inputs, BUDGETS[budget], (True, True, with_bias), **options)


@pytest.mark.parametrize("index", range(3))
def test_each_gradient_alone(device, narrow_tiles, index) -> None:
    compare(head(device), PART, [i == index for i in range(3)])


@pytest.mark.parametrize(
    ("height", "budget"), [(-200.0, "PART"), (45.0, "PART"), (200.0, "PART"), (200.0, "ALL")]
)
def test_logits_far_from_zero(device, narrow_tiles, height, budget) -> None:
    hidden, weight, bias, *rest = head(device)
    bias = torch.full_like(bias, height)
    bias[:300] -= 60
    compare((hidden, weight, bias, *rest), ALL if budget == "ALL" else PART)


@pytest.mark.parametrize("budget", BUDGETS)
def test_targets_that_are_nearly_certain(device, narrow_tiles, budget) -> None:
    """1 - p keeps its digits: the gradient of such tokens is as near as where d logits is made."""
    hidden, weight, _, targets, grad = head(device, scale=0.3)
    hidden = (hidden + 12 * weight[targets] / weight[targets].norm(dim=1, keepdim=True)).to(HALF)
    weight[targets] = 6 * weight[targets]
    logps = compare((hidden, weight, None, targets, grad), BUDGETS[budget], (True, True, False))
    assert (logps.exp() > 0.99).sum() > 10


def test_a_part_is_kept_and_no_logits_are_made(device, narrow_tiles, monkeypatch) -> None:
    """Every product of the forward is the kernel's, and so is that of columns made again."""
    inputs = head(device)
    calls = []
    for name in ("linear_logprob_forward_", "linear_powers_"):
        own = getattr(tralign_kernels, name)

        def counted(*args, name=name, own=own, **options):
            kind = "repair" if options.get("repair") else "kept" if "powers" in options else "made"
            calls.append((name, kind, len(args[1])))
            own(*args, **options)

        monkeypatch.setattr(tralign_kernels, name, counted)
    monkeypatch.setattr(logprobs.tiles, "project", None)
    run(kept_powers, inputs, logits_budget_mb=PART)
    assert calls == [
        ("linear_logprob_forward_", "kept", 256), ("linear_logprob_forward_", "kept", 256),
        ("linear_logprob_forward_", "made", 192),
        ("linear_powers_", "repair", 256), ("linear_powers_", "repair", 256),
        ("linear_powers_", "made", 192),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("with_bias", "transform", "budget"),
    [
        (True, LogitTransform(0.25, None, 0.7), PART),
        pytest.param(False, LogitTransform(), ALL, marks=pytest.mark.matrix),
        pytest.param(False, LogitTransform(), PART, marks=pytest.mark.matrix),
        pytest.param(False, LogitTransform(), NONE, marks=pytest.mark.matrix),
    ],
    ids=["bias-part", "all", "part", "none"],
)
def test_statistics_of_the_head(device, narrow_tiles, with_bias, transform, budget) -> None:
    """Those of kept logits; log-probs and gradients are the same bits with them and without."""
    hidden, weight, bias, targets, grad = head(device)
    bias = bias if with_bias else None
    options = {"logits_budget_mb": budget, "backend": "triton"}
    found = {}

    def call(*args, **more):
        more.pop("backend", None)
        logps, found["now"] = linear_logprobs_and_statistics(
            *args, STATISTICS, transform=transform, **options, **more
        )
        return logps

    inputs, needs = (hidden, weight, bias, targets, grad), (True, True, with_bias)
    z = transform.apply_(F.linear(hidden, weight, bias).double())
    targets[::3] = z.argmax(1)[::3]
    with_statistics = run(call, inputs, needs, kept="powers")
    ours = found["now"]
    alone = run(kept_powers, inputs, needs, logits_budget_mb=budget, **transform.options())
    for a, b in zip(with_statistics, alone, strict=True):
        assert a.equal(b)
    run(call, inputs, needs, kept="logits")
    log_p = z.log_softmax(1)
    exact = {
        "entropy": torch.special.entr(log_p.exp()).sum(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": z.mean(1),
    }
    for name, want in exact.items():
        error, other = ((x[name] - want).abs().max() for x in (ours, found["now"]))
        # the mean is of logits that are not rounded
        size = 2**-8 * float(z.abs().mean()) if name == "mean_logits" else 0.0
        assert error <= 2 * other + 2e-6 + size, name
        assert not ours[name].requires_grad
    assert ours["is_top1"].equal(found["now"]["is_top1"])
    assert ours["is_top1"].sum() > 5
    with torch.no_grad():  # an evaluation: the same kernel, and nothing is kept
        call(hidden, weight, targets, bias=bias, kept="powers")
    for name, value in found["now"].items():
        torch.testing.assert_close(value, ours[name], rtol=1e-6, atol=1e-6)


def test_autocast_and_strided_inputs(device, narrow_tiles) -> None:
    hidden, weight, bias, targets, grad = head(device)
    wide = torch.zeros(29, 64, device=device)
    wide[:, ::2] = hidden.float()
    with torch.autocast(device.type, HALF):
        ours = run(
            kept_powers, (wide[:, ::2], weight.float(), bias.float(), targets, grad),
            dtype=torch.float32,
        )  # fmt: skip
    half = run(kept_powers, (hidden, weight, bias, targets, grad))
    assert all(g.dtype == torch.float32 for g in ours)
    for a, b in zip(ours, half, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b)


def test_no_row_and_a_second_backward(device, narrow_tiles) -> None:
    hidden, weight, _, targets, _ = head(device)
    leaf = weight.clone().requires_grad_()
    out = kept_powers(hidden[:0], leaf, targets[:0])
    out.sum().backward()
    assert not leaf.grad.any()
    out = kept_powers(hidden, leaf, targets).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward consumed"):
        out.backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 5.0}, "softcap needs logits"),
        ({"vocab_filter": 1e-3}, "vocab_filter needs logits"),
        ({"backend": "torch"}, "the torch backend keeps logits"),
        ({"dtype": torch.float32}, "float32 has not the range"),
        ({"vocab": 63}, "not multiples of 16"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_needs_logits_keeps_them(device, change, reason) -> None:
    """With one notice that says why; and the same numbers."""
    warn_once.cache_clear()
    options = {"backend": "triton", "dtype": HALF, "vocab": 64, **change}
    hidden, weight, _, targets, grad = head(device, rows=4, vocab=options.pop("vocab"))
    inputs, needs = (hidden, weight, None, targets, grad), (True, True, False)
    with pytest.warns(UserWarning, match=reason):
        got = run(linear_logprobs, inputs, needs, kept="powers", **options)
    want = run(linear_logprobs, inputs, needs, **options)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_without_a_gradient_nothing_is_kept(device, recwarn) -> None:
    warn_once.cache_clear()
    hidden, weight, _, targets, _ = head(device, rows=4, vocab=64)
    linear_logprobs(hidden, weight, targets, backend="triton", kept="powers", softcap=2.0)
    assert not [w for w in recwarn if w.category is UserWarning]  # others are Triton's own
    with pytest.raises(ValueError, match="kept must be one of logits, powers, got 'p'"):
        linear_logprobs(hidden, weight, targets, kept="p")
