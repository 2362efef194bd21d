"""What callback and fast head refuse of TRL's trainers, each in one line."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

from tests.integrations.test_trl import lora
from tralign_fast.integrations.trl import TrustRegionCallback, use_fast_logprobs


def head(build, change):
    trainer = build("dpo")
    change(trainer.model)
    use_fast_logprobs(trainer)


def no_reference(build):
    trainer = build("dpo")
    trainer.ref_model = None
    TrustRegionCallback(trainer=trainer)


def precomputed(build):
    TrustRegionCallback(trainer=build("dpo", precompute_ref_log_probs=True))


def two(build):
    trainer = build("dpo")
    trainer.add_callback(TrustRegionCallback(trainer=trainer))
    TrustRegionCallback(trainer=trainer)


def two_added_late(build):
    trainer = build("dpo")
    for callback in [TrustRegionCallback(trainer=trainer) for _ in range(2)]:
        trainer.add_callback(callback)
    trainer.train()


def two_by_their_model(build):
    trainer = build("dpo")
    for _ in range(2):
        trainer.add_callback(TrustRegionCallback(ref_model=trainer.ref_model))
    trainer.train()


def with_trls(build):
    TrustRegionCallback(trainer=build("dpo", sync_ref_model=True))


def with_trls_by_its_model(build):
    trainer = build("dpo", sync_ref_model=True)
    trainer.add_callback(TrustRegionCallback(ref_model=trainer.ref_model))
    trainer.train()


def the_policy_itself(build):
    trainer = build("dpo")
    trainer.add_callback(TrustRegionCallback(ref_model=trainer.model))
    trainer.train()


def the_policy_itself_in_the_trainer(build):
    trainer = build("dpo")
    trainer.ref_model = trainer.model
    TrustRegionCallback(trainer=trainer)


def the_base_of_the_policy(build):
    trainer = build("dpo", peft_config=lora())
    trainer.add_callback(TrustRegionCallback(ref_model=trainer.model.get_base_model()))
    trainer.train()


def mixed_devices(build):
    trainer = build("dpo")
    trainer.model.lm_head.to("meta")
    TrustRegionCallback(trainer=trainer)


def reference_on_meta(build):
    trainer = build("dpo")
    trainer.ref_model.to("meta")
    TrustRegionCallback(trainer=trainer)


def other_architecture(build):
    trainer = build("dpo")
    trainer.ref_model.model.layers = trainer.ref_model.model.layers[:1]
    TrustRegionCallback(trainer=trainer)


def quantised(model):
    model.lm_head.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.int8), requires_grad=False)


def factors_on_the_head(build):
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    model = build("dpo").model  # TRL's trainers refuse such a model
    add_fused_lm_head(model)
    use_fast_logprobs(get_peft_model(model, lora(target_modules=["q_proj", "lm_head"])))


def quantised_copy(build):
    trainer = build("dpo", peft_config=lora(modules_to_save=["lm_head"]))
    copy_ = trainer.model.get_base_model().lm_head.modules_to_save["default"]
    copy_.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.int8), requires_grad=False)
    use_fast_logprobs(trainer)


def with_ligers_head(build):
    trainer = build("dpo")
    trainer.args.use_liger_kernel = (
        True  # TRL itself switches Liger's head off, unless told so late
    )
    use_fast_logprobs(trainer)


def other_forward(model):
    model.forward = MethodType(type(model).forward, model)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (no_reference, "DPOTrainer has no reference model to move: give the trainer a ref_model"),
        (precomputed, "precompute_ref_log_probs=True scores a reference that never moves"),
        (lambda build: TrustRegionCallback(trainer=build("grpo", beta=0.0)), "beta=0 uses no ref"),
        (two, "moves this trainer's reference already: keep one"),
        (two_added_late, "moves this trainer's reference already: keep one"),
        (two_by_their_model, "another TrustRegionCallback moves this reference already: keep one"),
        (with_trls, "SyncRefModelCallback moves .*: set sync_ref_model=False"),
        (with_trls_by_its_model, "moves a reference itself: set sync_ref_model=False"),
        (the_policy_itself, "ref_model is the policy itself, or shares weights with it"),
        (the_policy_itself_in_the_trainer, "ref_model is the policy itself, or shares weights"),
        (the_base_of_the_policy, "ref_model is the policy itself, or shares weights with it"),
        (lambda build: TrustRegionCallback(), "pass trainer= .* or ref_model="),
        (lambda build: TrustRegionCallback(2.0, trainer=build("dpo")), r"alpha must lie in \[0"),
        (mixed_devices, "is on meta, its reference on cpu: put both models on one device"),
        (reference_on_meta, "is on meta: load the model first"),
        (other_architecture, "different models .only the policy has model.layers.1"),
        (
            lambda build: TrustRegionCallback(
                0.5,
                trainer=build(
                    "dpo", peft_config=lora(use_dora=True, target_modules=["embed_tokens"])
                ),
            ),
            r"alpha=0.5 mixes LoRA and its like only .*Dora.*TrustRegionCallback\(alpha=1\)",
        ),
        (lambda build: use_fast_logprobs("model"), "expected a TRL trainer or a model, got str"),
        (lambda build: head(build, other_forward), "LlamaForCausalLM has no fused LM head of TRL"),
        (lambda build: use_fast_logprobs(torch.nn.Linear(2, 2)), "Linear has no fused LM head"),
        (
            lambda build: head(build, lambda m: setattr(m, "lm_head", torch.nn.Embedding(3, 4))),
            "expected a linear output embedding .lm_head., got Embedding",
        ),
        (lambda build: head(build, lambda m: m.lm_head.to("meta")), "lm_head is on meta"),
        (lambda build: head(build, quantised), "lm_head is quantised .torch.int8."),
        (factors_on_the_head, r"lm_head has LoRA factors .*modules_to_save=\["),
        (quantised_copy, "lm_head is quantised .torch.int8."),
        (with_ligers_head, "use_liger_kernel=True would put Liger's head over this one"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(cause, message, build):
    with pytest.raises(ValueError, match=message) as caught:
        cause(build)
    assert "\n" not in str(caught.value)


def test_sharded_factors_of_an_adapter_are_refused(build):
    """The callback holds the factors it found; FSDP would put others in their place."""
    trainer = build("dpo", peft_config=lora())
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"factors are sharded under FSDP .*; train it with DDP"):
        TrustRegionCallback(trainer=trainer)
