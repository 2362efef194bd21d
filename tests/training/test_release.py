"""The model that a trainer was given, handed back: on request, or when the trainer is dropped."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.model.test_prepare import snapshot
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import TRConfig, TRTrainer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CASES = {
    "resident": {},
    "snapshot, released gradients": {
        "reference": "snapshot", "ref_model_mixup_alpha": 1.0, "gradient_release": True,
        "max_grad_norm": 0.0,
    },
    "offloaded, bf16": {"reference": "offloaded", "ref_model_sync_steps": 2, "bf16": True},
    "adapter": {"reference": "adapter"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}  # fmt: skip


def make(model, tokenizer, output_dir, ref_model=None, **extra) -> TRTrainer:
    """A trainer of this very model."""
    args = TRConfig(**options(output_dir, **{"reference": "resident", **extra}))
    return TRTrainer(model, ref_model, args, None, pair_rows(), processing_class=tokenizer)


def model_for(case, tiny_llama):
    if case == "adapter":
        return get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    return tiny_llama


def as_before(model, before):
    """Whether only what transformers' loop sets on every model is new, and the tags of what it was
    trained by."""
    now = snapshot(model)
    loop = {
        "training", "gradient_checkpointing", "_gradient_checkpointing_func", "model_tags",
    }  # fmt: skip
    mine, theirs = ({k: v for k, v in s.items() if k[1] not in loop} for s in (now, before))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key[1].endswith(("config)", "to_dict")):
            assert mine[key] == value, key
        else:
            assert mine[key].get("_attn_implementation_internal") == value.get(
                "_attn_implementation_internal"
            )


@pytest.mark.parametrize("case", CASES)
def test_release_gives_the_trained_model_back(case, tiny_llama, small_tokenizer, tmp_path):
    model = model_for(case, tiny_llama)
    before, start = snapshot(model), copy.deepcopy(model)
    own = type(model).forward
    trainer = make(model, small_tokenizer, tmp_path, max_steps=3, **CASES[case])
    trainer.train()
    assert trainer.release_model() is model
    assert trainer.release_model() is model
    as_before(model, before)
    assert model.forward.__func__ is own
    trained = copy.deepcopy(start)  # a model that no trainer has touched, with the trained weights
    trained.load_state_dict(model.state_dict())
    model.eval()
    trained.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(logits, trained(input_ids=IDS).logits)
        assert not torch.equal(logits, start.eval()(input_ids=IDS).logits)
    # a backward of somebody else's steps nothing
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for call in (trainer.train, lambda: trainer.evaluate(pair_rows(4))):
        with pytest.raises(RuntimeError, match="has given the model back: make a new TRTrainer"):
            call()


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_that_is_dropped_gives_the_model_back(
    case, tiny_llama, small_tokenizer, tmp_path
):
    model = model_for(case, tiny_llama)
    before, config = snapshot(model), model.config._attn_implementation
    trainer = make(model, small_tokenizer, tmp_path, max_steps=2, **CASES[case])
    trainer.train()
    seen = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert seen() is None
    assert model.config._attn_implementation == config
    model.eval()
    if case == "offloaded, bf16":  # accelerate's autocast stays, as after any transformers trainer
        assert model(input_ids=IDS).logits.dtype == torch.float32
    else:
        vars(model).pop("_is_accelerate_prepared", None)
        as_before(model, before)


def test_neither_keeps_the_model_alive(tiny_llama, small_tokenizer, tmp_path):
    model = copy.deepcopy(tiny_llama)
    trainer = make(model, small_tokenizer, tmp_path, max_steps=1)
    trainer.train()
    seen = weakref.ref(model)
    del model, trainer
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("first", ["released", "dropped later", "kept", "released later"])
def test_a_second_trainer_on_the_model(first, tiny_llama, small_tokenizer, tmp_path):
    steps = {"max_steps": 3}
    alone = copy.deepcopy(tiny_llama)
    make(alone, small_tokenizer, tmp_path / "a", **steps).train()
    expected = history(make(copy.deepcopy(alone), small_tokenizer, tmp_path / "b", **steps))
    one = make(tiny_llama, small_tokenizer, tmp_path / "c", **steps)
    one.train()
    if first == "released":
        one.release_model()
    two = make(tiny_llama, small_tokenizer, tmp_path / "d", **steps)
    if first == "dropped later":
        del one
        gc.collect()
    elif first == "released later":
        one.release_model()
    torch.testing.assert_close(history(two), expected, rtol=0, atol=0)
    two.release_model()
    assert ("forward" in vars(tiny_llama)) == (first == "kept")


def test_the_users_reference_is_given_back_too(tiny_llama, small_tokenizer, tmp_path):
    reference = copy.deepcopy(tiny_llama)
    before = snapshot(reference)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, ref_model=reference, max_steps=1)
    trainer.train()
    assert "forward" in vars(reference)
    trainer.release_model()
    vars(reference).pop("_is_accelerate_prepared", None)
    as_before(reference, before)
