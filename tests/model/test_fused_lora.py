"""PEFT's LoRA layers as one node of autograd: PEFT's own numbers, and PEFT's own forward elsewhere."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.model.test_attention import build, collate
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast.model import fused_lora, prepare
from tralign_fast.model.fused_lora import fuse_lora
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.cpu import onednn
from tralign_fast.ops.lora import LoraFactors, lora_linear

BF16, FP32 = torch.bfloat16, torch.float32


class Layers(nn.Module):
    """One linear layer with a name that PEFT can look for."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x, **kwargs):
        return self.proj(x, **kwargs)


def layer_of(base=FP32, factors=FP32, inputs=24, outputs=40, bias=True, **options) -> Any:
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 4, "init_lora_weights": False, **options}
    model: Any = Layers(inputs, outputs, bias).to(base)
    get_peft_model(model, LoraConfig(target_modules=["proj"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The factors of every layer that ran as one node."""
    seen = []

    def record(x, weight, bias, factors):
        seen.append(factors)
        return lora_linear(x, weight, bias, factors)

    monkeypatch.setattr(fused_lora, "lora_linear", record)
    return seen


def outcome(model, x, grad, autocast=None) -> dict[str, Any]:
    """The output and every gradient there is, by name."""
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
        out = model(x)
    found = {"out": out.detach()}
    if out.requires_grad:
        out.backward(grad.to(out.dtype))
    for name, tensor in (("x", x), *model.named_parameters()):
        if tensor.grad is not None:
            found[name] = tensor.grad
            assert tensor.grad.dtype == tensor.dtype
    return found


@contextlib.contextmanager
def fused(model):
    undo = fuse_lora(model)
    yield
    undo()


# --- the same numbers -----------------------------------------------------------------------------

SHAPES = {
    "rows": lambda: torch.randn(7, 24),
    "batch": lambda: torch.randn(2, 5, 24),
    "one": lambda: torch.randn(24),
    "none": lambda: torch.randn(0, 24),
    "strided": lambda: torch.randn(24, 6, 2).permute(2, 1, 0),
}


@pytest.mark.parametrize("faster", [False, True], ids=["plain", "oneDNN"])
@pytest.mark.parametrize("alpha", [3, 4], ids=["scale 1", "scale 4/3"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_peft(shape, bias, alpha, faster, calls, monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: faster)
    model = layer_of(bias=bias, lora_alpha=alpha)
    x = SHAPES[shape]().requires_grad_()
    grad = torch.randn(*x.shape[:-1], 40)
    truth = outcome(model, x, grad)
    with fused(model):
        ours = outcome(model, x, grad)
    assert len(calls) == 1
    assert ours.keys() == truth.keys() >= {"out", "x"}
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6 * spread(expected))


def spread(tensor) -> float:
    return max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0


PARTS = ("x", "base_layer.weight", "base_layer.bias", "lora_A", "lora_B")


@pytest.mark.parametrize("trained", [*itertools.combinations(PARTS, 1), (), PARTS, PARTS[-2:]])
def test_what_is_not_trained_gets_no_gradient(trained, calls):
    model = layer_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    x, grad = torch.randn(2, 5, 24, requires_grad="x" in trained), torch.randn(2, 5, 40)
    truth = outcome(model, x, grad)
    with fused(model):
        ours = outcome(model, x, grad)
    assert len(calls) == 1
    assert ours.keys() == truth.keys()
    assert len(ours) == 1 + len(trained)
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6 * spread(expected))


HALVES = {  # base, factors, autocast
    "fp32 adapters": (BF16, FP32, None),
    "all bf16": (BF16, BF16, None),
    "bf16 base, autocast": (BF16, FP32, BF16),
    "fp32, autocast": (FP32, FP32, BF16),
    "fp16, autocast": (torch.float16, FP32, torch.float16),
    "fp16 adapters": (FP32, torch.float16, None),
}


@pytest.mark.parametrize("dtypes", HALVES)
def test_half_precision_is_no_worse_than_peft(dtypes, calls):
    base, factors, autocast = HALVES[dtypes]
    options = {"inputs": 96, "outputs": 160, "r": 8, "lora_alpha": 11}
    model = layer_of(base, factors, **options)
    half = autocast or (base if base != FP32 else factors)
    # what the products themselves round is none of anybody's error
    x = torch.randn(4, 64, 96).to(half).to(base).requires_grad_()
    grad = torch.randn(4, 64, 160).to(half)
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    truth = outcome(exact, x.double(), grad)
    theirs = outcome(model, x, grad, autocast)
    with fused(model):
        ours = outcome(model, x, grad, autocast)
    assert len(calls) == 1
    assert ours.keys() == theirs.keys()
    for name, expected in truth.items():
        assert ours[name].dtype == theirs[name].dtype
        size = float(expected.norm())
        error, their_error = (float((o[name] - expected).norm()) / size for o in (ours, theirs))
        assert error <= 1.02 * their_error + 1e-7, (name, error, their_error)
        assert error <= 2 * torch.finfo(half).eps, name


def test_gradients_pass_gradcheck():
    torch.manual_seed(0)
    x, weight, bias, down, up = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (5, 4), (5,), (2, 4), (5, 2))
    )
    torch.autograd.gradcheck(
        lambda x, weight, bias, down, up: lora_linear(
            x, weight, bias, LoraFactors(down, up, 0.7, torch.float64)
        ),
        (x, weight, bias, down, up),
    )


def test_the_output_can_be_changed_in_place():
    model = layer_of()
    x = torch.randn(2, 5, 24, requires_grad=True)
    expected = (model(x) * 2).sum().item()
    with fused(model):
        model(x).mul_(2).sum().backward()
        assert model(x).mul_(2).sum().item() == pytest.approx(expected, rel=1e-5)


def test_x_and_the_small_product_are_all_that_is_saved():
    model = layer_of(BF16, FP32)
    held = {p.data_ptr() for p in model.parameters()}
    x = torch.randn(2, 5, 24, dtype=BF16, requires_grad=True)
    saved: list[Any] = []
    with (
        fused(model),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        model(x)
    kept = [t for t in saved if t.data_ptr() not in held]
    assert [(tuple(t.shape), t.dtype) for t in kept] == [((2, 5, 24), BF16), ((10, 3), FP32)]
    assert kept[0].data_ptr() == x.data_ptr()
