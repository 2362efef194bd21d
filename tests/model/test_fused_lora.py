"""PEFT's LoRA layers as one node of autograd: PEFT's numbers, and its own forward elsewhere."""

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
    options: Any = {"inputs": 96, "outputs": 160, "r": 8, "lora_alpha": 11}
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


# --- where PEFT's own forward runs ----------------------------------------------------------------


def _second(model):
    model.proj.update_layer("second", 2, lora_alpha=2, config=LoraConfig(r=2))
    model.proj.set_adapter(["default", "second"])


def _merge(model):
    model.proj.merge()


def _hook(part):
    return lambda model: getattr(model.proj, part)["default"].register_forward_hook(
        lambda module, args, out: out * 2
    )


def _hook_on_base(model):
    model.proj.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replace_forward(model):
    down = model.proj.lora_A["default"]
    own = down.forward
    down.forward = lambda x: own(x) * 2


def _subclass(model):
    """A weight with dispatch of its own, as quantised ones have it."""

    class Doubled(torch.Tensor): ...

    weight = model.proj.base_layer.weight
    model.proj.base_layer.weight = nn.Parameter(weight.data.as_subclass(Doubled))


def _four_bit(model):
    bnb = pytest.importorskip("bitsandbytes")
    old = model.proj.base_layer
    new = bnb.nn.Linear4bit(24, 40, bias=True, quant_type="nf4", compute_dtype=FP32)
    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
    model.proj.base_layer = new.to("cpu")


OWN = {  # options of the adapter, what is done to the model
    "dropout": ({"lora_dropout": 0.5}, lambda m: m.eval()),
    "DoRA": ({"use_dora": True}, None),
    "lora_bias": ({"lora_bias": True}, None),
    "aLoRA": ({"alora_invocation_tokens": [1]}, None),
    "two adapters": ({}, _second),
    "disabled": ({}, lambda m: m.proj.enable_adapters(False)),
    "none active": ({}, lambda m: m.proj.set_adapter([])),
    "merged": ({}, _merge),
    "hook on A": ({}, _hook("lora_A")),
    "hook on B": ({}, _hook("lora_B")),
    "hook on the base": ({}, _hook_on_base),
    "another forward": ({}, _replace_forward),
    "tensor subclass": ({}, _subclass),
    "4-bit": ({}, _four_bit),
    "no cast": ({}, lambda m: setattr(m.proj, "cast_input_dtype_enabled", False)),
}


@pytest.mark.parametrize("kind", OWN)
def test_what_is_no_plain_adapter_is_left_to_peft(kind, calls):
    options, change = OWN[kind]
    factors = torch.float64 if kind == "no cast" else FP32
    model = layer_of(factors=factors, **options)
    if change is not None:
        change(model)
    x, grad = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 40)
    if kind == "no cast":  # an error of PEFT's
        with fused(model), pytest.raises(RuntimeError, match="dtype"):
            model(x)
        assert not calls
        return
    truth = outcome(model, x, grad)
    with fused(model):
        ours = outcome(model, x, grad)
    assert not calls
    assert ours.keys() == truth.keys()
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_an_adapter_for_each_row_is_left_to_peft(calls):
    model = layer_of()
    x = torch.randn(2, 24)
    with fused(model):
        mixed = model(x, adapter_names=["default", "__base__"])
        assert not calls
        torch.testing.assert_close(mixed[0], model(x)[0])
        torch.testing.assert_close(mixed[1], model.proj.base_layer(x)[1])
    assert len(calls) == 1


def test_other_layers_are_not_touched(calls):
    model: Any = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "embedding": nn.Embedding(8, 4)})
    get_peft_model(model, LoraConfig(r=2, target_modules=["conv", "embedding"]))
    with fused(model):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_undo_gives_peft_back(calls):
    model = layer_of()
    first, second = fuse_lora(model), fuse_lora(model)
    x = torch.randn(2, 24)
    model(x)
    first()
    model(x)
    assert len(calls) == 2
    second()
    model(x)
    assert len(calls) == 2
    assert "forward" not in model.proj.__dict__


def test_compiled_it_is_left_to_peft_without_a_break(calls):
    torch._dynamo.reset()
    model = layer_of()
    x, grad = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 40)
    truth = outcome(model, x, grad)
    with fused(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(x)
        out.backward(grad)
    assert not calls
    torch.testing.assert_close(out.detach(), truth["out"])
    torch.testing.assert_close(x.grad, truth["x"])
    torch._dynamo.reset()


# --- in a model -----------------------------------------------------------------------------------


def policy_of(name="llama", **options) -> Any:
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 4, "init_lora_weights": False, **options}
    return get_peft_model(build(name), LoraConfig(target_modules="all-linear", **options))


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    logps = sequence_logps(model, batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {
        "logps": logps.detach(),
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "new", "reentrant"])
def test_a_model_has_the_gradients_that_it_has_without(checkpointing, calls):
    model, batch = policy_of(), collate("shared")
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    with prepare_model(model, fused_lora=False):
        truth = gradients(model, batch)
    assert not calls
    with prepare_model(model):
        calls.clear()
        ours = gradients(model, batch)
    layers = 3 * 7
    assert len(calls) == (layers if checkpointing is None else 2 * layers)
    assert ours.keys() == truth.keys()
    assert len(truth) == 1 + 2 * layers
    for name, expected in truth.items():  # rounding of three layers
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("reference", ["snapshot", "adapter", "resident"])
def test_a_run_has_the_losses_that_it_has_without(
    reference, tiny_llama, small_tokenizer, tmp_path, calls, monkeypatch
):
    policy = get_peft_model(
        copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    extra: Any = {
        "reference": reference, "max_steps": 6, "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 3, "learning_rate": 5e-2,
    }  # fmt: skip
    if reference == "snapshot":
        extra |= {"gradient_release": True, "max_grad_norm": 0.0, "gradient_checkpointing": False}
    ours = history(make(policy, small_tokenizer, tmp_path / "ours", **extra))
    assert calls
    calls.clear()
    monkeypatch.setattr(prepare, "fuse_lora", lambda model: lambda: None)
    truth = history(make(policy, small_tokenizer, tmp_path / "theirs", **extra))
    assert not calls
    assert ours == pytest.approx(truth, rel=1e-5)
    # right after the reference has moved it is the policy, to the last bit
    assert len(set(ours)) == len(set(truth)) == 5
    assert max(truth) - min(truth) > 0.004


class CountKernels(TorchDispatchMode):
    """How many operators run that are not views or bare allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket.__name__ not in _FREE
        return func(*args, **(kwargs or {}))


_FREE = ("_unsafe_view", "new_empty", "empty", "empty_like")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16, autocast"])
def test_a_decoder_layer_runs_fewer_operators(autocast):
    def count(prepared):
        model = policy_of().to(BF16 if autocast else FP32)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        undo = fuse_lora(model) if prepared else None
        decoder = model.get_base_model().model
        x = torch.randn(1, 9, 32, dtype=model.dtype, requires_grad=True)
        positions = decoder.rotary_emb(x, torch.arange(9)[None])
        with CountKernels() as counter, torch.autocast("cpu", dtype=BF16, enabled=autocast):
            out = decoder.layers[0](x, position_embeddings=positions)
        with counter:
            out.backward(torch.ones_like(out))
        if undo is not None:
            undo()
        return counter.count

    # of each of seven layers two products, the scaling and the sums, of either direction
    saved = 7 * (8 if autocast else 4)
    ours, theirs = count(True), count(False)
    print(f"{theirs} operators as PEFT runs them, {ours} here")
    assert ours <= theirs - saved
