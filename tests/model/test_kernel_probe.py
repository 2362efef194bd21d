"""What the probe of layer kernels tells apart, with kernels written in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tralign_fast.model.kernel_probe import Unlike, best_norm, best_product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LlamaRMSNorm(nn.Module):
    casting, offset, eps = "llama", 0.0, 1e-6

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x):
        return norm(x, self.weight, self.casting, self.offset, self.eps)


class OlmoRMSNorm(LlamaRMSNorm):
    casting = "gemma"


class GemmaRMSNorm(LlamaRMSNorm):
    casting, offset = "gemma", 1.0


def norm(x, weight, casting, offset, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (offset + weight) * normed.to(x.dtype)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


def kernel(casting, offset, eps=1e-6) -> Any:
    return lambda x, weight: norm(x, weight, casting, offset, eps)


CHOICES = [kernel("llama", 0.0), kernel("gemma", 0.0), kernel("gemma", 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "index"), [(LlamaRMSNorm, 0), (OlmoRMSNorm, 1), (GemmaRMSNorm, 2)]
)
def test_a_norm_gets_the_kernel_that_rounds_where_it_does(kind, index, dtype):
    """Fresh weights are all ones, which hide it."""
    modules = [kind(96, dtype) for _ in range(2)]
    if dtype == torch.float32 and index == 1:
        index = 0  # nothing is rounded
    assert best_norm(modules, CHOICES) is CHOICES[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_another_eps_is_another_norm(eps, dtype):
    with pytest.raises(Unlike, match="other numbers than LlamaRMSNorm"):
        best_norm([LlamaRMSNorm(96, dtype)], [kernel("llama", 0.0, eps)])


def test_both_modules_are_tried():
    class Odd(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * 1.01

    first, last = LlamaRMSNorm(96, torch.bfloat16), Odd(96, torch.bfloat16)
    with pytest.raises(Unlike):
        best_norm([first, last], CHOICES)


def test_a_kernel_that_keeps_half_the_digits_is_worse():
    def rough(x, weight):
        y = norm(x, weight, "llama", 0.0)
        if x.dtype != torch.bfloat16:
            return y
        bits = y.detach().view(torch.int16)
        coarse = ((bits + 4) & ~7).view(torch.bfloat16)  # 4 bits of the mantissa's 7
        return y + (coarse - y).detach()

    module = LlamaRMSNorm(512, torch.bfloat16)
    with pytest.raises(Unlike):
        best_norm([module], [rough])


def test_the_runs_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    best_norm([LlamaRMSNorm(96, torch.bfloat16)], CHOICES)
    assert torch.equal(torch.get_rng_state(), state)


class MLP(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 48), nn.Linear(16, 48)
        self.down_proj, self.act_fn = nn.Linear(48, 16), act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def with_product(product):
    def forward(own_forward, mlp, x):
        return mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward


def silu(gate, up):
    return F.silu(gate) * up


def gelu_tanh(gate, up):
    return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("act", "product"), [(nn.SiLU(), silu), (nn.GELU(approximate="tanh"), gelu_tanh)]
)
def test_an_mlp_gets_the_product_of_its_activation(act, product, dtype):
    mlp = MLP(act).to(dtype)
    assert best_product([(mlp, act)], (silu, gelu_tanh), with_product, dtype) is product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Sigmoid()])
def test_an_activation_that_only_looks_alike_gets_none(act, dtype):
    """GELU by erf is off by 5e-4 from the one by tanh, under what bf16 shows of a row."""
    with pytest.raises(Unlike, match=f"other numbers than {type(act).__name__}"):
        best_product([(MLP(act).to(dtype), act)], (silu, gelu_tanh), with_product, dtype)


def test_a_module_that_does_more_than_its_product_gets_none():
    class Scaled(MLP):
        def forward(self, x):
            return 1.1 * super().forward(x)

    mlp = Scaled(nn.SiLU())
    with pytest.raises(Unlike, match="Scaled gives other numbers with it"):
        best_product([(mlp, mlp.act_fn)], (silu,), with_product, torch.float32)


def test_a_reader_of_what_a_kernel_overwrites_is_found():
    """A projection whose backward wants its own output."""

    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            gate, up = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
                grads = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, grad)
            gate.data.copy_(grads[0])
            up.data.copy_(grads[1])
            return gate, up

    mlp = MLP(nn.SiLU())
    assert best_product([(mlp, mlp.act_fn)], (Overwrites.apply,), with_product, torch.float32)
    mlp.gate_proj.register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(Unlike, match="MLP gives other numbers with it"):
        best_product([(mlp, mlp.act_fn)], (Overwrites.apply,), with_product, torch.float32)
