"""Log-probs of logits that a caller has: what is written over, and what is spared."""

from __future__ import annotations

import pytest
import torch

from tralign_fast import logprobs_from_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_from_logits(dtype, temperature):
    torch.manual_seed(0)
    source = torch.randn(2, 9, 333).to(dtype).requires_grad_()
    targets = torch.randint(0, 333, (2, 9))
    grad = torch.randn(2, 9)
    logits = source * 3  # not a leaf: its memory becomes the gradient's
    pointer = logits.data_ptr()
    out = logprobs_from_logits(logits, targets, temperature=temperature)
    out.backward(grad)
    exact_source = source.detach().double().requires_grad_()
    z = (exact_source * 3).to(dtype).double() if dtype == torch.bfloat16 else exact_source * 3
    exact = (z / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    exact.backward(grad.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (2**-6, 2**-8)
    assert source.grad is not None
    torch.testing.assert_close(source.grad.double(), exact_source.grad, rtol=rtol, atol=atol)
    assert logits.data_ptr() == pointer
    assert not torch.equal(logits, source * 3)  # consumed


def test_from_logits_spares_leaves_and_copies_on_request():
    torch.manual_seed(0)
    leaf = torch.randn(4, 50, requires_grad=True)
    before = leaf.detach().clone()
    logprobs_from_logits(leaf, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert torch.equal(leaf, before)
    logits = leaf * 1
    logprobs_from_logits(logits, torch.zeros(4, dtype=torch.int64), inplace=False).sum().backward()
    assert torch.equal(logits, before)


def exact_from_logits(logits, targets, grad):
    """The gradient of what is a view of the leaf, in fp64."""
    out = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return torch.autograd.grad(out, logits, grad.double())[0]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, 6, 50),
        lambda x: x[1:, :40],
        lambda x: x.t().reshape(50, 12)[:, 1:].t(),
        lambda x: x.detach().requires_grad_().view(4, 3, 50),
        lambda x: x.view(12, 5, 10).unbind(1)[2],
    ],
    ids=["view", "slice", "transposed", "detached", "unbind"],
)
def test_from_logits_spares_views_of_leaves(view):
    """Their memory is a parameter's, or what the caller will read again."""
    leaf = torch.randn(12, 50, requires_grad=True)
    before = leaf.detach().clone()
    logits = view(leaf)
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    grad = torch.randn(targets.shape)
    (ours,) = torch.autograd.grad(logprobs_from_logits(logits, targets), logits, grad)
    assert torch.equal(leaf, before)
    exact = exact_from_logits(logits, targets, grad)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [(5, -1), (2, 3, -1)])
def test_from_logits_of_expanded_rows(rows):
    """Rows that share memory have a gradient each."""
    leaf = torch.randn(50, requires_grad=True)
    targets = torch.randint(0, 50, rows[:-1])
    grad = torch.randn(targets.shape)
    for logits in ((leaf * 1).expand(*rows), leaf.expand(*rows)):
        out = logprobs_from_logits(logits, targets)
        (ours,) = torch.autograd.grad(out, leaf, grad)
        exact = leaf.double().log_softmax(-1)[targets]
        (truth,) = torch.autograd.grad(exact, leaf, grad.double())
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, 6, 50), lambda x: x[:, :40]])
def test_compiled_from_logits_spares_leaves_too(view):
    def f(x, targets):
        return logprobs_from_logits(view(x), targets)

    leaf = torch.randn(12, 50, requires_grad=True)
    before = leaf.detach().clone()
    targets = torch.randint(0, 40, view(leaf).shape[:-1])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(leaf, targets)
    grads = [torch.autograd.grad(out.sum(), leaf)[0] for out in (compiled, f(leaf, targets))]
    assert torch.equal(leaf, before)
    torch.testing.assert_close(*grads)


def test_from_logits_second_backward_raises():
    leaf = torch.randn(4, 50, requires_grad=True)
    out = logprobs_from_logits(leaf * 1, torch.zeros(4, dtype=torch.int64)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False"):
        out.backward()
