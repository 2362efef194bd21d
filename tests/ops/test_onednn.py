"""The products of an AMD CPU through oneDNN: the same as PyTorch's, where they are taken at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tralign_fast.model.prepare import prepare_model
from tralign_fast.ops.cpu import onednn

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a PyTorch without oneDNN"
)


@pytest.fixture(autouse=True)
def amd(monkeypatch):
    """Whatever the tests run on."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 1, 1), (891, 576, 192), (33, 64, 1100)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_values_and_gradients_are_those_of_fp64(shape, bias, batched):
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)[None if batched else ...]
    weight = torch.randn(out, width, generator=generator)
    b = torch.randn(out, generator=generator) if bias else None
    # as attention leaves it: a gradient that is not contiguous
    upstream = torch.randn(out, rows, generator=generator).t()[None if batched else ...]

    def run(function, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, b)]
        y = function(*leaves)
        y.backward(upstream.to(dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]

    assert onednn.fits(x, weight, b)
    exact = run(torch.nn.functional.linear, torch.float64)
    for ours, wanted in zip(run(onednn.linear, torch.float32), exact, strict=True):
        assert ours.shape == wanted.shape
        # fp32 sums of n products of normal numbers: rounding grows as √n · √n · 2⁻²⁴
        scale = max(rows, width, out)
        assert (ours - wanted).abs().max() <= 2**-22 * scale + 2**-22


@pytest.mark.parametrize("batched", [False, True])
def test_a_result_can_be_added_to_in_place(batched):
    """As PEFT's AdaLoRA, C3A and aLoRA do with a base layer's."""
    x = torch.randn(7, 5)[None if batched else ...].requires_grad_()
    weight = torch.randn(3, 5, requires_grad=True)
    y = onednn.linear(x, weight)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand_as(x))


@pytest.mark.parametrize("width", [64, 576, 1024])
def test_rounding_is_at_most_twice_that_of_mkl(width):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, width, generator=generator)
    b = torch.randn(500, width, generator=generator)
    exact = a.double() @ b.double().t()
    ours, theirs = ((c - exact).square().mean() for c in (onednn.product(a, b), a @ b.t()))
    assert ours.sqrt() <= 2 * theirs.sqrt()


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x = torch.randn(4, 3, requires_grad=frozen == "weight")
    weight = torch.randn(2, 3, requires_grad=frozen == "x")
    y = onednn.linear(x, weight)
    assert y.requires_grad == (frozen != "both")
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is None, weight.grad is None) == (frozen != "weight", frozen != "x")


def test_everything_else_is_left_to_pytorch(monkeypatch):
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    assert onednn.fits(x, weight, None)
    assert not onednn.fits(x.bfloat16(), weight.bfloat16())
    assert not onednn.fits(x.double(), weight.double())
    assert not onednn.fits(x.to("meta"), weight.to("meta"))
    assert not onednn.fits(x[:0], weight)  # oneDNN knows no empty product
    long = torch.randn(2, 1025)
    assert not onednn.fits(long, long)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.fits(x, weight)
        assert onednn.linear(x, weight).dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode() as mode:
        assert not onednn.fits(mode.from_tensor(x), mode.from_tensor(weight))
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    assert not onednn.fits(x, weight)


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_the_layers_of_a_prepared_model_run_through_it(monkeypatch):
    model, plain = tiny(), tiny()
    linears = sum(type(m) is nn.Linear for m in model.modules()) - 1  # the head has its own way
    prepare_model(model)
    prepare_model(model)  # once more changes nothing
    calls = []
    product = onednn.product
    monkeypatch.setattr(onednn, "product", lambda *a: calls.append(1) or product(*a))
    ids = torch.arange(12)[None]
    loss, wanted = (m(input_ids=ids, labels=ids).loss for m in (model, plain))
    assert len(calls) == linears
    loss.backward()
    wanted.backward()
    assert len(calls) == 2 * linears  # the weight's gradient is MKL's
    torch.testing.assert_close(loss, wanted)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_a_copy_runs_its_own_weights():
    model = tiny()
    prepare_model(model)
    other = copy.deepcopy(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for parameter in other.parameters():
            parameter.add_(0.1)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(other(input_ids=ids).logits, before)
