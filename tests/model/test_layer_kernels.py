"""Layer kernels in whole models: where they run, what is given back, what is left out.

On a CPU with stand-ins for Liger's launchers, which overwrite what those overwrite; Liger's own run
in an interpreter in `tests/kernels/test_layer_kernels.py`, and here on a GPU.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.model import test_attention
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model import layer_kernels
from tralign_fast.model.layer_kernels import KINDS
from tralign_fast.model.patching import has_forward
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.backend import pretend_gpu, warn_once

pytest.importorskip("liger_kernel")
MODELS = ("llama", "qwen3", "gemma2")
LAYERS = 2
ROWS = [
    {"prompt_ids": [5, 9, 2], "chosen_ids": [4, 7, 11], "rejected_ids": [8, 3]},
    {"prompt_ids": [6], "chosen_ids": [12, 1], "rejected_ids": [10]},
]


def build(name: str) -> Any:
    """As small as can be: an interpreter takes 20 ms a row."""
    small = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_attention, "COMMON", {**test_attention.COMMON, **small})
        return test_attention.build(name)


def collate(layout="shared"):
    (batch,) = PreferenceCollator(paired=True, layout=layout)(ROWS).parts
    return batch


def rms_norm_forward(x, weight, eps, offset, casting, row_mode):
    rows = x.view(-1, x.shape[-1])
    rstd = (rows.float().pow(2).mean(-1) + eps).rsqrt()
    normed = rows.float() * rstd[:, None]
    if casting == "llama":
        y = normed.to(x.dtype) * (offset + weight)
    else:
        y = (normed * (offset + weight.float())).to(x.dtype)
    return y.view(x.shape), rows, rstd, 0, 0, casting


def rms_norm_backward(
    grad, x, weight, rstd, offset, casting, block, warps, in_place, row_mode, needs_dw
):
    rows = grad.view(-1, grad.shape[-1]).float()
    normed, m = x.float() * rstd[:, None], rows * (weight + offset)
    grad_x = (rstd[:, None] * (m - normed * (m * normed).mean(-1, keepdim=True))).to(x.dtype)
    if in_place:
        grad.data.copy_(grad_x.view(grad.shape))
    return grad_x.view(grad.shape), (rows * normed).sum(0).to(weight.dtype) if needs_dw else None


def product_forward(act):
    return lambda gate, up: (gate, up, act(gate) * up)


def product_backward(act):
    def backward(gate, up, grad):
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
            grads = torch.autograd.grad(act(leaves[0]) * leaves[1], leaves, grad)
        for saved, new in zip((gate, up), grads, strict=True):
            saved.data.copy_(new)  # as a kernel's, a write that autograd does not see
        return gate, up

    return backward


def turned(sign):
    def turn(q, k, cos, sin):
        for t in (q, k):
            half = torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1)
            t.data.copy_(t * cos[:, None] + sign * half * sin[:, None])
        return q, k, cos, sin

    return turn


@pytest.fixture(params=["stand-ins", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    from tralign_fast.model import liger_ops

    warn_once.cache_clear()
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA or ROCm device")
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which lets a CPU's model ask for kernels
    for function in (rms_norm_forward, rms_norm_backward):
        monkeypatch.setattr(liger_ops._rms_norm, function.__name__, function)
    monkeypatch.setattr(liger_ops, "_HAS_NEEDS_DW", True)
    gelu = partial(F.gelu, approximate="tanh")
    for name, act in (("_silu", F.silu), ("_gelu", gelu)):
        monkeypatch.setattr(liger_ops, name, (product_forward(act), product_backward(act)))
    monkeypatch.setattr(liger_ops._rope, "rope_forward", turned(1))
    monkeypatch.setattr(liger_ops._rope, "rope_backward", lambda *a: turned(-1)(*a)[:2])
    return torch.device("cpu")


def outcome(model, device, layout="shared", autocast=False) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logps = sequence_logps(model, collate(layout).to(device))
    (logps * torch.linspace(-1, 1, len(logps)).to(logps)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logps.detach(), **grads}


def assert_same(ours, truth, share=2e-5):
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert (ours[name] - expected).norm() <= share * expected.norm() + 1e-7, name


def kinds(model) -> Counter[str]:
    """How many modules run by each kind of kernel."""
    return Counter(
        kind for m in model.modules() for kind in KINDS if has_forward(m, f"{kind} kernel")
    )


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_the_models_own_code(name, device, recwarn):
    plain = build(name).to(device)
    fast = copy.deepcopy(plain)
    prepare_model(plain, layer_kernels="none")
    prepare_model(fast, layer_kernels="liger")
    assert not kinds(plain)
    norms = {"llama": 2, "qwen3": 4, "gemma2": 4}[name]
    assert kinds(fast) == {"norm": LAYERS * norms + 1, "mlp": LAYERS, "rotary": LAYERS}
    for layout in ("padded", "packed", "shared"):
        assert_same(outcome(fast, device, layout), outcome(plain, device, layout))
    assert not [w for w in recwarn if "Liger" in str(w.message)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_run_again_in_the_backward(name, reentrant, device):
    model = build(name).to(device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    prepare_model(model, layer_kernels="liger")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(outcome(model, device), truth)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["fused", "PEFT's own"])
def test_adapters(dropout, device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    model = peft.get_peft_model(build("llama"), config).to(device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    prepare_model(model, layer_kernels="liger")
    assert set(kinds(model)) == {*KINDS}
    assert_same(outcome(model, device), truth)
    assert {name.split(".")[-3] for name in truth if "mlp" in name} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", MODELS)
def test_fp32_weights_under_autocast(name, device):
    model = build(name).to(device)
    prepare_model(model, layer_kernels="none").undo()
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device, autocast=True)
        exact = outcome(model, device)
    prepare_model(model, layer_kernels="liger")
    ours = outcome(model, device, autocast=True)
    for key, value in exact.items():
        error, own = ((t[key] - value).norm() for t in (ours, truth))
        assert ours[key].dtype == truth[key].dtype
        assert error <= 2 * own + 2**-8 * value.norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights(name, device):
    exact_model = build(name).bfloat16().float().to(device)
    model = copy.deepcopy(exact_model).bfloat16()
    prepare_model(exact_model, layer_kernels="none")
    exact = outcome(exact_model, device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    prepare_model(model, layer_kernels="liger")
    assert set(kinds(model)) == {*KINDS}
    ours = outcome(model, device)
    for key, value in exact.items():
        error, own = ((t[key].float() - value).norm() for t in (ours, truth))
        assert error <= 2 * own + 2**-8 * value.norm(), key


@pytest.mark.parametrize("reference", ["resident", "snapshot"])
def test_a_run_has_the_same_losses(reference, tiny_llama, small_tokenizer, tmp_path, device):
    """With the policy's moves, and the reference run by the kernels too."""
    start = copy.deepcopy(tiny_llama)

    def losses(layer_kernels):
        args = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "max_steps": 4}
        args["use_cpu"] = device.type == "cpu"
        trainer = TRTrainer(
            copy.deepcopy(start),
            args=TRConfig(
                **options(tmp_path / layer_kernels, **args),
                reference=reference, layer_kernels=layer_kernels,
            ),
            train_dataset=pair_rows(16), processing_class=small_tokenizer,
        )  # fmt: skip
        used = kinds(trainer.model)
        trainer.train()
        return history(trainer, "loss"), used

    (ours, used), (plain, unused) = losses("liger"), losses("none")
    assert set(used) == {*KINDS}
    assert not unused
    assert ours == pytest.approx(plain, abs=2e-6)


