"""A whole reference that follows a LoRA policy: as merging with PEFT and mixing the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from tests.integrations.conftest import logs, same_logs
from tests.integrations.test_trl import _MixMerged, lora
from tralign_fast import ema_update_
from tralign_fast.integrations.callback import TrustRegionCallback
from tralign_fast.ops import ema
from tralign_fast.reference import merged

peft = pytest.importorskip("peft")


def adapted(model, *, config=None, dtype=torch.float32, **extra) -> Any:
    """A LoRA policy on a copy of the model, its factors far from B = 0."""
    config = config or lora(**extra)
    policy = peft.get_peft_model(
        copy.deepcopy(model).to(dtype), config, autocast_adapter_dtype=False
    )
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * 0.05)
    return policy


def follow(ref, policy, alpha, rounding="nearest"):
    names = list(ref.named_parameters())
    generator = torch.Generator().manual_seed(0)
    merged.follow_merged_(names, policy, alpha, rounding=rounding, generator=generator)


def expected_of(ref, policy, alpha):
    """fp32: the reference, mixed with the policy merged by PEFT."""
    theirs = copy.deepcopy(policy).float().merge_and_unload()
    ours = copy.deepcopy(ref).float()
    ema_update_([*ours.parameters()], [*theirs.parameters()], alpha)
    return dict(ours.named_parameters())


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "norm saved": {"modules_to_save": ["norm"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "a whole block saved": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "biases": {"bias": "all"},
    "a rank of its own": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_merging_with_peft_and_mixing(case, dtype, alpha, tiny_llama):
    from peft import LoraConfig

    base = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    policy = adapted(tiny_llama, config=LoraConfig(**{**base, **CASES[case]}), dtype=dtype)
    ref = copy.deepcopy(tiny_llama).to(dtype)
    with torch.no_grad():  # another start: frozen weights are followed as well
        for p in ref.parameters():
            p.mul_(1.1)
    before = {name: p.detach().clone() for name, p in ref.named_parameters()}
    expected = expected_of(ref, policy, alpha)
    follow(ref, policy, alpha)
    for name, p in ref.named_parameters():
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            p.float(), expected[name], rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not torch.equal(p, before[name]), name


def test_conv1d_weights_several_adapters_and_a_merged_one():
    from peft import LoraConfig

    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    gpt2 = GPT2LMHeadModel(GPT2Config(**size))
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    policy = adapted(gpt2, config=config)
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B.second" in name:
                p.normal_(std=0.1)
    policy.base_model.set_adapter(["default", "second"])
    for merge in (False, True):
        if merge:
            policy.merge_adapter(["second"])
        ref = copy.deepcopy(gpt2)
        plain = copy.deepcopy(policy)
        if merge:
            plain.unmerge_adapter()
        expected = copy.deepcopy(ref)
        both = plain.merge_and_unload(adapter_names=["default", "second"])
        ema_update_([*expected.parameters()], [*both.parameters()], 0.6)
        follow(ref, policy, 0.6)
        for p, q in zip(ref.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Elements of the largest floating tensor that an operator made anew."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.made = max(self.made, out.numel())
        return out


def test_the_product_is_never_in_memory(tiny_llama, monkeypatch):
    monkeypatch.setattr(ema, "_CHUNK", 128)
    policy, ref = adapted(tiny_llama), copy.deepcopy(tiny_llama)
    smallest = min(
        m.base_layer.weight.numel() for m in policy.modules() if hasattr(m, "base_layer")
    )
    with _Largest() as largest:
        follow(ref, policy, 0.6)
    assert 0 < largest.made <= 2 * 128 < smallest  # two buffers of a chunk are one tensor


def test_stochastic_rounding_moves_a_bf16_reference_as_far(tiny_llama):
    policy = adapted(tiny_llama, dtype=torch.bfloat16, target_modules=["q_proj"])
    share = {}
    for rounding in ("nearest", "stochastic"):
        ref = copy.deepcopy(tiny_llama).to(torch.bfloat16)
        goal = expected_of(ref, policy, 1.0)["model.layers.0.self_attn.q_proj.weight"]
        weight = ref.model.layers[0].self_attn.q_proj.weight
        start = weight.detach().float().clone()
        names = [(n, p) for n, p in ref.named_parameters() if "q_proj" in n]
        for step in range(100):
            generator = torch.Generator().manual_seed(step)
            options = {"rounding": rounding, "generator": generator}
            merged.follow_merged_(names, policy, 5e-4, **options)
        way = goal - start
        share[rounding] = float(((weight.float() - start) * way).sum() / way.square().sum())
    full = 1 - 0.9995**100
    assert share["stochastic"] == pytest.approx(full, rel=0.15)
    assert share["nearest"] < full / 2


@pytest.mark.parametrize("how", ["trainer", "ref_model"])
@pytest.mark.parametrize(("alpha", "config"), [(0.6, {}), (1.0, {"modules_to_save": ["norm"]})])
def test_in_trls_trainer(how, alpha, config, build, tiny_llama):
    trainers = []
    for _ in range(2):
        torch.manual_seed(1)
        policy = peft.get_peft_model(copy.deepcopy(tiny_llama), lora(**config))
        trainers.append(build("dpo", model=policy, learning_rate=5e-2))
    theirs, ours = trainers
    theirs.add_callback(_MixMerged(theirs, alpha, 2))
    callback = TrustRegionCallback(alpha, 2, **{how: ours if how == "trainer" else ours.ref_model})
    ours.add_callback(callback)
    expected, losses = logs(theirs), logs(ours)
    for log in (*expected, *losses):
        del log[
            "rewards/accuracies"
        ]  # right after a hard update both rewards are 0 but for rounding
    same_logs(losses, expected, rel=2e-5)
    assert callback.syncs == 3
    pairs = zip(ours.ref_model.parameters(), theirs.ref_model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len({round(log["loss"], 4) for log in losses}) > 3


def quantised(policy):
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.ones(64, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"use_dora": True}, None, "q_proj is a .*Dora.*use plain LoRA, or leave ref_model out"),
        ({"target_modules": ["embed_tokens"]}, None, "LoRA on a layer that is not linear .Embed"),
        ({"lora_bias": True}, None, r"trains .*lora_B\.default\.bias, which is no weight of ref"),
        ({}, quantised, "of torch.uint8 in the policy: .* leave ref_model out"),
        (
            {}, lambda p: p.base_model.model.lm_head.to("meta"),
            "lm_head.weight is on meta, its reference on cpu: put both",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_one_line(options, change, message, tiny_llama):
    from peft import LoraConfig

    base = {"r": 2, "target_modules": ["q_proj"]}
    policy = adapted(tiny_llama, config=LoraConfig(**{**base, **options}))
    if change is not None:
        change(policy)
    with pytest.raises(ValueError, match=message) as error:
        follow(copy.deepcopy(tiny_llama), policy, 0.6)
    assert "\n" not in str(error.value)


def test_a_tied_head_with_an_adapter_is_refused(small_tokenizer):
    from peft import LoraConfig

    from tests.conftest import make_tiny_llama

    tied = make_tiny_llama(small_tokenizer, tie_word_embeddings=True)
    policy = adapted(tied, config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"trains .*lm_head.*tied ones are not"):
        follow(tied, policy, 0.6)


def test_two_adapters_are_not_mixed_factor_by_factor(tiny_llama):
    policy = adapted(tiny_llama)
    with pytest.raises(ValueError, match="would mix the factors of two adapters"):
        TrustRegionCallback(0.6, 1, ref_model=copy.deepcopy(policy))._reference.check(policy)
    TrustRegionCallback(1.0, 1, ref_model=copy.deepcopy(policy))._reference.check(policy)
