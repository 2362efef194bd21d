"""A second model beside the policy: what it may share with it, and which weights follow."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from tests.training.test_trl_parity import options, pair_rows
from tralign_fast import TRConfig, TRTrainer

peft = pytest.importorskip("peft")

EVERY, STEPS = 2, 4


class MixedByHand(TrainerCallback):
    """`π_ref ← α·π_θ + (1-α)·π_ref` of every weight, in fp64; freezes or unfreezes a layer."""

    def __init__(self, policy, ref, alpha, frozen_after=0, thawed_after=0):
        self.policy, self.alpha = policy, alpha
        self.ref = {n: p.detach().double().clone() for n, p in ref.named_parameters()}
        self.changes = {frozen_after: False, thawed_after: True}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            for name, own in self.policy.named_parameters():
                self.ref[name].lerp_(own.detach().double(), self.alpha)
        if state.global_step in self.changes:
            freeze(self.policy, self.changes[state.global_step])

    def difference(self, model):
        return max(float((p - self.ref[n]).abs().max()) for n, p in model.named_parameters())


def freeze(model, requires_grad=False):
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(requires_grad)


def other(model):
    torch.manual_seed(1)
    ref = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return ref


def make(policy, tokenizer, folder, ref_model=None, **extra):
    args = TRConfig(**options(folder, **extra))
    return TRTrainer(policy, ref_model, args, train_dataset=pair_rows(), processing_class=tokenizer)


def run(policy, ref, place, alpha, tokenizer, folder, callback=None, **extra):
    trainer = make(
        policy, tokenizer, folder, ref_model=ref, reference=place, ref_model_mixup_alpha=alpha,
        ref_model_sync_steps=EVERY, max_steps=STEPS, learning_rate=5e-3, **extra,
    )  # fmt: skip
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("place", "alpha"), [("resident", 1.0), ("offloaded", 0.5)])
def test_frozen_weights_of_another_model_follow(
    place, alpha, tiny_llama, small_tokenizer, tmp_path
):
    policy = copy.deepcopy(tiny_llama)
    ref = other(policy)
    freeze(policy)
    by_hand = MixedByHand(policy, ref, alpha)
    trainer = run(policy, ref, place, alpha, small_tokenizer, tmp_path, by_hand)
    assert by_hand.difference(trainer.ref_model) < 1e-6


@pytest.mark.parametrize("place", ["resident", "offloaded"])
def test_weights_that_are_frozen_in_mid_run_follow(place, tiny_llama, small_tokenizer, tmp_path):
    policy = copy.deepcopy(tiny_llama)
    by_hand = MixedByHand(policy, policy, 0.5, frozen_after=2)
    trainer = run(policy, None, place, 0.5, small_tokenizer, tmp_path, by_hand)
    assert by_hand.difference(trainer.ref_model) < 1e-6


def test_weights_that_are_unfrozen_in_mid_run(tiny_llama, small_tokenizer, tmp_path):
    def begun():
        policy = copy.deepcopy(tiny_llama)
        freeze(policy)
        return policy, MixedByHand(policy, policy, 0.5, thawed_after=2)

    policy, by_hand = begun()
    trainer = run(policy, None, "resident", 0.5, small_tokenizer, tmp_path / "resident", by_hand)
    assert by_hand.difference(trainer.ref_model) < 1e-6
    policy, by_hand = begun()
    with pytest.raises(ValueError, match=r"trains model\.layers\.0\..*was frozen when the run beg"):
        run(policy, None, "offloaded", 0.5, small_tokenizer, tmp_path / "offloaded", by_hand)


def test_a_model_that_shares_a_trained_weight_is_refused(tiny_llama, small_tokenizer, tmp_path):
    base = copy.deepcopy(tiny_llama)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(base, lora)  # puts its layers into the base
    same_memory = type(tiny_llama)(tiny_llama.config)
    same_memory.load_state_dict(tiny_llama.state_dict(), assign=True)
    for model, ref in ((policy, base), (tiny_llama, same_memory)):
        with pytest.raises(ValueError, match="ref_model is the policy itself, or shares weights"):
            make(model, small_tokenizer, tmp_path, ref_model=ref)
    frozen = copy.deepcopy(tiny_llama)
    frozen.model.embed_tokens.requires_grad_(False)
    apart = copy.deepcopy(frozen)
    apart.model.embed_tokens.weight = frozen.model.embed_tokens.weight
    make(frozen, small_tokenizer, tmp_path, ref_model=apart)


@pytest.mark.parametrize("place", ["resident", "offloaded"])
def test_another_vocabulary(place, tiny_llama, small_tokenizer, tmp_path):
    ref = copy.deepcopy(tiny_llama)
    ref.resize_token_embeddings(384)
    moves = {"ref_model": ref, "reference": place, "ref_model_sync_steps": 2}
    with pytest.raises(ValueError, match=r"embed_tokens.* is \(384, 32\) in ref_model and \(320, "):
        make(tiny_llama, small_tokenizer, tmp_path, **moves)


def test_a_frozen_reference_may_have_more_tokens_and_no_fewer(
    tiny_llama, small_tokenizer, tmp_path
):
    frozen = {"reference": "resident", "sync_ref_model": False, "max_steps": 1}
    ref = copy.deepcopy(tiny_llama)
    ref.resize_token_embeddings(384)
    make(tiny_llama, small_tokenizer, tmp_path, ref_model=ref, **frozen).train()
    ref = copy.deepcopy(tiny_llama)
    ref.resize_token_embeddings(64)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, ref_model=ref, **frozen)
    with pytest.raises(ValueError, match=r"row \d+: token id \d+ is outside the model's vocab"):
        trainer.train()


def test_a_merged_adapter_is_refused(tiny_llama, small_tokenizer, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(copy.deepcopy(tiny_llama), lora)
    policy.merge_adapter()
    with pytest.raises(
        ValueError, match=r"the adapter of .*q_proj is merged into its base, and no"
    ):
        make(policy, small_tokenizer, tmp_path)
    policy.unmerge_adapter()
    make(policy, small_tokenizer, tmp_path, max_steps=1).train()
