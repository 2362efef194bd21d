"""PEFT's adapters but for LoRA: those that add positions, those that no packed row can have."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import peft
import pytest
import torch

from tests.model.test_attention import build, examples
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import hidden_kl, sequence_logps
from tralign_fast.ops.backend import warn_once

TASK: Any = {"task_type": "CAUSAL_LM"}
VIRTUAL = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=8, **TASK),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **TASK),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
    "prefix tuning, projected": peft.PrefixTuningConfig(
        num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
    "CPT": peft.CPTConfig(cpt_token_ids=[5, 6, 7], **TASK),
}
if hasattr(peft, "CartridgeConfig"):
    VIRTUAL["cartridge"] = peft.CartridgeConfig(num_virtual_tokens=4, **TASK)
OTHERS = {
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "LN tuning": peft.LNTuningConfig(target_modules=["norm"], **TASK),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], r=4, **TASK),
}


def model_with(config, name="llama"):
    torch.manual_seed(0)
    model = peft.get_peft_model(build(name), copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():  # what is trained starts at zero in some
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def padded():
    (batch,) = PreferenceCollator(paired=True, layout="padded")(examples()).parts
    return batch


def own_logps(model):
    """By the PEFT model's own logits, without this library."""
    batch = padded()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = logits[:, -batch.input_ids.shape[1] :].flatten(0, 1)[batch.score_index]
    return batch.sum_per_sequence(rows.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0])


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_counted(name, architecture):
    model = model_with(VIRTUAL[name], architecture)
    expected = own_logps(model)
    grads = gradients(model, expected)
    assert grads
    plain = own_logps(build(architecture).eval())
    assert (expected - plain).abs().max() > 0.1  # the virtual tokens matter
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare_model(model)
    assert not prepared.packs
    # PEFT reads what transformers deprecates
    (said,) = [str(w.message) for w in caught if w.category is not FutureWarning]
    assert "puts virtual tokens before every row, not every sequence" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        logps = sequence_logps(model, padded())
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=3e-5)
    for key, grad in gradients(model, logps).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(
            sequence_logps(model, padded()), plain.detach(), rtol=1e-5, atol=3e-5
        )
    other = build(architecture).eval()
    prepare_model(other, packing=False)
    assert hidden_kl(model, other, padded()) > 0.1
    assert hidden_kl(model, model, padded()).abs() < 1e-4
    prepared.undo()
    torch.testing.assert_close(own_logps(model), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_without_positions_are_packed(name):
    model = model_with(OTHERS[name])
    with torch.no_grad():
        expected = own_logps(model)
        assert prepare_model(model).packs
        (batch,) = PreferenceCollator(paired=True)(examples()).parts
        torch.testing.assert_close(sequence_logps(model, batch), expected, rtol=1e-5, atol=3e-5)


def test_alora_is_padded():
    """Its adapter starts at the invocation tokens, which PEFT looks for once in every row."""
    config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[4, 5], **TASK)
    model = model_with(config)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="aLoRA looks for its invocation once in every row"):
        assert not prepare_model(model).packs


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, **TASK),
            "needs a task",
        ),
        (peft.PolyConfig(target_modules=["q_proj"], n_tasks=2, n_skills=2, **TASK), "needs a task"),
        (peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, **TASK), "keeps the forward"),
    ],
)
def test_types_that_cannot_be_scored_are_refused(config, why, probe):
    model = model_with(config)
    with pytest.raises(ValueError, match=f"PEFT's {config.peft_type.value} {why}"):
        prepare_model(model, probe=probe)


def test_without_a_try_they_are_not_packed_either():
    model = model_with(VIRTUAL["prompt tuning"])
    assert not prepare_model(model, probe=False).packs


@pytest.mark.parametrize("name", ["prefix tuning", "prompt tuning"])
def test_gradient_checkpointing(name):
    """transformers drops a given cache there: a prefix would silently be left out."""
    model = model_with(VIRTUAL[name])
    prepare_model(model)
    expected = sequence_logps(model, padded())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    refused = pytest.raises(ValueError, match="gradient checkpointing drops the keys and values")
    with refused if name == "prefix tuning" else contextlib.nullcontext():
        logps = sequence_logps(model, padded())
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_a_trainer_has_the_same_losses_in_every_place(name, tiny_llama, small_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama, copy.deepcopy(VIRTUAL[name]))
    extra = {"max_steps": 4, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    losses = [
        history(make(model, small_tokenizer, tmp_path / place, reference=place, **extra))
        for place in ("resident", "snapshot", "offloaded")
    ]
    assert len(set(losses[0])) > 2  # it trains
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
