"""The public ops with their Triton backend against the PyTorch one: same driver, other tiles."""

import pytest
import torch

from tralign_fast import linear_logprobs, logprobs_from_logits


def run(backend, hidden, weight, targets, grad, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    out = linear_logprobs(*leaves, targets, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.5, "temperature": 0.8}])
@pytest.mark.parametrize("budget", [1024, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logprobs(dtype, budget, options, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 24, device=device), torch.randn(603, 24, device=device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets, grad = torch.randint(0, 603, (13,), device=device), torch.randn(13, device=device)
    options = {**options, "logits_budget_mb": budget}
    ours = run("triton", hidden, weight, targets, grad, **options)
    expected = run("torch", hidden, weight, targets, grad, **options)
    # the tiles are the same numbers; one may round a bf16 gradient of the logits the other way
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for a, b in zip(ours, expected, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


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


def test_no_row(device):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.ones(20, 8, device=device)
    targets = torch.zeros(0, dtype=torch.int64, device=device)
    out = linear_logprobs(hidden, weight, targets, backend="triton")
    out.sum().backward()
    assert hidden.grad.shape == (0, 8)
