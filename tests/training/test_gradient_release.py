"""Gradient release: the same training, without the gradients' memory."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor

from tests.conftest import make_tiny_llama
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast import TRConfig
from tralign_fast.training.gradient_release import BlockAdafactor, GradientRelease

RELEASE: dict[str, Any] = {"gradient_release": True, "max_grad_norm": 0.0}
PLAIN: dict[str, Any] = {"max_grad_norm": 0.0}


def tied_llama(tokenizer):
    return make_tiny_llama(tokenizer, tie_word_embeddings=True)


@pytest.mark.parametrize("reference", ["resident", "snapshot"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_the_losses_are_those_without_release(optim, reference, small_tokenizer, tmp_path):
    extra = {
        "optim": optim, "reference": reference, "weight_decay": 0.1, "gradient_checkpointing": True,
        "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3, "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }  # fmt: skip
    model = tied_llama(small_tokenizer)
    plain = make(model, small_tokenizer, tmp_path / "a", **extra, **PLAIN)
    expected = history(plain)
    released = make(model, small_tokenizer, tmp_path / "b", **extra, **RELEASE)
    assert history(released) == pytest.approx(expected, rel=2e-6)
    assert max(expected) - min(expected) > 0.02  # it does train
    for a, b in zip(released.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
        assert a.grad is None


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_resume_goes_on_to_the_same_losses_with_and_without_release(
    optim, tiny_llama, small_tokenizer, tmp_path
):
    extra = {"optim": optim, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make(tiny_llama, small_tokenizer, tmp_path, **extra, **RELEASE)
    expected = history(whole)
    for options, tolerance in ((RELEASE, 0), (PLAIN, 2e-6)):
        again = make(tiny_llama, small_tokenizer, tmp_path, **extra, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
        assert resumed == pytest.approx(expected, rel=tolerance, abs=0)


def test_8_bit_adamw_of_bitsandbytes(tiny_llama, small_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    extra = {"optim": "adamw_bnb_8bit", "max_steps": 4}
    try:
        expected = history(make(tiny_llama, small_tokenizer, tmp_path / "a", **extra, **PLAIN))
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit optimizer on this device: {error}")
    released = history(make(tiny_llama, small_tokenizer, tmp_path / "b", **extra, **RELEASE))
    assert released == pytest.approx(expected, rel=2e-6)


def test_one_gradient_lives_at_a_time(small_tokenizer, tmp_path):
    model = tied_llama(small_tokenizer)
    total = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    peaks = {}
    for name, options in (("plain", PLAIN), ("released", RELEASE)):
        trainer = make(model, small_tokenizer, tmp_path / name, max_steps=2, **options)
        live: list[int] = []

        def count(_, trainer=trainer, live=live):
            grads = (p.grad for p in trainer.model.parameters())
            live.append(sum(g.numel() for g in grads if g is not None))

        for parameter in trainer.model.parameters():  # before the release's own hooks
            parameter.register_post_accumulate_grad_hook(count)
        trainer.train()
        peaks[name] = max(live)
        assert len(live) == 2 * len(list(model.parameters()))  # a tied weight's hook fires once
    assert peaks["plain"] == total
    assert peaks["released"] == largest


@pytest.mark.parametrize("options", [PLAIN, RELEASE], ids=["plain", "released"])
def test_a_trainer_that_is_dropped_frees_its_model(options, tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=2, **options)
    trainer.train()
    held = [weakref.ref(t) for t in (trainer.model, *trainer.model.parameters())]
    del trainer
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_any_optimizer_that_updates_each_parameter_on_its_own(factory):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    released = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    released.load_state_dict(plain.state_dict())
    a = factory(plain.parameters(), lr=0.05)
    b = GradientRelease(factory(released.parameters(), lr=0.05))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (a, b)]
    for _ in range(4):
        x = torch.randn(6, 5)
        for model, optimizer, schedule in ((plain, a, schedules[0]), (released, b, schedules[1])):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for p, q in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(p, q)
    restored = factory(plain.parameters(), lr=0.05)
    restored.load_state_dict(b.state_dict())
    assert restored.param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**4)
    b.remove()
    released(torch.randn(2, 5)).sum().backward()
    assert all(p.grad is not None for p in released.parameters())


@pytest.mark.parametrize("shape", [(7,), (40, 12), (3, 16, 8)])
@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_block_adafactor_is_transformers_adafactor(dtype, shape, scale_parameter, monkeypatch):
    """In fp32 and fp64 to their precision; a bf16 or fp16 weight lies on a neighbour of theirs,
    which is computed from the same weight and rounded to nearest."""
    monkeypatch.setattr("tralign_fast.training.block_adafactor._BLOCK", 50)
    torch.manual_seed(0)
    start = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {
        "lr": 0.1, "weight_decay": 0.05, "relative_step": False, "scale_parameter": scale_parameter
    }  # fmt: skip
    theirs, ours = Adafactor([a], **options), BlockAdafactor([b], **options)
    exact = dtype in (torch.float32, torch.float64)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for scale in (1e-3, 1.0, 30.0, 0.5):  # the last clips nothing
        before = a.detach().clone()
        b.data.copy_(before)  # the rounding of the steps before is not compared
        a.grad = (torch.randn(shape) * scale).to(dtype)
        b.grad = a.grad.clone()
        theirs.step()
        ours.step()
        torch.testing.assert_close(
            b, a, rtol=10 * tolerance if exact else tolerance, atol=tolerance
        )
        moved = [float((w.detach() - before).abs().sum()) for w in (a, b)]
        assert moved[1] > moved[0] / 2 > 0
    expected, found = theirs.state[a], ours.state[b]
    assert expected.keys() == found.keys()
    if not scale_parameter:  # transformers measures the weight all the same
        del expected["RMS"]
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0)


def test_bf16_weights_move_as_far_as_fp32_weights_do():
    torch.manual_seed(0)
    start = torch.full((256, 256), 0.02, dtype=torch.bfloat16)
    weights = {
        "exact": nn.Parameter(start.float()),
        "ours": nn.Parameter(start.clone()),
        "nearest": nn.Parameter(start.clone()),
    }
    options = {"lr": 1e-6, "relative_step": False, "scale_parameter": False}
    optimizers = [
        (Adafactor if name == "nearest" else BlockAdafactor)([w], **options)
        for name, w in weights.items()
    ]
    for _ in range(20):
        for optimizer, weight in zip(optimizers, weights.values(), strict=True):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    moved = {
        name: float((w.detach().float() - start.float()).mean()) for name, w in weights.items()
    }
    assert moved["exact"] == pytest.approx(-2e-5, rel=1e-3)
    assert moved["nearest"] == 0.0
    # 20 draws for 65,536 weights, a step of 1.2e-4 each: the standard error of the mean is 1%
    assert moved["ours"] == pytest.approx(moved["exact"], rel=0.05)


def test_fp16s_largest_number_stays_finite():
    """Rounded up, which is bad luck, it would be infinite; what lies beyond it, is."""
    largest = torch.finfo(torch.float16).max
    weight = nn.Parameter(torch.full((64, 64), largest, dtype=torch.float16))
    options = {"relative_step": False, "scale_parameter": False}
    for lr, expected in ((4.0, largest), (64.0, math.inf)):
        weight.grad = -torch.ones_like(weight)
        BlockAdafactor([weight], lr=lr, **options).step()
        assert (weight == expected).all()


def test_no_norm_is_logged_of_gradients_that_are_used_up(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=2, **RELEASE)
    assert len(history(trainer)) == 2
    assert history(trainer, "grad_norm") == []


def test_gradients_after_a_bad_one_are_left_out():
    """Those before it were used, which the documentation says."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    before = [p.detach().clone() for p in layers.parameters()]
    release = GradientRelease(torch.optim.SGD(layers.parameters(), lr=0.1))
    layers[1].weight.register_hook(lambda grad: grad * math.inf)
    layers(torch.ones(1, 2)).sum().backward()
    assert float(release.found_inf) == 1
    release.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True)]
    assert moved[:3] == [False, False, False]
    assert moved[4:] == [True, True]


