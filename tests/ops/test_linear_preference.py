"""Head and loss as one node: as the two calls of which it is made, and as near to fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.conftest import DEVICE
from tralign_fast import LOSSES, linear_logprobs, linear_preference_loss, preference_loss
from tralign_fast.ops.logprobs import linear_logprobs_naive

BOUNDS = [
    1,
    6,
    9,
    9 + 5,
    9 + 5 + 3,
]  # of four sequences; the first and the last tokens are no one's
N, H, V = 20, 24, 301
RESULTS = ("loss", "rewards", "logps", "totals")


@pytest.fixture
def inputs():
    """hidden, weight, bias, targets, offsets, the reference's sums: float32."""
    return make(N)


def make(rows, offsets=BOUNDS):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, H, generator=g), 0.4 * torch.randn(V, H, generator=g)
    bias, targets = torch.randn(V, generator=g), torch.randint(0, V, (rows,), generator=g)
    reference = -6.5 * torch.tensor([5.0, 3, 5, 3]) + torch.randn(4, generator=g)
    tensors = (hidden, weight, bias, targets, torch.tensor(offsets), reference)
    return [t.to(DEVICE) for t in tensors]


def wanted(name):
    """What a loss needs beside beta."""
    options = {"beta": 0.3}
    if not LOSSES[name].paired:
        options["is_desirable"] = torch.tensor([True, False], device=DEVICE)  # two are mismatched
        if "kl" not in LOSSES[name].inputs:
            options["is_desirable"] = torch.tensor([True, False, False, True], device=DEVICE)
    return options


def in_two(hidden, weight, targets, offsets, ref_logps, *, loss, **options):
    """The two calls."""
    names = ("bias", "softcap", "logit_scale", "temperature", "logits_budget_mb", "vocab_filter")
    head = {n: options.pop(n) for n in names if n in options}
    head["backend"] = options.get("backend", "auto")
    logps = linear_logprobs(hidden, weight, targets, **head)
    return preference_loss(logps, ref_logps, offsets, loss=loss, **options)


