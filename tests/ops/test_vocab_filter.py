"""`vocab_filter`: what is left out is known, bounded, put back in sum, and never too much."""

from __future__ import annotations

import warnings

import pytest
import torch

import tralign_fast.ops.backend as backend
import tralign_fast.ops.vocab_filter as module
from tests.ops.test_logprobs import KEPT, RECOMPUTED, run
from tralign_fast import linear_logprobs
from tralign_fast.ops.logprobs import linear_logprobs_naive
from tralign_fast.ops.vocab_filter import last_vocab_filter

EPSILON = 1e-3


def make(N, H, V, dtype=torch.float32, sharp=2.3, seed=0):
    """Distributions as a language model's: a few likely columns, many that are hardly ever so."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=g) / H**0.5
    likely = torch.randint(0, V // 4, (N, 3), generator=g)
    hidden = sharp * H**0.5 * weight[likely].sum(1)
    grad = torch.randn(N, generator=g)
    leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    return *leaves, likely[:, 0], grad


def exact_of(inputs, targets, grad, **options):
    return run(linear_logprobs_naive, inputs, targets, grad, dtype=torch.float64, **options)


def left_out(p, targets, epsilon=EPSILON):
    """(V,) bool: the columns left out, by the definition; p are the probabilities (N, V)."""
    out = p.amax(0) < epsilon
    out[targets] = False
    return out


def filtered_reference(inputs, targets, grad, *, softcap=None, logit_scale=1.0, temperature=1.0):
    """The gradients (hidden, weight, bias) that the filter defines, of full logits in fp64."""
    hidden, weight, bias = (*(t.detach().double() for t in inputs), None)[:3]
    raw = hidden @ weight.t() + (0 if bias is None else bias)
    scores = slope = logit_scale * raw
    slope = torch.ones_like(raw)
    if softcap is not None:
        scores, slope = softcap * (scores / softcap).tanh(), 1 - (scores / softcap).tanh().square()
    p = (scores / temperature).softmax(-1)
    out = left_out(p, targets)
    q = p.amax(0) * out
    d = -slope * p
    d[torch.arange(len(d)), targets] += slope[torch.arange(len(d)), targets]
    d[:, out] = -p[:, out].sum(1, keepdim=True) * (q / q.sum())[out]
    d *= grad.double()[:, None] * (logit_scale / temperature)
    return [d @ weight, d.t() @ hidden, d.sum(0)][: len(inputs)]


@pytest.mark.parametrize("budget", [KEPT, 0.05, RECOMPUTED])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_error_stays_within_what_was_left_out(budget, scale):
    """|d hidden[n] - exact| ≤ |g[n]| · m[n] · max |W[v] - mean|, and the report says how much."""
    hidden, weight, targets, grad = make(70, 32, 2000)
    options = {"logit_scale": scale}
    ours = run(
        linear_logprobs, (hidden, weight), targets, grad,
        logits_budget_mb=budget, vocab_filter=EPSILON, **options,
    )  # fmt: skip
    exact = exact_of((hidden, weight), targets, grad, **options)
    p = (scale * hidden.double() @ weight.double().t()).softmax(-1).detach()
    out = left_out(p, targets)
    mass = p[:, out].sum(1)
    report = last_vocab_filter()
    largest = pytest.approx(mass.max().item(), rel=1e-3)
    assert report == (2000 - int(out.sum()), 2000, largest, False)
    assert report.columns < 1800
    rest = weight.detach()[out].double()
    spread = torch.cdist(rest, rest).max()  # no mean is farther from a row than another row
    error = (ours[1].double() - exact[1]).norm(dim=1)
    # rows of the weight have norm one: logits of 40 rounded in fp32 move a gradient by 1e-5
    assert (error <= grad.abs() * (scale * mass * spread + 1e-5)).all()
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2][~out].double(), exact[2][~out], rtol=1e-4, atol=1e-4)
    expected = filtered_reference((hidden, weight), targets, grad, **options)
    for mine, truth in zip(ours[1:], expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


def test_the_correction_is_worth_it_and_keeps_the_sum_over_the_vocabulary(monkeypatch):
    hidden, weight, targets, grad = make(70, 32, 2000)
    bias = torch.randn(2000).mul_(0.1).requires_grad_()
    inputs = (hidden, weight, bias)
    exact = exact_of(inputs, targets, grad)
    ours = run(linear_logprobs, inputs, targets, grad, vocab_filter=EPSILON)
    monkeypatch.setattr(
        module.VocabFilter, "left_out_shares", lambda self: torch.zeros_like(self.peak)
    )
    bare = run(linear_logprobs, inputs, targets, grad, vocab_filter=EPSILON)

    def error(results, i):
        return (results[i].double() - exact[i]).norm() / exact[i].norm()

    assert error(ours, 1) < error(bare, 1)
    for i in (2, 3):  # the gradient of the logits sums to zero over the vocabulary
        assert ours[i].sum(0).abs().max() < 1e-2 * bare[i].sum(0).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
def test_off_is_exact_and_so_is_an_epsilon_that_leaves_nothing_out(dtype, budget):
    hidden, weight, targets, grad = make(33, 16, 900, dtype)
    exact, zero, tiny = (
        run(linear_logprobs, (hidden, weight), targets, grad, logits_budget_mb=budget, **options)
        for options in ({}, {"vocab_filter": 0.0}, {"vocab_filter": 1e-30})
    )
    report = last_vocab_filter()
    assert report is not None
    assert report[:2] == (900, 900)
    for a, b, c in zip(exact, zero, tiny, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
def test_too_much_left_out_falls_back_to_the_exact_backward_and_says_so_once(budget):
    hidden, weight, targets, grad = make(40, 16, 1500, sharp=0.1)  # flat: no column is likely
    backend.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="left out more than 0.1 of a token's probability"):
        ours = run(
            linear_logprobs, (hidden, weight), targets, grad,
            logits_budget_mb=budget, vocab_filter=0.02,
        )  # fmt: skip
    report = last_vocab_filter()
    assert report is not None
    assert report.exact
    assert report.left_out_mass > 0.1
    assert report.columns < 1000
    for mine, truth in zip(ours, exact_of((hidden, weight), targets, grad), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(linear_logprobs, (hidden, weight), targets, grad, vocab_filter=0.02)


def test_targets_stay_however_unlikely():
    hidden, weight, targets, grad = make(20, 16, 600)
    p = (hidden @ weight.t()).softmax(-1).detach()
    targets[0] = p.amax(0).argmin()  # the least likely column of all
    assert p.amax(0)[targets[0]] < 1e-4
    ours = run(linear_logprobs, (hidden, weight), targets, grad, vocab_filter=EPSILON)
    exact = exact_of((hidden, weight), targets, grad)
    torch.testing.assert_close(ours[2][targets].double(), exact[2][targets], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
def test_frozen_tensors(needs, budget):
    hidden, weight, targets, grad = make(25, 24, 700)
    options = {"logits_budget_mb": budget, "vocab_filter": EPSILON}
    both = run(linear_logprobs, (hidden, weight), targets, grad, **options)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    value, gradient = run(linear_logprobs, (hidden, weight), targets, grad, **options)
    assert torch.equal(value, both[0])
    assert torch.equal(gradient, both[1 + needs.index(True)])


@pytest.mark.parametrize(
    "options", [{"softcap": 30.0}, {"temperature": 0.8}, {"bias": True}], ids=lambda o: "-".join(o)
)
def test_head_options(options):
    hidden, weight, targets, grad = make(50, 32, 1500, sharp=2.5)
    inputs, options = [hidden, weight], dict(options)
    if options.pop("bias", False):
        inputs.append(torch.randn(1500).requires_grad_())
    ours = run(linear_logprobs, inputs, targets, grad, vocab_filter=EPSILON, **options)
    report = last_vocab_filter()
    assert report is not None
    assert report.columns < 1000
    assert not report.exact
    expected = filtered_reference(inputs, targets, grad, **options)
    for mine, truth in zip(ours[1:], expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


def test_autocast_and_a_masked_column():
    hidden, weight, targets, grad = make(30, 16, 800)
    bias = torch.zeros(800)
    bias[799] = -torch.inf
    bias.requires_grad_()
    inputs = (hidden, weight, bias)
    exact = exact_of(inputs, targets, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(linear_logprobs, inputs, targets, grad, vocab_filter=EPSILON)
    assert all(g.dtype == torch.float32 for g in ours)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - truth).norm() < 0.03 * truth.norm()
    assert torch.equal(ours[2][799], torch.zeros(16))


def test_not_a_number_is_passed_on():
    hidden, weight, targets, grad = make(10, 8, 300)
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    backend.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="computed exactly"):
        ours = run(linear_logprobs, (hidden, weight), targets, grad, vocab_filter=EPSILON)
    assert torch.isnan(ours[0]).tolist() == [n == 3 for n in range(10)]
    assert torch.isnan(ours[1]).all(1).tolist() == [n == 3 for n in range(10)]
    assert torch.isnan(ours[2]).all()


def test_no_scored_token():
    hidden, weight, targets, _ = make(0, 16, 50)
    linear_logprobs(hidden, weight, targets, vocab_filter=EPSILON).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(50, 16))


def test_compiles_whole_and_passes_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    hidden, weight, targets, grad = make(21, 16, 300)

    def f(hidden, weight):
        return linear_logprobs(torch.tanh(hidden), weight, targets, vocab_filter=EPSILON)

    results = [
        torch.autograd.grad(function(hidden, weight), (hidden, weight), grad)
        for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with FakeTensorMode():
        fake = torch.empty(40, 64, requires_grad=True), torch.empty(500, 64, requires_grad=True)
        targets = torch.zeros(40, dtype=torch.int64)
        linear_logprobs(*fake, targets, vocab_filter=EPSILON).sum().backward()
        assert fake[1].grad is not None
        assert fake[1].grad.shape == (500, 64)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_bad_epsilon(value):
    hidden, weight, targets, _ = make(2, 4, 50)
    with pytest.raises(ValueError, match=r"vocab_filter must lie in \[0, 1\)"):
        linear_logprobs(hidden, weight, targets, vocab_filter=value)


def smollm2_inputs(smollm2, tokens):
    """Hidden states of SmolLM2 on its own samples, its head, and the next tokens."""
    from benchmarks.ops.vocab_filter import smollm2_tokens

    hidden, targets = smollm2_tokens(*smollm2, tokens)
    return hidden, smollm2[0].lm_head.weight.detach(), targets


@pytest.mark.parametrize(("tokens", "epsilon", "kept"), [(32, 3e-5, 0.15), (512, 1e-4, 0.33)])
def test_smollm2_loses_less_than_by_rounding_to_bf16(tokens, epsilon, kept, smollm2):
    """At the recommended ε, on a model's own hidden states, with DPO's signs as the gradient."""
    hidden, weight, targets = smollm2_inputs(smollm2, tokens)
    grad = torch.where(torch.arange(tokens) % 80 < 40, 1.0, -1.0)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    exact = run(linear_logprobs, inputs, targets, grad)
    ours = run(linear_logprobs, inputs, targets, grad, vocab_filter=epsilon)
    report = last_vocab_filter()
    assert report is not None
    assert report.columns < kept * report.vocab
    assert not report.exact
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine - truth).norm() <= (truth.bfloat16().float() - truth).norm()