# --- what is changed, and what is not -------------------------------------------------------------


def test_undo_gives_the_model_back_as_it_was(device):
    model = build("qwen3").to(device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    prepared = prepare_model(model, layer_kernels="liger")
    second = prepare_model(model, layer_kernels="liger")
    prepared.undo()
    assert set(kinds(model)) == {*KINDS}
    second.undo()
    assert not kinds(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    with prepare_model(model, layer_kernels="none"):
        again = outcome(model, device)
    assert all(torch.equal(again[name], truth[name]) for name in truth)


def test_a_copy_runs_its_own_weights(device):
    model = build("llama").to(device)
    prepare_model(model, layer_kernels="liger")
    before = outcome(model, device)
    other = copy.deepcopy(model)
    assert kinds(other) == kinds(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    truth = copy.deepcopy(other)
    prepare_model(truth, layer_kernels="none")
    plain = build("llama").to(device)
    plain.load_state_dict(other.state_dict())
    prepare_model(plain, layer_kernels="none")
    assert_same(outcome(other, device), outcome(plain, device))
    assert all(torch.equal(t, before[n]) for n, t in outcome(model, device).items())


def test_no_class_and_no_other_model_is_changed(device):
    from transformers.models.llama import modeling_llama

    held = {k: dict(vars(v)) for k, v in vars(modeling_llama).items() if isinstance(v, type)}
    rotary = modeling_llama.apply_rotary_pos_emb
    other = build("llama").to(device)
    prepare_model(build("llama").to(device), layer_kernels="liger")
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert {k: dict(vars(getattr(modeling_llama, k))) for k in held} == held
    assert not kinds(other)
    assert not [m for m in other.modules() if "forward" in vars(m)]


def test_the_kinds_that_are_asked_for(device):
    model = build("llama").to(device)
    with prepare_model(model, layer_kernels=["mlp"]):
        assert kinds(model) == {"mlp": LAYERS}
    with prepare_model(model, layer_kernels=("norm", "rotary")):
        assert set(kinds(model)) == {"norm", "rotary"}


def test_a_second_backward_is_refused(device):
    model = build("llama").to(device)
    prepare_model(model, layer_kernels="liger")
    mlp = model.model.layers[0].mlp
    loss = mlp(torch.randn(1, 3, 32, device=device)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='wants layer_kernels="none"'):
        loss.backward()


def test_graphs_are_compiled_of_the_models_own_code(device, monkeypatch):
    from tralign_fast.model import liger_ops

    model = build("llama").to(device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    prepared = prepare_model(model, layer_kernels="liger")
    prepared.compile_layers(backend="eager", dynamic=True)
    launched: Counter[str] = Counter()
    original = liger_ops._RMSNorm.apply
    monkeypatch.setattr(
        liger_ops._RMSNorm, "apply", lambda *a: (launched.update(["norm"]), original(*a))[1]
    )
    assert_same(outcome(model, device), truth)
    assert launched["norm"] <= 1 + 2  # the last norm; the last layer, which is not compiled


# --- what is left out -----------------------------------------------------------------------------


def a_little_more(function, *args, **kwargs):
    out = function(*args, **kwargs)
    return tuple(t * 1.001 for t in out) if isinstance(out, tuple) else out * 1.001


class Twice(torch.autograd.Function):
    """A right output with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def a_wrong_gradient(function, *args, **kwargs):
    return function(Twice.apply(args[0]), *args[1:], **kwargs)


def nothing_finite(function, *args, **kwargs):
    out = function(*args, **kwargs)
    return tuple(t * math.nan for t in out) if isinstance(out, tuple) else out * math.nan


def no_kernel(function, *args, **kwargs):
    raise RuntimeError("out of resource: shared memory\nand more")


LIES = (a_little_more, a_wrong_gradient, nothing_finite, no_kernel)
NAMES = {
    "norm": (["rms_norm"], "RMSNorm"),
    "mlp": (["silu_product", "gelu_product"], "gated MLPs"),
    "rotary": (["rotary"], "rotary embeddings"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", NAMES)
def test_a_kernel_that_is_not_as_good_is_left_out(kind, lie, device, monkeypatch, recwarn):
    from tralign_fast.model import liger_ops

    model = build("llama").to(device)
    with prepare_model(model, layer_kernels="none"):
        truth = outcome(model, device)
    functions, title = NAMES[kind]
    for name in functions:
        monkeypatch.setattr(liger_ops, name, partial(lie, getattr(liger_ops, name)))
    recwarn.clear()
    prepare_model(model, layer_kernels="liger")
    assert set(kinds(model)) == {*KINDS} - {kind}
    (said,) = [str(w.message) for w in recwarn if "Liger" in str(w.message)]
    assert said.startswith("Liger 0.8")
    assert f"its kernel for {title} is left out (" in said
    assert "\n" not in said
    assert_same(outcome(model, device), truth)


class Clamped(nn.Module):
    """An MLP that its projections' names do not tell all of."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


def test_modules_that_compute_something_else_stay_as_they_are(device, recwarn):
    model = build("llama").to(device)
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp)
    model.model.norm.register_forward_hook(lambda *args: None)
    model.model.layers[0].input_layernorm.forward = lambda x: x  # somebody's own
    prepare_model(model, layer_kernels="liger")
    assert kinds(model) == {"norm": 2 * LAYERS, "rotary": LAYERS}
    assert not [w for w in recwarn if "Liger" in str(w.message)]


def test_rotary_embeddings_of_another_kind_are_said(device, recwarn):
    model = build("cohere").to(device)  # pairs of neighbours, not halves
    prepare_model(model, layer_kernels="liger")
    assert kinds(model) == {"mlp": LAYERS}
    (said,) = [str(w.message) for w in recwarn if "Liger" in str(w.message)]
    assert "rotary embeddings is left out (other numbers than that of CohereAttention)" in said


# --- the library: missing, old, not wanted --------------------------------------------------------


def said_of(recwarn, choice: Any = "auto") -> list[str]:
    """What is said where the model is on a GPU; on a CPU kernels of no library are looked for."""
    warn_once.cache_clear()
    model = build("llama")
    with pretend_gpu():
        layer_kernels.use_layer_kernels(model, choice, lambda: None)
    assert not kinds(model)
    return [str(w.message) for w in recwarn if "Liger" in str(w.message)]


def test_a_missing_library_is_one_warning(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    (said,) = said_of(recwarn)
    assert said.startswith("Liger is not installed (pip install liger-kernel)")


def test_a_library_that_is_too_old_is_one_warning(monkeypatch, recwarn):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    (said,) = said_of(recwarn)
    assert said.startswith("Liger 0.8.0 is too old for layer_kernels, which wants 0.8.1")


def test_a_library_that_cannot_be_imported_is_one_warning(monkeypatch, recwarn):
    def fail(name):
        raise RuntimeError("no driver")

    monkeypatch.setattr(importlib, "import_module", fail)
    (said,) = said_of(recwarn)
    assert "cannot be imported (no driver)" in said


def norms_of_torch(name: str, monkeypatch, choice: str = "auto", has: bool = True) -> Any:
    """A model prepared on a GPU without Liger; on a CPU PyTorch's operator is a composition."""
    warn_once.cache_clear()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(layer_kernels, "_has_fused_norm", lambda: has)
    model = build(name)
    prepare_model(model, layer_kernels="none")
    with pretend_gpu():
        undo = layer_kernels.use_layer_kernels(model, choice, lambda: None)
    return model, undo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_library_norms_run_by_pytorchs_kernel(dtype, monkeypatch, recwarn):
    model, undo = norms_of_torch("llama", monkeypatch)
    called = []
    own = torch._fused_rms_norm
    monkeypatch.setattr(torch, "_fused_rms_norm", lambda *a: called.append(a) or own(*a))
    assert kinds(model) == {"norm": 2 * LAYERS + 1}
    (said,) = [str(w.message) for w in recwarn if "Liger" in str(w.message)]
    assert said.endswith("PyTorch's operators run")
    model = model.to(dtype)
    found = outcome(model, torch.device("cpu"))
    assert len(called) == 2 * LAYERS + 1
    undo()
    assert not kinds(model)
    expected = outcome(model, torch.device("cpu"))
    exact = outcome(copy.deepcopy(model).double(), torch.device("cpu"))
    for key, value in exact.items():
        ours, theirs = ((t[key].double() - value).norm() for t in (found, expected))
        assert ours <= 1.5 * theirs + 1e-7 * value.norm(), key


def test_norms_of_pytorch_are_taken_where_they_are_one_kernel_by_default_alone(
    monkeypatch,
):
    assert not kinds(norms_of_torch("llama", monkeypatch, has=False)[0])
    assert not kinds(norms_of_torch("llama", monkeypatch, choice="liger")[0])
    assert not kinds(norms_of_torch("llama", monkeypatch, choice="none")[0])


def test_a_norm_that_pytorchs_kernel_does_not_compute_is_said(monkeypatch, recwarn):
    model, _ = norms_of_torch("gemma2", monkeypatch)  # multiplies with 1 + weight
    assert not kinds(model)
    (said,) = [str(w.message) for w in recwarn if "RMSNorm" in str(w.message)]
    assert said.startswith("PyTorch ")
    assert "its kernel for RMSNorm is left out (other numbers than Gemma2RMSNorm)" in said


def test_none_looks_for_nothing(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert said_of(recwarn, "none") == []
    assert said_of(recwarn, ()) == []


@pytest.mark.parametrize("choice", ["liger", ("norm",)])
def test_on_a_cpu_it_is_said_where_it_was_asked_for(choice, recwarn):
    model = build("llama")
    warn_once.cache_clear()
    prepare_model(model, layer_kernels="auto").undo()
    assert not [w for w in recwarn if "Liger" in str(w.message)]
    prepare_model(model, layer_kernels=choice)
    (said,) = [str(w.message) for w in recwarn if "Liger" in str(w.message)]
    assert said.startswith("layer_kernels: Liger's kernels run on a GPU, and the model is on cpu")
    assert not kinds(model)


@pytest.mark.parametrize("choice", ["quack", ["norm", "attention"]])
def test_an_unknown_choice_is_refused(choice):
    model = build("llama")
    with pytest.raises(ValueError, match="layer_kernels: expected"):
        prepare_model(model, layer_kernels=choice)
    assert not [m for m in model.modules() if "forward" in vars(m)]
