"""Each kind of PEFT adapter in each place of the reference, against the mean of merged weights.

The table of `docs/peft.md` is that of `KINDS`: a test compares the two.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import make_tiny_llama
from tests.diagonal import diagonal
from tests.reference.test_adapter import batch_of, shake
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import TRConfig, TRTrainer, TrustRegion
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.reference import choose_reference
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.resident import ResidentReference
from tralign_fast.reference.snapshot import SnapshotReference

peft = pytest.importorskip("peft")
TASK: Any = {"task_type": "CAUSAL_LM"}
LINEAR: Any = {"target_modules": ["q_proj", "down_proj"], **TASK}
SQUARE: Any = {"target_modules": ["q_proj", "o_proj"], **TASK}
LORA: Any = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, **LINEAR}
EXPERTS: Any = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

# name -> (config, the places that make a soft update of it exactly)
TENSORS = ("adapter", "offloaded", "resident")
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "LoRA": (peft.LoraConfig(**LORA), ("adapter",)),
    "rsLoRA, rank and alpha patterns": (
        peft.LoraConfig(
            use_rslora=True, rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 1}, **LORA
        ),
        ("adapter",),
    ),
    "LoRA on experts (`target_parameters`)": (
        peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"], **EXPERTS}),
        ("adapter",),
    ),
    "LoRA on embeddings": (
        peft.LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
        ("adapter",),
    ),
    "`modules_to_save`": (
        peft.LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **LORA),
        ("adapter",),
    ),
    "`trainable_token_indices`": (
        peft.LoraConfig(trainable_token_indices=[5, 8, 14], **LORA),
        ("adapter",),
    ),
    "DoRA": (peft.LoraConfig(use_dora=True, **LORA), ("adapter",)),
    "TrainableTokens": (
        peft.TrainableTokensConfig(token_indices=[5, 8, 14], **TASK),
        ("offloaded", "resident"),
    ),
    "IA3": (
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
        ),
        TENSORS,
    ),
    "LN tuning": (peft.LNTuningConfig(target_modules=["norm"], **TASK), TENSORS),
    "FourierFT": (peft.FourierFTConfig(n_frequency=20, **LINEAR), TENSORS),
    "C3A": (peft.C3AConfig(block_size=8, **LINEAR), TENSORS),
    "SHiRA": (peft.ShiraConfig(r=2, **LINEAR), TENSORS),
    "VeRA": (peft.VeraConfig(r=4, **SQUARE), ()),
    "AdaLoRA": (peft.AdaLoraConfig(total_step=100, **LINEAR), ()),
    "LoHa": (peft.LoHaConfig(r=2, **LINEAR), ()),
    "LoKr": (peft.LoKrConfig(r=2, **LINEAR), ()),
    "OFT": (peft.OFTConfig(oft_block_size=4, **LINEAR), ()),
    "BOFT": (peft.BOFTConfig(boft_block_size=4, **LINEAR), ()),
    "HRA": (peft.HRAConfig(r=2, **LINEAR), ()),
    "RandLoRA": (peft.RandLoraConfig(r=2, **SQUARE), ()),
    "VB-LoRA": (peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, **LINEAR), ()),
}
if hasattr(peft, "WaveFTConfig"):
    KINDS["WaveFT"] = (peft.WaveFTConfig(n_frequency=20, **LINEAR), TENSORS)
if hasattr(peft, "MissConfig"):
    KINDS["MiSS"] = (peft.MissConfig(r=2, **LINEAR), ())
PLACES = {"adapter": AdapterReference, "offloaded": OffloadedReference}
SIZES = {
    "IA3": 2.0,
    "FourierFT": 0.2,
    "C3A": 5.0,
    "BOFT": 1.0,
    "HRA": 0.5,
    "AdaLoRA": 2.0,
}  # of a step


def moe(kind=Qwen3MoeForCausalLM):
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind is GptOssForCausalLM:  # keeps its experts as (E, in, out)
        return kind(GptOssConfig(num_local_experts=4, **size)).float()
    return kind(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, **size))


def model_of(kind, tokenizer, *, tied=False):
    if "experts" in kind:
        return moe()
    return make_tiny_llama(tokenizer, tie_word_embeddings=tied)


def adapted(model, config, kind="") -> Any:
    """A policy whose adapter has left its start."""
    torch.manual_seed(1)
    policy = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    shake(policy, 99, 2 * SIZES.get(kind, 0.05))
    return policy


def whole(policy, *, untied=False) -> Any:
    """The full model that a policy is, merged by PEFT."""
    model = copy.deepcopy(policy).eval().requires_grad_(False)
    base = model.get_base_model()
    if untied and base.config.tie_word_embeddings:  # an adapter on one of the two
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone(), False)
    return model.merge_and_unload()


class Truth:
    """The mean of merged weights, by hand."""

    def __init__(self, policy, alpha, *, untied=False, start=None):
        self.policy, self.alpha, self.untied = policy, alpha, untied
        self.model = whole(policy, untied=untied) if start is None else start
        prepare_model(self.model)

    @torch.no_grad()
    def logps(self, batch):
        return sequence_logps(self.model, batch)

    @torch.no_grad()
    def sync(self):
        theta = dict(whole(self.policy, untied=self.untied).named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.lerp_(theta[name], self.alpha)


def reference_of(place, policy, alpha) -> Any:
    schedule = TrustRegion(alpha, 2)
    if place == "resident":
        start = copy.deepcopy(policy)
        prepare_model(start)
        return ResidentReference(policy, schedule, start)
    return PLACES[place](policy, schedule)


def follows(reference, truth, policy, kind="", steps=6, layout="shared"):
    seen, batch = [], batch_of(layout)
    for step in range(steps):
        seen.append(truth.logps(batch))
        torch.testing.assert_close(reference.logps(batch), seen[-1], rtol=1e-5, atol=2e-5)
        shake(policy, step, SIZES.get(kind, 0.05))
        truth.sync()
        reference.sync()
    return max(float((a - seen[0]).abs().max()) for a in seen)


@pytest.mark.parametrize(
    ("kind", "alpha"), [*((kind, 1.0) for kind in KINDS), *diagonal(2, KINDS, [0.6, 0.1])]
)
def test_each_place_is_exact_or_refuses(kind, alpha, small_tokenizer):
    config, exact = KINDS[kind]
    policy = adapted(model_of(kind, small_tokenizer), config, kind)
    prepare_model(policy)
    factors = "B·A" if "adapter" in exact else None
    for place in ("adapter", "offloaded", "resident"):
        mine = copy.deepcopy(policy)
        if place in exact or (alpha == 1.0 and place != "adapter"):
            assert follows(reference_of(place, mine, alpha), Truth(mine, alpha), mine, kind) > 0.005
            continue
        why = "needs a policy with" if kind == "TrainableTokens" else r"whose weight is not W \+ s"
        if place != "adapter":
            assert factors or not exact
            why = 'would mix the factors of .*; use reference="adapter"'
        with pytest.raises(ValueError, match=why) as error:
            reference_of(place, mine, alpha)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_updates_without_weights_of_ones_own(kind, small_tokenizer):
    policy = adapted(model_of(kind, small_tokenizer), KINDS[kind][0], kind)
    prepare_model(policy)
    reference, truth = SnapshotReference(policy, TrustRegion(1.0, 2)), Truth(policy, 1.0)
    for step in range(2):
        expected = truth.logps(batch_of())
        reference.score_window([[batch_of()]], None)
        shake(policy, step, SIZES.get(kind, 0.05))
        torch.testing.assert_close(reference.logps(batch_of()), expected, rtol=1e-5, atol=2e-5)
        truth.sync()
        reference.sync()


@pytest.mark.parametrize(
    ("kind", "alpha"),
    diagonal(
        2,
        ["LoRA on embeddings", "`modules_to_save`", "`trainable_token_indices`", "TrainableTokens"],
        [1.0, 0.6],
    ),
)
def test_a_tied_head(kind, alpha, small_tokenizer):
    config, exact = KINDS[kind]
    untied = kind == "LoRA on embeddings"  # PEFT adapts what is looked up, not the head
    for place in exact:
        policy = adapted(model_of(kind, small_tokenizer, tied=True), config)
        prepare_model(policy)
        truth = Truth(policy, alpha, untied=untied)
        assert follows(reference_of(place, policy, alpha), truth, policy) > 0.01


def test_the_gradient_of_a_tied_heads_tokens(small_tokenizer):
    config = KINDS["`trainable_token_indices`"][0]
    policy = adapted(model_of("", small_tokenizer, tied=True), config)
    batch = batch_of("padded")
    logits = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    own = logits.flatten(0, 1)[batch.score_index].log_softmax(-1).gather(1, batch.targets[:, None])
    weights = torch.linspace(-1, 1, 4)
    trained = [p for p in policy.parameters() if p.requires_grad]
    expected = torch.autograd.grad((batch.sum_per_sequence(own[:, 0]) * weights).sum(), trained)
    prepare_model(policy)
    found = torch.autograd.grad((sequence_logps(policy, batch) * weights).sum(), trained)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with policy.disable_adapter(), torch.no_grad():
        base = sequence_logps(policy, batch)
    plain = model_of("", small_tokenizer, tied=True).eval()
    prepare_model(plain)
    torch.testing.assert_close(base, sequence_logps(plain, batch).detach(), rtol=1e-5, atol=1e-5)


# --- LoRA's own variants --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "alpha"),
    diagonal(2, [Qwen3MoeForCausalLM, GptOssForCausalLM], [1.0, 0.6, 0.05]),
)
def test_experts_and_a_router(architecture, alpha, tmp_path):
    router = "mlp.gate.weight" if architecture is Qwen3MoeForCausalLM else "mlp.router.weight"
    parameters = [*EXPERTS["target_parameters"], router]
    config = peft.LoraConfig(**{**LORA, "target_modules": [], "target_parameters": parameters})
    policy = adapted(moe(architecture), config)
    layout = "shared" if prepare_model(policy).packs else "padded"  # GPT-OSS has sinks
    reference = reference_of("adapter", policy, alpha)
    assert follows(reference, Truth(policy, alpha), policy, steps=9, layout=layout) > 0.01
    reference.save(tmp_path)
    again = reference_of("adapter", policy, alpha)
    again.load(tmp_path)
    batch = batch_of(layout)
    assert torch.equal(again.logps(batch), reference.logps(batch))
    own = [m for m in policy.modules() if "get_delta_weight" in m.__dict__]
    assert not own  # what was replaced is back


def test_dora_is_saved_and_stays_out_of_the_way(small_tokenizer, tmp_path):
    policy = adapted(model_of("", small_tokenizer), KINDS["DoRA"][0])
    prepare_model(policy)
    reference = reference_of("adapter", policy, 0.6)
    before = sequence_logps(policy, batch_of()).detach()
    torch.testing.assert_close(reference.logps(batch_of()), before, rtol=1e-6, atol=1e-6)
    assert torch.equal(sequence_logps(policy, batch_of()).detach(), before)
    for step in range(3):
        shake(policy, step)
        reference.sync()
    reference.save(tmp_path)
    again = reference_of("adapter", policy, 0.6)
    again.load(tmp_path)
    assert torch.equal(again.logps(batch_of()), reference.logps(batch_of()))
    shake(policy, 9)
    again.sync()
    reference.sync()
    assert torch.equal(again.logps(batch_of()), reference.logps(batch_of()))


def test_dora_that_cannot_be_held(small_tokenizer):
    model = model_of("", small_tokenizer)
    policy = adapted(model, KINDS["DoRA"][0])
    policy.add_adapter("second", peft.LoraConfig(**LORA))
    policy.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"DoRA over another active adapter.*; activate one"):
        reference_of("adapter", policy, 0.6)
    policy = adapted(model, KINDS["DoRA"][0])
    policy.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="a weight that is trained itself; freeze the base layer"):
        reference_of("adapter", policy, 0.6)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.1])
def test_alora_adapts_what_follows_its_invocation(alpha, small_tokenizer):
    """By hand: separate sequences, whose tokens see the mean delta from the invocation on."""
    if "alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("a PEFT without aLoRA")
    config = peft.LoraConfig(**{**LORA, "alora_invocation_tokens": [6, 7]})
    policy = adapted(model_of("", small_tokenizer), config)
    prepare_model(policy)
    reference = reference_of("adapter", policy, alpha)
    layers = [layer for _, _, layer in trained_adapters(policy)]
    product = [_product(layer) for layer in layers]
    batch, start, moved = batch_of("padded"), None, 0.0
    for step in range(5):
        held = [_install(layer, mean) for layer, mean in zip(layers, product, strict=True)]
        with torch.no_grad():
            expected = sequence_logps(policy, batch)
        for layer, factors in zip(layers, held, strict=True):
            _restore(layer, factors)
        start = expected if start is None else start
        moved = max(moved, float((expected - start).abs().max()))
        torch.testing.assert_close(reference.logps(batch), expected, rtol=1e-5, atol=2e-5)
        shake(policy, step)
        product = [
            mean.lerp(_product(layer), alpha) for layer, mean in zip(layers, product, strict=True)
        ]
        reference.sync()
    assert moved > 0.01
    # the second pair has no invocation: it is the base model's
    plain = model_of("", small_tokenizer).eval()
    prepare_model(plain)
    base = sequence_logps(plain, batch).detach()
    torch.testing.assert_close(expected[[1, 3]], base[[1, 3]], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(expected[[0, 2]], base[[0, 2]], rtol=1e-4)


def _product(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (b @ a).detach()


def _install(layer, product):
    """Gives a layer the factors `I·product`, and returns its own."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    held = down.data, up.data
    down.data, up.data = product.clone(), torch.eye(len(product))
    return held