def run(function, inputs, needs=(True, True, True), factor=1.0, dtype=None, **options):
    """(PackedLoss, gradients of hidden, weight and bias, None where not needed)"""
    hidden, weight, bias, targets, offsets, reference = inputs
    leaves = [
        t.detach().to(dtype or t.dtype).requires_grad_(need)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    out = function(*leaves[:2], targets, offsets, reference, bias=leaves[2], **options)
    if out.loss.requires_grad:
        (out.loss * factor).backward()
    return out, [leaf.grad for leaf in leaves]


def assert_same(ours, theirs, rtol=2e-5):
    (out, grads), (other, other_grads) = ours, theirs
    for name in RESULTS:
        torch.testing.assert_close(getattr(out, name), getattr(other, name), rtol=1e-6, atol=1e-6)
    for mine, other in zip(grads, other_grads, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            scale = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, inputs):
    options = {"loss": name, **wanted(name)}
    assert_same(run(linear_preference_loss, inputs, **options), run(in_two, inputs, **options))


@pytest.mark.parametrize("budget", [1024, 0])
@pytest.mark.parametrize("index", range(3))
def test_each_gradient_alone(index, budget, inputs):
    needs = [i == index for i in range(3)]
    options = {"loss": "dpo", "beta": 0.3, "logits_budget_mb": budget, "needs": needs}
    ours = run(linear_preference_loss, inputs, **options)
    assert [g is not None for g in ours[1]] == needs
    assert_same(ours, run(in_two, inputs, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
        {"loss": "ipo", "length_normalized": False},
        {"loss": "dpo", "f_divergence_type": "js_divergence"},
        {"loss": "dpo", "softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3},
        {"loss": "dpo", "vocab_filter": 1e-3},
        {"loss": "dpo", "token_weights": torch.linspace(0, 1, N, device=DEVICE)},
        {"loss": "dpo", "example_weights": torch.tensor([0.5, 2.0], device=DEVICE)},
        {"loss": "ipo", "lengths": torch.tensor([6.0, 4, 6, 4], device=DEVICE)},
        {"loss": "sft", "nll_tokens": 50.0},
    ],
    ids=lambda o: "-".join(map(str, o)) + str(o["loss"]),
)
def test_the_keywords_of_both(options, inputs):
    options = {**options, "beta": 0.3}
    assert_same(run(linear_preference_loss, inputs, **options), run(in_two, inputs, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1024, 0])
def test_as_near_to_fp64_as_pytorch(budget, dtype, inputs):
    def naive(hidden, weight, targets, offsets, reference, *, bias, **options):
        logps = F.linear(hidden, weight, bias).float().log_softmax(-1)
        logps = logps.gather(-1, targets[:, None])[:, 0]
        return preference_loss(logps, reference, offsets, **options)

    def exact(hidden, weight, targets, offsets, reference, *, bias, **options):
        logps = linear_logprobs_naive(hidden, weight, targets, bias=bias)
        sums = torch.stack([logps[a:b].sum() for a, b in itertools.pairwise(BOUNDS)])
        ratio = sums - reference.double()
        loss = -F.logsigmoid(0.3 * (ratio[:2] - ratio[2:])).mean()
        return preference_loss(logps, reference, offsets, **options)._replace(loss=loss)

    rounded = [t.to(dtype) for t in inputs[:3]] + inputs[3:]
    options = {"loss": "dpo", "beta": 0.3}
    ours = run(linear_preference_loss, rounded, logits_budget_mb=budget, **options)
    theirs = run(naive, rounded, **options)
    truth = run(exact, rounded, dtype=torch.float64, **options)
    eps = {torch.float32: 2**-23, torch.bfloat16: 2**-8}[dtype]
    pairs = [(*(out.loss.detach() for out, _ in (ours, theirs, truth)), 2**-23)]
    pairs += [(*three, eps) for three in zip(ours[1], theirs[1], truth[1], strict=True)]
    for mine, other, want, floor in pairs:
        error, allowed = (float((x.double() - want).abs().max()) for x in (mine, other))
        assert error <= 2 * allowed + floor * float(want.abs().max())


@pytest.mark.parametrize("factor", [0.25, -3.0, 0.0])
def test_the_loss_may_be_scaled(factor, inputs):
    """Gradient accumulation, and a share of a batch: exactly the gradient times a power of two."""
    options = {"loss": "dpo", "beta": 0.3}
    scaled = run(linear_preference_loss, inputs, factor=factor, **options)
    assert_same(scaled, run(in_two, inputs, factor=factor, **options))
    if factor == 0.25:
        whole = run(linear_preference_loss, inputs, **options)
        assert all(a.equal(b * factor) for a, b in zip(scaled[1], whole[1], strict=True))


def test_two_parts_accumulate(inputs):
    """The gradient of a sum of two losses of the same weight."""
    hidden, weight, _, targets, offsets, reference = inputs
    results = []
    for function in (linear_preference_loss, in_two):
        leaf = weight.clone().requires_grad_()
        for beta in (0.1, 0.4):
            out = function(hidden, leaf, targets, offsets, reference, loss="dpo", beta=beta)
            (0.5 * out.loss).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-7)


def test_no_scored_token():
    inputs = make(0, offsets=[0] * 5)
    options = {"loss": "dpo", "beta": 0.3}
    ours = run(linear_preference_loss, inputs, **options)
    assert_same(ours, run(in_two, inputs, **options))
    assert [g.shape for g in ours[1]] == [(0, H), (V, H), (V,)]
    assert all(not g.any() for g in ours[1])


def test_one_node_whose_loss_alone_has_a_gradient(inputs):
    hidden, weight, _, targets, offsets, reference = inputs
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_preference_loss(*leaves, targets, offsets, reference, loss="dpo", beta=0.3)
    parents = [node for node, _ in out.loss.grad_fn.next_functions if node is not None]
    assert [node.variable for node in parents] == [*leaves]
    others = (out.chosen_rewards, out.rejected_rewards, out.rewards, out.logps, out.totals)
    assert not any(t.requires_grad for t in others)
    with torch.no_grad():
        silent = linear_preference_loss(*leaves, targets, offsets, reference, loss="dpo", beta=0.3)
    assert silent.loss == out.loss
    assert not silent.loss.requires_grad


def test_a_loss_that_is_not_finite_reaches_every_gradient(inputs):
    inputs[-1] = torch.full((4,), float("nan"), device=DEVICE)
    out, grads = run(linear_preference_loss, inputs, loss="dpo", beta=0.3)
    assert out.loss.isnan()
    assert all(g.isnan().any() for g in grads)


def test_a_second_backward_is_refused_where_logits_were_consumed(inputs):
    hidden, weight, _, targets, offsets, reference = inputs
    for budget in (1024, 0):
        leaf = weight.clone().requires_grad_()
        loss = linear_preference_loss(
            hidden, leaf, targets, offsets, reference, loss="dpo", beta=0.3,
            logits_budget_mb=budget,
        ).loss  # fmt: skip
        loss.backward(retain_graph=True)
        if budget:
            with pytest.raises(RuntimeError, match="first backward consumed the kept logits"):
                loss.backward()
        else:
            once = leaf.grad.clone()
            loss.backward()
            torch.testing.assert_close(leaf.grad, 2 * once)


def test_second_derivatives_are_refused(inputs):
    hidden, weight, _, targets, offsets, reference = inputs
    leaf = weight.clone().requires_grad_()
    out = linear_preference_loss(hidden, leaf, targets, offsets, reference, loss="dpo", beta=0.3)
    with pytest.raises(RuntimeError, match="linear_preference_loss has no second derivative"):
        torch.autograd.grad(out.loss, leaf, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpoints(use_reentrant, inputs):
    hidden, weight, _, targets, offsets, reference = inputs

    def function(hidden, weight):
        return linear_preference_loss(
            hidden * 1, weight, targets, offsets, reference, loss="dpo", beta=0.3
        ).loss

    results = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=use_reentrant)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        call(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        assert a.equal(b)


def test_autocast(inputs):
    """fp32 in, bf16 logits, gradients in fp32: as the two calls."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = run(linear_preference_loss, inputs, loss="dpo", beta=0.3)
        theirs = run(in_two, inputs, loss="dpo", beta=0.3)
    assert_same(ours, theirs)
    assert all(g.dtype == torch.float32 for g in ours[1])


def test_fake_tensors_pass_through(inputs):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        out, grads = run(
            linear_preference_loss, [mode.from_tensor(t) for t in inputs], loss="dpo", beta=0.3
        )
    assert out.loss.shape == ()
    assert [g.shape for g in grads] == [(N, H), (V, H), (V,)]


@pytest.mark.parametrize("budget", [1024, 0])
def test_a_trace_of_a_gpu_keeps_powers_in_the_memory_of_logits(budget):
    """Kernels that do nothing, and the same tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tralign_fast.memory import LiveTensors
    from tralign_fast.ops.backend import pretend_gpu

    peaks = {}
    for kept in ("logits", "powers"):
        with FakeTensorMode(), pretend_gpu(), LiveTensors(fake=True) as live:
            hidden = torch.empty(4096, 64, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(32_000, 64, dtype=torch.bfloat16, requires_grad=True)
            targets, offsets = (torch.empty(n, dtype=torch.int64) for n in (4096, 5))
            out = linear_preference_loss(
                hidden, weight, targets, offsets, torch.empty(4), loss="dpo", beta=0.3, kept=kept,
                logits_budget_mb=budget,
            )  # fmt: skip
            out.loss.backward()
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        peaks[kept] = live.report().peak
    # hidden states times their rows' factors
    assert peaks["powers"] == pytest.approx(peaks["logits"], abs=4096 * 64 * 2 + 4096 * 16)


def test_compiled_code_may_call_it(inputs):
    hidden, weight, _, targets, offsets, reference = inputs

    def function(hidden, weight):
        out = linear_preference_loss(
            torch.tanh(hidden), weight, targets, offsets, reference, loss="dpo", beta=0.3
        )
        return 2 * out.loss

    results = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = call(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dqo"}, "did you mean 'dpo'"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"gamma": 1.0}, "gamma: the loss dpo does not take it"),
        ({"offsets": torch.tensor([0, 2, 4, 6, 99], device=DEVICE)}, r"rise within \[0, 20\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device=DEVICE)}, "int64 targets"),
        ({"ref_logps": torch.zeros(3, device=DEVICE)}, "expected logps"),
        ({"vocab_filter": 1.0}, "vocab_filter"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"is_desirable": torch.ones(2, dtype=torch.bool, device=DEVICE)}, "takes pairs"),
    ],
)
def test_bad_arguments_say_what_was_expected(change, message, inputs):
    hidden, weight, _, targets, offsets, reference = inputs
    arguments = {
        "hidden": hidden, "weight": weight, "targets": targets, "offsets": offsets,
        "ref_logps": reference, "loss": "dpo", "beta": 0.3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(**{**arguments, **change})
