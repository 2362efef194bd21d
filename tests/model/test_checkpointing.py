"""Checkpointed decoder layers as nodes of autograd, beside `torch.utils.checkpoint`."""

from __future__ import annotations

import copy
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
)

from tests.conftest import DEVICE
from tralign_fast.model import checkpointing
from tralign_fast.model.checkpointing import lean_checkpoints
from tralign_fast.model.fused_lora import fuse_lora

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(1, 15).view(2, 7).to(DEVICE)


def build(config=None, **options):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE)
    if options:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        fuse_lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradients(model, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=IDS).logits.float().log_softmax(-1)[..., 3].sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def random_state():
    """What the next numbers are drawn from."""
    own = torch.get_rng_state().tolist()
    return own, torch.cuda.get_rng_state().tolist() if DEVICE.type == "cuda" else None


class Counting(TorchDispatchMode):
    """Operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def hooked(monkeypatch):
    """How often PyTorch's own function ran."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    return calls


CASES = {
    "full": lambda: build(),
    "biases": lambda: build(Qwen2Config(**SIZES)),
    "no norms before": lambda: build(Olmo2Config(**SIZES)),
    "norms after": lambda: build(Gemma2Config(**SIZES, head_dim=8)),
    "attention dropout": lambda: build(LlamaConfig(**SIZES, attention_dropout=0.3)),
    "LoRA": lambda: build(target_modules="all-linear"),
    "LoRA on attention": lambda: build(target_modules=["q_proj", "v_proj"]),
    "LoRA with dropout": lambda: build(target_modules="all-linear", lora_dropout=0.3),
    "DoRA": lambda: build(target_modules="all-linear", use_dora=True),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_pytorchs_checkpoints_to_the_bit(name, autocast, hooked):
    model = CASES[name]()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        theirs = gradients(model)
        left = random_state()
        assert len(hooked) == 3
        lean_checkpoints(model)
        # the first backward looks at the layers' ends, the second one leaves them out
        for _ in range(2):
            ours = gradients(model)
            assert torch.equal(ours[0], theirs[0])
            assert random_state() == left
            assert ours[1].keys() == theirs[1].keys()
            for parameter, gradient in theirs[1].items():
                assert torch.equal(ours[1][parameter], gradient), parameter
    assert len(hooked) == 3


@pytest.mark.parametrize("name", ["full", "LoRA"])
def test_the_last_product_of_a_layer_is_not_computed_again(name):
    """PyTorch's stops there for a plain layer, and after the product of one with LoRA."""
    model = CASES[name]()
    counts = []
    for lean in (False, True):
        if lean:
            lean_checkpoints(model)
            gradients(model)
        with Counting() as counting:
            gradients(model)
        products = ("mm", "addmm", "addmm_", "_linear_pointwise")
        counts.append((sum(counting.counts[p] for p in products), counting.counts["add"]))
    (theirs, their_adds), (ours, our_adds) = counts
    assert ours == theirs - (0 if name == "full" else 3 * 2)  # base, and the factors' sum with it
    assert our_adds <= their_adds


def test_no_hook_in_python_sees_a_saved_tensor(monkeypatch):
    """Which is where the host's time went: two forwards of hooks a layer."""
    packed = Counter()
    own = torch.autograd.graph.saved_tensors_hooks.__init__

    def init(self, pack, unpack):
        def counted(tensor):
            packed["times"] += 1
            return pack(tensor)

        own(self, counted, unpack)

    monkeypatch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", init)
    model = build()
    gradients(model)
    assert packed["times"] > 3 * 20
    packed.clear()
    lean_checkpoints(model)
    gradients(model)
    assert not packed


def test_layers_that_return_tuples_draw_what_they_draw_with_pytorchs_and_run_as_often():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = build(FalconConfig(**sizes, hidden_dropout=0.3))
    theirs = gradients(model), random_state()
    with Counting() as once:
        gradients(model)
    lean_checkpoints(model)
    for _ in range(2):
        with Counting() as counting:
            ours = gradients(model), random_state()
        assert ours[1] == theirs[1]
        for parameter, gradient in theirs[0][1].items():
            assert torch.equal(ours[0][1][parameter], gradient), parameter
    assert counting.counts["mm"] == once.counts["mm"]


def _layer(model):
    return model.model.layers[1]


def hook_a_module(model):
    _layer(model).mlp.register_forward_hook(lambda *_: None)


def hook_a_parameter(model):
    _layer(model).mlp.up_proj.weight.register_hook(lambda grad: 2 * grad)


def hook_accumulation(model):
    def used_up(parameter):
        parameter.used, parameter.grad = parameter.grad, 3 * parameter.grad

    _layer(model).mlp.up_proj.weight.register_post_accumulate_grad_hook(used_up)


def hold_a_tensor_elsewhere(model):
    """As X-LoRA does: the module is none that is known to train its parameters alone."""
    scale = torch.ones((), device=DEVICE, requires_grad=True)

    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return scale * self.inner(x)

    _layer(model).mlp = Scaled(_layer(model).mlp)
    model.scale = torch.nn.Parameter(torch.zeros((), device=DEVICE))
    scale.register_hook(lambda grad: setattr(model.scale, "grad", grad))


def wrap_a_forward(model):
    """As accelerate does."""
    attention = _layer(model).self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)