def _restore(layer, held):
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = held


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DoRA", "`trainable_token_indices`", "IA3", "C3A", "AdaLoRA"])
def test_a_run_has_the_losses_of_merged_weights(kind, small_tokenizer, tmp_path):
    """The layers of the last two add to their base's output in place."""
    config, exact = KINDS[kind]
    model = model_of(kind, small_tokenizer, tied=True)
    policy = adapted(model, config, kind)
    alpha = 0.5 if exact else 1.0
    extra: dict[str, Any] = {
        "max_steps": 5, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha,
        "learning_rate": 3e-2 if exact else 0.3, "reference": "auto",
    }  # fmt: skip
    trainer = make(policy, small_tokenizer, tmp_path / "a", **extra)
    assert trainer.reference.name == ("adapter" if exact else "snapshot")
    losses = history(trainer)
    extra |= {"reference": "resident", "ref_model_mixup_alpha": 1.0}
    plain = make(policy, small_tokenizer, tmp_path / "b", **extra)
    truth = Truth(plain.model, alpha)
    plain.reference.logps, plain.reference.sync = truth.logps, truth.sync
    assert losses == pytest.approx(history(plain), rel=2e-5)
    assert len({round(loss, 6) for loss in losses}) >= 3  # right after a hard update it is log 2