def test_a_parameters_step_passes_over_no_other():
    """291 parameters of an 8B model would be looked at 291 times."""
    layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    weights = [{"params": list(layers[:2].parameters()), "weight_decay": 0.0},
               {"params": list(layers[2:].parameters())}]  # fmt: skip
    inner = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5)
    optimizer, seen = GradientRelease(inner), []
    inner.register_step_pre_hook(
        lambda o, *_: seen.append(
            [(g["lr"], g["weight_decay"], *g["params"]) for g in o.param_groups]
        )
    )
    for lr in (0.1, 0.2):
        for group in optimizer.param_groups:  # as a scheduler does it
            group["lr"] = lr
        layers(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert len(optimizer.param_groups) == 2
    assert all(len(groups) == 1 and len(groups[0]) == 3 for groups in seen)
    found = {(lr, decay, id(p)) for ((lr, decay, p),) in seen}
    assert found == {
        (lr, decay, id(p))
        for lr in (0.1, 0.2)
        for decay, half in ((0.0, layers[:2]), (0.5, layers[2:]))
        for p in half.parameters()
    }


def test_a_second_backward_is_refused():
    layer = nn.Linear(3, 3)
    release = GradientRelease(torch.optim.AdamW(layer.parameters()))
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        layer(torch.ones(1, 3)).sum().backward()
    del release  # and its hooks with it
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"token_budget": 512}, "token_budget"),
        ({"fp16": True, "bf16": False}, "fp16"),
        ({"optim": "adagrad"}, "adamw_torch.*got 'adagrad'"),
    ],
)
def test_what_release_excludes_is_refused_in_one_line(option, expected, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **RELEASE, **option}
    with pytest.raises(ValueError, match=expected) as error:
        TRConfig(**options)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_looks_at_all_gradients_is_refused():
    with pytest.raises(ValueError, match="LBFGS is not known"):
        GradientRelease(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


def test_a_model_on_several_devices_is_refused():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="several devices"):
        GradientRelease(torch.optim.AdamW(parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_number_never_becomes_infinite(dtype):
    """An update far under the spacing there, which half of all roundings would turn into it."""
    largest = torch.finfo(dtype).max
    weight = nn.Parameter(torch.full((64, 64), largest, dtype=dtype))
    options = {"lr": largest / 10_000, "relative_step": False, "scale_parameter": False}
    optimizer = BlockAdafactor([weight], **options)
    for _ in range(3):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    assert (weight == largest).all()
