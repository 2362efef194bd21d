"""The public ops with their Triton backend against the PyTorch one: same driver, other tiles."""

import pytest
import torch

import tralign_kernels
from tests.diagonal import diagonal
from tralign_fast import linear_logprobs, logprobs_from_logits
from tralign_fast.ops.head_operator import columns_forward
from tralign_fast.ops.logprobs import linear_logprobs_naive
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform


def run(backend, hidden, weight, targets, grad, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    out = linear_logprobs(*leaves, targets, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


SOME = {"softcap": 4.0, "logit_scale": 0.5, "temperature": 0.8}


@pytest.mark.parametrize(
    ("dtype", "budget", "options"),
    diagonal(2, [torch.float32, torch.bfloat16], [1024, 0], [{}, SOME, {"vocab_filter": 0.01}]),
)
def test_linear_logprobs(dtype, budget, options, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 24, device=device), torch.randn(603, 24, device=device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets, grad = torch.randint(0, 603, (13,), device=device), torch.randn(13, device=device)
    options = {**options, "logits_budget_mb": budget}
    ours = run("triton", hidden, weight, targets, grad, **options)
    expected = run("torch", hidden, weight, targets, grad, **options)
    if dtype == torch.float32:
        for a, b in zip(ours, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        return
    # Triton rounds the gradient of the logits, PyTorch powers and hidden states times a row's
    # factor: as near to fp64 as each other, where most of the way is the rounding of the logits
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    del options["logits_budget_mb"]
    options.pop("vocab_filter", None)  # leaves out next to nothing, or is exact
    out = linear_logprobs_naive(*leaves, targets, **options)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    for a, b, e in zip(ours, expected, exact, strict=True):
        assert (a - b).norm() <= 0.01 * e.norm()
        assert (a - e).norm() <= 1.2 * (b - e).norm()


@pytest.mark.parametrize(
    ("dtype", "options"), diagonal(2, [torch.float32, torch.float16, torch.bfloat16], [{}, SOME])
)
def test_without_gradient_no_logits_are_made(dtype, options, device, monkeypatch):
    """One fused call over the whole vocabulary, whatever the budget, and the same log-probs.

    In fp32 none: logits come from one product, so that those made again are those made before.
    """
    torch.manual_seed(0)
    hidden = torch.randn(24, 13, device=device).to(dtype).t()  # strided
    weight = torch.randn(603, 48, device=device).to(dtype)[:, ::2]
    bias, targets = torch.randn(603, device=device).to(dtype), torch.arange(13, device=device)
    calls, fused = [], tralign_kernels.linear_logprob_forward_
    monkeypatch.setattr(
        tralign_kernels,
        "linear_logprob_forward_",
        lambda *args, **kwargs: (calls.append(args[1].shape), fused(*args, **kwargs)),
    )
    options = {**options, "bias": bias, "logits_budget_mb": 0}
    ours = linear_logprobs(hidden, weight, targets, backend="triton", **options)
    expected = linear_logprobs(hidden, weight, targets, backend="torch", **options)
    assert calls == ([] if dtype == torch.float32 else [(603, 24)])
    # of rounded logits both, whose sums may fall on different sides of a tie
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_weight_of_another_dtype_is_converted_tile_by_tile(device):
    """Autocast: an fp32 weight is never copied as a whole."""
    hidden, weight = torch.randn(13, 24, device=device), torch.randn(603, 24, device=device)
    targets = torch.arange(13, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = [
            linear_logprobs(hidden, weight, targets, backend=name, logits_budget_mb=0)
            for name in ("triton", "torch")
        ]
    torch.testing.assert_close(*out, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits(dtype, device):
    torch.manual_seed(0)
    source = torch.randn(3, 5, 130, device=device).to(dtype)
    targets, grad = torch.randint(0, 130, (3, 5), device=device), torch.randn(3, 5, device=device)
    results = []
    for backend in ("triton", "torch"):
        leaf = source.clone().requires_grad_()
        out = logprobs_from_logits(leaf * 1, targets, temperature=1.3, backend=backend)
        results.append([out.detach(), torch.autograd.grad(out, leaf, grad)[0]])
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


@pytest.mark.parametrize(
    "stride",
    [
        lambda x: x.expand(7, 130),
        lambda x: x.expand(2, 7, 130),
        lambda x: x.t().contiguous().t(),
        lambda x: x.t().contiguous().t()[:, ::2],
        lambda x: x[:, ::3],
        lambda x: x.as_strided((5, 120), (1, 1)),
        lambda x: x.flip(0)[:, :1],
    ],
    ids=["expanded", "expanded 3-D", "transposed", "both", "steps", "windows", "one column"],
)
@pytest.mark.parametrize("rows", [1, 7])
def test_from_logits_of_any_stride(rows, stride, device):
    torch.manual_seed(0)
    leaf = torch.randn(rows, 130, device=device, requires_grad=True)
    try:
        logits = stride(leaf * 1)
    except RuntimeError:  # of seven rows, expanded to seven, twice
        pytest.skip("no such view")
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=device)
    grad = torch.randn(targets.shape, device=device)
    results = []
    for backend in ("triton", "torch"):
        out = logprobs_from_logits(stride(leaf * 1), targets, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaf, grad)])
    out = stride(leaf * 1).double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    exact = [out.detach(), *torch.autograd.grad(out, leaf, grad.double())]
    for ours, theirs, truth in zip(*results, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(theirs.double(), truth.double(), rtol=1e-5, atol=2e-6)


def test_a_view_of_a_leaf_is_not_overwritten(device):
    leaf = torch.randn(6, 130, device=device, requires_grad=True)
    before = leaf.detach().clone()
    targets = torch.arange(6, device=device)
    for view in (lambda x: x.view(2, 3, 130), lambda x: x[:, :100], lambda x: x[::2]):
        logits = view(leaf)
        chosen = targets[: logits[..., 0].numel()].view(logits.shape[:-1])
        logprobs_from_logits(logits, chosen, backend="triton").sum().backward()
        assert leaf.equal(before)


def test_no_row(device):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.ones(20, 8, device=device)
    targets = torch.zeros(0, dtype=torch.int64, device=device)
    out = linear_logprobs(hidden, weight, targets, backend="triton")
    out.sum().backward()
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(), STATISTICS], ids=["fused", "statistics"])
def test_a_part_of_the_columns(wanted, dtype, device):
    """What a process of several does that share a vocabulary: most targets are another's."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 24, device=device), torch.randn(300, 24, device=device)
    targets = torch.randint(-300, 600, (13,), device=device)
    targets[:3] = torch.tensor([-1, 0, 300])
    results = []
    for backend in ("triton", "torch"):
        target_logit, logsumexp, _, table = columns_forward(
            hidden.to(dtype), weight.to(dtype), targets, None, LogitTransform(), backend, dtype,
            256, 0, wanted,
        )  # fmt: skip
        results.append((target_logit, logsumexp.sum(1), table))
    tolerances = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 2e-2)
    inside = (targets >= 0) & (targets < 300)
    assert torch.equal(results[0][0].isnan(), ~inside)
    for ours, expected in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, expected, **tolerances, equal_nan=True)