# --- a reference that is a model of its own -------------------------------------------------------

FOLLOWED = {
    "LoRA": {},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 8]},
    "experts": EXPERTS,
}


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_model_of_its_own_follows_the_merged_policy(kind, alpha, small_tokenizer):
    model = model_of(kind, small_tokenizer, tied=kind == "tokens")
    policy = adapted(model, peft.LoraConfig(**{**LORA, **FOLLOWED[kind]}))
    prepare_model(policy)
    start = copy.deepcopy(model).eval()
    with torch.no_grad():  # another model, as one from an SFT run is
        for parameter in start.parameters():
            parameter.mul_(1.05)
    truth = Truth(policy, alpha, start=copy.deepcopy(start))
    prepare_model(start)
    reference = ResidentReference(policy, TrustRegion(alpha, 2), start)
    assert follows(reference, truth, policy) > 0.05


def test_a_run_with_a_model_of_its_own(small_tokenizer, tmp_path):
    model = model_of("", small_tokenizer)
    start = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1.02)
    runs = []
    for by_hand in (False, True):
        config = TRConfig(**options(
            tmp_path / str(by_hand), max_steps=5, ref_model_mixup_alpha=0.6,
            ref_model_sync_steps=2, learning_rate=1e-2,
        ))  # fmt: skip
        trainer = TRTrainer(
            adapted(model, KINDS["LoRA"][0]), copy.deepcopy(start), config,
            train_dataset=pair_rows(), processing_class=small_tokenizer,
        )  # fmt: skip
        assert isinstance(trainer.reference, ResidentReference)
        if by_hand:
            truth = Truth(trainer.model, 0.6, start=copy.deepcopy(start).eval())
            trainer.reference.logps, trainer.reference.sync = truth.logps, truth.sync
        runs.append(history(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert len(set(runs[0])) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "ref_model cannot follow the policy: .*Dora.*leave ref_model out"),
        (
            {"lora_bias": True, "target_modules": ["q_proj"]},
            r"trains .*lora_B.*leave ref_model out",
        ),
    ],
)
def test_what_a_model_of_its_own_cannot_follow(options, message, small_tokenizer):
    model = make_tiny_llama(small_tokenizer, attention_bias=True)
    policy = adapted(model, peft.LoraConfig(**{**LORA, **options}))
    with pytest.raises(ValueError, match=message):
        ResidentReference(policy, TrustRegion(0.6, 2), copy.deepcopy(model))
    ResidentReference(
        policy, TrustRegion(0.0, 2), copy.deepcopy(model)
    )  # frozen: nothing to follow
    both = adapted(model, KINDS["LoRA"][0])
    with pytest.raises(ValueError, match=r"mix the factors of .* or a ref_model without an"):
        ResidentReference(both, TrustRegion(0.6, 2), copy.deepcopy(both))


# --- the table ------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    table = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in rows}
    for kind, (_, exact) in KINDS.items():
        frozen, hard, soft = table[kind][:3]
        assert (frozen, hard) == ("any", "any but adapter" if "adapter" not in exact else "any")
        assert soft == (", ".join(exact) or "refused"), kind


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_a_place_that_is_exact(kind, small_tokenizer):
    config, exact = KINDS[kind]
    policy = adapted(model_of(kind, small_tokenizer), config)
    lora = next(trained_adapters(policy), None) is not None
    for every in (1, 4):
        place, _ = choose_reference("auto", TrustRegion(0.6, every), own_start=False, lora=lora)
        assert place in exact or (not exact and place == "adapter")  # which says what works