@pytest.mark.parametrize(
    "change", [hook_a_module, hook_a_parameter, hook_accumulation, hold_a_tensor_elsewhere,
               wrap_a_forward],
)  # fmt: skip
def test_what_a_node_does_not_know_runs_by_pytorchs_checkpoint(change, hooked):
    model = build()
    change(model)
    theirs = gradients(model)
    lean_checkpoints(model)
    for _ in range(2):
        del hooked[:]
        ours = gradients(model)
        assert len(hooked) == 1
        for parameter, gradient in theirs[1].items():
            assert torch.equal(ours[1][parameter], gradient), parameter


def test_replicas_of_data_parallel_run_by_pytorchs_checkpoint(hooked):
    model = build()
    theirs = gradients(model)
    lean_checkpoints(model)
    layer = _layer(model)
    for module in [*layer.modules()]:  # as `DataParallel` makes them, on one device
        replica = module._replicate_for_data_parallel()
        module.__dict__["_is_replica"] = replica.__dict__["_is_replica"]
    del hooked[:]
    ours = gradients(model)
    assert len(hooked) == 1
    for parameter, gradient in theirs[1].items():
        assert torch.equal(ours[1][parameter], gradient), parameter


def test_autocast_keeps_no_copies_of_the_weights():
    model = build()
    lean_checkpoints(model)
    copies = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].shape == (24, 16):
                copies.append(weakref.ref(out))
            return out

    with torch.autocast(DEVICE.type, torch.bfloat16), Casts():
        model(input_ids=IDS)
        assert len(copies) == 3 * 2  # gates and ups
        assert not any(copy() is not None for copy in copies)


class OnlyLinear(torch.Tensor):
    """A weight that knows `F.linear` alone, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        if func is torch.nn.functional.linear:
            return func(args[0], 2 * plain[1], *args[2:])
        return super().__torch_function__(func, types, args, kwargs)


def test_a_last_weight_that_is_no_plain_tensor_makes_its_own_product():
    model = build()
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach().as_subclass(OnlyLinear)
        layer.mlp.down_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    theirs = gradients(model)
    lean_checkpoints(model)
    for ours in (gradients(model), gradients(model)):
        for parameter, gradient in theirs[1].items():
            assert torch.equal(ours[1][parameter], gradient), parameter


def test_hooks_on_all_modules_see_what_they_see_with_pytorchs():
    model = build()
    lean_checkpoints(model)
    gradients(model)
    last = _layer(model).mlp.down_proj
    hook = register_module_forward_hook(lambda module, _, y: 2 * y if module is last else None)
    try:
        ours = gradients(model)
        model.gradient_checkpointing_disable()
        theirs = gradients(model)
    finally:
        hook.remove()
    for parameter, gradient in theirs[1].items():
        assert torch.equal(ours[1][parameter], gradient), parameter


def test_offloaded_tensors_stay_with_their_hooks(hooked):
    model = build()
    lean_checkpoints(model)
    with torch.autograd.graph.save_on_cpu():
        gradients(model)
    assert len(hooked) == 3


def test_frozen_layers_and_layers_frozen_in_between():
    model = build()
    lean_checkpoints(model)
    gradients(model)
    _layer(model).requires_grad_(False)
    model.model.layers[2].mlp.down_proj.requires_grad_(False)
    ours = gradients(model)
    lean = copy.deepcopy(model)
    lean.gradient_checkpointing_disable()
    theirs = gradients(lean)
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][n], theirs[1][n]) for n in theirs[1])


def an_adapter(model):
    """PEFT's own forward of its layer, dropout being what `fuse_lora` leaves, calls the old one."""
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.3, target_modules="all-linear")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def dropout_at_the_end(model):
    for layer in model.model.layers:
        layer.resid_mlp_dropout.p = 0.3
    return model


@pytest.mark.parametrize("change", [an_adapter, dropout_at_the_end])
def test_a_layer_that_ends_otherwise_than_it_did_is_looked_at_again(change):
    config = None if change is an_adapter else Phi3Config(**SIZES, pad_token_id=0)
    model = build(config)
    lean_checkpoints(model)
    gradients(model)
    model = change(model)
    ours = gradients(model), gradients(model)
    model.gradient_checkpointing_disable()
    _, theirs = gradients(model)
    for _, found in ours:
        assert found.keys() == theirs.keys()
        for parameter, gradient in theirs.items():
            assert torch.equal(found[parameter], gradient), parameter


def test_a_second_backward_and_gradients_that_are_asked_for():
    model = build()
    lean_checkpoints(model)
    _, once = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum()
    loss.backward(retain_graph=True)
    weight = _layer(model).mlp.up_proj.weight
    (asked,) = torch.autograd.grad(loss, weight)
    assert torch.equal(asked, once["model.layers.1.mlp.up_proj.weight"])


def test_the_undo_gives_pytorchs_function_back_and_a_copy_has_its_own():
    model = build()
    before = _layer(model)._gradient_checkpointing_func
    undo = lean_checkpoints(model)
    second = lean_checkpoints(model)
    other = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as a trainer does
    undo()
    assert checkpointing._is_ours(_layer(model)._gradient_checkpointing_func)
    second()
    function = _layer(model)._gradient_checkpointing_func
    assert function.func is before.func
    assert function.keywords == before.keywords
    assert "_set_gradient_checkpointing" not in vars(model)
    assert other._set_gradient_checkpointing.__self__ is other
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not checkpointing._is_ours(_layer(model)._gradient_checkpointing_func)


def test_other_options_of_the_checkpoints_are_pytorchs():
    model = build()
    lean_checkpoints(model)
    for options in ({"use_reentrant": True}, {"use_reentrant": False, "debug": True}):
        model.gradient_checkpointing_enable(options)
        assert not checkpointing._is_ours(_layer(model)._gradient_checkpointing_func)
