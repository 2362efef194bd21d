"""The adapter reference against a resident one of merged full weights: the same losses."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.conftest import DEVICE, make_tiny_llama
from tests.diagonal import diagonal
from tests.reference.test_windows import STEPS, two_epochs
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import TRConfig, TRTrainer, TrustRegion
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model import fused_lora
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.ema import ema_update_
from tralign_fast.ops.lora import lora_linear
from tralign_fast.reference import places as reference_places
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.offloaded import OffloadedReference

peft = pytest.importorskip("peft")
LoraLayer = pytest.importorskip("peft.tuners.lora").LoraLayer
SCHEDULES = {
    "hard": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3},
    "soft": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1},
    "hybrid": {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 3},
}
ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
    {"prompt_ids": [13], "chosen_ids": [14, 15, 16], "rejected_ids": [17]},
]


def lora(model, *, trained=True, **options):
    """A LoRA policy; `trained`: its adapter is not that of a start (B = 0)."""
    torch.manual_seed(1)
    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", **options}
    return peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(init_lora_weights=not trained, **config)
    )


def merged(policy):
    """The full model that a LoRA policy is."""
    model = copy.deepcopy(policy).eval().requires_grad_(False)
    if isinstance(model, peft.PeftModel):
        return model.merge_and_unload()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


class MergedReference(ReferencePolicy):
    """A second full model that moves in weight space."""

    name = "merged"

    def __init__(self, policy, schedule):
        super().__init__(policy, schedule)
        self.model = merged(policy)

    @torch.no_grad()
    def logps(self, batch):
        return sequence_logps(self.model, batch)

    def sync(self):
        theta = dict(merged(self.policy).named_parameters())
        refs = dict(self.model.named_parameters())
        ema_update_(list(refs.values()), [theta[name] for name in refs], self.schedule.alpha)

    def save_weights(self, folder): ...

    def load_weights(self, folder): ...


@pytest.fixture
def with_merged(monkeypatch):
    everywhere = dict.fromkeys(reference_places.REFERENCES, f"{__name__}:MergedReference")

    def make_merged(*args, **extra):
        with monkeypatch.context() as patch:
            patch.setattr(reference_places, "REFERENCES", everywhere)
            return make(*args, **extra)

    return make_merged


def batch_of(layout="shared"):
    (batch,) = PreferenceCollator(paired=True, layout=layout)(ROWS).parts
    return batch


@torch.no_grad()
def shake(policy, seed, size=0.05):
    """A step of training, as far as a reference can tell."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=size)


# --- the same losses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "method", "accumulation"),
    [*diagonal(2, ("hard", "soft"), ("dpo", "ipo", "kto"), (1, 2)), ("hybrid", "kto", 2)],
)
def test_losses_equal_those_of_a_resident_reference_of_merged_weights(
    schedule, method, accumulation, tiny_llama, small_tokenizer, tmp_path, with_merged
):
    rows, extra = two_epochs(method, accumulation)
    extra |= {"reference": "adapter", **SCHEDULES[schedule]}
    policy = lora(tiny_llama, trained=method != "ipo")
    runs = []
    for name, build in (("merged", with_merged), ("adapter", make)):
        trainer = build(policy, small_tokenizer, tmp_path / name, method, rows, **extra)
        assert trainer.reference.name == name
        runs.append(history(trainer))
        assert trainer.state.epoch > 1
    assert len(runs[0]) == STEPS
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert len(set(runs[0])) > 4


def biased(model):
    """The model with biases in its attention, so that something can carry `bias` options."""
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    torch.manual_seed(0)
    return type(model)(config)


def two_adapters(model):
    policy = lora(model)
    policy.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    return policy


def switched(policy, part, trained):
    """Trains or freezes the parameters with `part` in their name."""
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.requires_grad_(trained)
    return policy


KINDS = {
    "rslora, patterns": lambda m: lora(
        m, use_rslora=True, rank_pattern={"q_proj": 5, "o_proj": 20}, alpha_pattern={"v_proj": 1}
    ),
    "biases": lambda m: lora(biased(m), bias="lora_only"),
    "lora_bias": lambda m: lora(biased(m), lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "head and embeddings": lambda m: lora(m, modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lambda m: lora(m, trainable_token_indices=[5, 8, 14]),
    "norms": lambda m: switched(lora(m), "layernorm", True),
    "two adapters": two_adapters,
    "on a frozen adapter": lambda m: switched(two_adapters(m), ".default.", False),
    "one factor": lambda m: switched(lora(m), "lora_A", False),
    "no PeftModel": lambda m: lora(m).get_base_model(),
}


@pytest.mark.parametrize(("kind", "alpha"), diagonal(2, KINDS, [0.6, 0.1]))
def test_kinds_of_adapters(kind, alpha, tiny_llama, tmp_path):
    policy = KINDS[kind](tiny_llama)
    prepare_model(policy)
    schedule = TrustRegion(alpha, 2)
    truth, reference = MergedReference(policy, schedule), AdapterReference(policy, schedule)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batch, seen = batch_of(), []
    for step in range(6):
        seen.append(truth.logps(batch))
        torch.testing.assert_close(reference.logps(batch), seen[-1], rtol=1e-5, atol=1e-5)
        shake(policy, step)
        assert not torch.allclose(sequence_logps(policy, batch), seen[-1], rtol=1e-3)
        truth.sync()
        reference.sync()
    assert not torch.allclose(seen[0], seen[-1], rtol=1e-3)
    reference.save(tmp_path)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(before[name])
    again = AdapterReference(policy, schedule)
    again.load(tmp_path)
    assert torch.equal(again.logps(batch), reference.logps(batch))
    shake(policy, 6)
    again.sync()
    reference.sync()
    assert torch.equal(again.logps(batch), reference.logps(batch))


def test_hard_updates_copy_the_bits_of_the_factors(tiny_llama):
    for dtype, rank in ((torch.float32, 2), (torch.bfloat16, 2), (torch.float32, 40)):
        policy = lora(tiny_llama, r=rank).to(dtype).eval()
        prepare_model(policy)
        reference = AdapterReference(policy, TrustRegion(1.0, 2))
        shake(policy, 0)
        reference.sync()
        expected = sequence_logps(policy, batch_of())
        held = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        shake(policy, 1)
        assert torch.equal(reference.logps(batch_of()), expected)
        assert not torch.equal(sequence_logps(policy, batch_of()), expected)
        for name, delta in reference._deltas.items():
            layer, _, adapter = name.rpartition(".")
            for part, tensor in (
                ("lora_A", delta.state()["down"]),
                ("lora_B", delta.state()["up"]),
            ):
                assert torch.equal(tensor, held[f"{layer}.{part}.{adapter}.weight"])


@pytest.mark.parametrize("alpha", [0.6, 0.01], ids=["factors", "one matrix"])
def test_past_adapters_are_one_product_of_a_fused_layer(alpha, tiny_llama, monkeypatch):
    """The concatenated factors go into the layer's one node, in one piece."""
    seen = []

    def record(x, weight, bias, factors):
        seen.append(factors)
        return lora_linear(x, weight, bias, factors)

    policy = lora(tiny_llama, target_modules=["q_proj", "down_proj"]).eval()
    reference = AdapterReference(policy, TrustRegion(alpha, 2))
    for step in range(20 if alpha < 0.1 else 3):
        shake(policy, step)
        reference.sync()
    with prepare_model(policy, fused_lora=False):
        expected = reference.logps(batch_of())
        moved = sequence_logps(policy, batch_of()).detach()
    prepare_model(policy)
    monkeypatch.setattr(fused_lora, "lora_linear", record)
    found = reference.logps(batch_of())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(found, moved, rtol=1e-3)
    assert len(seen) == 2 * 2  # layers with an adapter, each once
    for factors in seen:
        if alpha < 0.1:
            assert factors.down is factors.coefficients is None
        else:
            assert factors.down.shape[0] == factors.up.shape[1] == 4 * 2  # three moves and a start
            assert factors.coefficients[::2].tolist() == pytest.approx(reference._weights)
    seen.clear()
    trained = sequence_logps(policy, batch_of())
    with torch.no_grad():
        assert torch.equal(sequence_logps(policy, batch_of()), trained)
    assert all(factors.coefficients is None for factors in seen)


def test_the_mean_of_factors_is_another_reference(tiny_llama, small_tokenizer, tmp_path):
    """Factor-wise EMA, which a plain EMA over a PEFT model's parameters is."""
    policy = lora(tiny_llama)
    prepare_model(policy)
    schedule = TrustRegion(0.5, 2)
    truth, reference = MergedReference(policy, schedule), AdapterReference(policy, schedule)
    start = truth.logps(batch_of())
    factorwise = copy.deepcopy(policy).eval()
    for step in range(4):
        shake(policy, step, 0.2)
        truth.sync()
        reference.sync()
        pairs = zip(factorwise.parameters(), policy.parameters(), strict=True)
        refs, thetas = zip(*[(r, t) for r, t in pairs if t.requires_grad], strict=True)
        ema_update_(list(refs), list(thetas), 0.5)
    expected = truth.logps(batch_of())
    torch.testing.assert_close(reference.logps(batch_of()), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        other = sequence_logps(factorwise, batch_of())
    moved = (expected - start).abs().max()
    assert (other - expected).abs().max() > 0.05 * moved
    for place in ("resident", "offloaded"):
        with pytest.raises(ValueError, match=rf'"?{place}.* would mix the factors of .*"adapter"'):
            make(policy, small_tokenizer, tmp_path, reference=place, ref_model_mixup_alpha=0.5)


# --- it stays out of the way ----------------------------------------------------------------------


def test_the_policy_is_left_as_it_was(tiny_llama, small_tokenizer, tmp_path):
    extra = {"reference": "adapter", "max_steps": 3, **SCHEDULES["hybrid"], "max_grad_norm": 0}
    policy = lora(tiny_llama, lora_dropout=0.3, modules_to_save=["embed_tokens"])
    trainer = make(policy, small_tokenizer, tmp_path, disable_dropout=False, **extra)
    model, reference = trainer.model, trainer.reference
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    trainer.train()
    shake(model, 0)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    batch = batch_of().to(DEVICE)
    first, second = reference.logps(batch), reference.logps(batch)
    assert torch.equal(first, second)  # no dropout in a reference
    with pytest.raises(RuntimeError, match="by the way"), reference.weights(), reference.weights():
        raise RuntimeError("by the way")
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {ids[name] for name, trained in flags.items() if trained}
    assert not any("forward" in m.__dict__ for n, m in model.named_modules() if "lora_" in n)

    trainer.save_model(str(tmp_path / "saved"))
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(written) == 2 * 14 + 1
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tmp_path / "saved"))
    prepare_model(fresh)
    model.eval()
    torch.testing.assert_close(
        sequence_logps(fresh.eval(), batch_of()), sequence_logps(model.cpu(), batch_of())
    )


def test_gradient_checkpointing_and_autocast(tiny_llama, small_tokenizer, tmp_path):
    extra = {"reference": "adapter", "max_steps": 4, **SCHEDULES["soft"]}
    policy = lora(tiny_llama)
    plain = history(make(policy, small_tokenizer, tmp_path / "a", **extra))
    for reentrant in (False, True):
        extra |= {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        again = history(make(policy, small_tokenizer, tmp_path / f"b{reentrant}", **extra))
        assert again == pytest.approx(plain, rel=1e-5)
    extra["bf16"] = True
    half = history(make(policy, small_tokenizer, tmp_path / "c", **extra))
    assert half == pytest.approx(plain, rel=0.02)
    assert half != plain


@pytest.mark.parametrize("kind", [AdapterReference, OffloadedReference])
def test_autocast_does_not_keep_the_weights_of_a_sweep(kind, tiny_llama):
    policy = lora(biased(tiny_llama), bias="lora_only").eval()
    prepare_model(policy)
    reference = kind(policy, TrustRegion(1.0, 2))
    shake(policy, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = sequence_logps(policy, batch_of())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        start = reference.logps(batch_of())
        assert torch.equal(sequence_logps(policy, batch_of()), expected)
        assert torch.equal(reference.logps(batch_of()), start)
    assert not torch.equal(start, expected)


def test_a_model_wrapped_for_several_processes(tiny_llama, tmp_path):
    import torch.distributed as dist

    policy = lora(tiny_llama)
    prepare_model(policy)
    reference = AdapterReference(policy, TrustRegion(0.6, 1))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
        for step in range(3):
            expected = reference.logps(batch_of())
            reference.wrapped = wrapped
            assert torch.equal(reference.logps(batch_of()), expected)
            reference.wrapped = None
            sequence_logps(wrapped, batch_of()).sum().backward()
            shake(policy, step)
            reference.sync()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_evaluation_inside_a_run(tiny_llama, small_tokenizer, tmp_path, with_merged):
    extra = {
        "reference": "adapter", "max_steps": 5, "eval_strategy": "steps", "eval_steps": 2,
        "held_out": pair_rows(6), "log_kl_initial": True, **SCHEDULES["hybrid"],
    }  # fmt: skip
    logs = []
    for name, build in (("merged", with_merged), ("adapter", make)):
        policy = lora(tiny_llama, modules_to_save=["lm_head"], trainable_token_indices=[5, 8])
        trainer = build(policy, small_tokenizer, tmp_path / name, **extra)
        before = trainer.evaluate()
        trainer.train()
        logs.append([before, *trainer.state.log_history, trainer.evaluate(pair_rows(3))])
    for theirs, mine in zip(*logs, strict=True):
        for key in theirs.keys() & {"eval_loss", "eval_rewards/margins", "eval_kl/initial"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


# --- checkpoints ----------------------------------------------------------------------------------


def test_resume(tiny_llama, small_tokenizer, tmp_path):
    rows, extra = two_epochs("dpo", 1)
    extra |= {"save_strategy": "steps", "save_steps": 4, "reference": "adapter"}
    extra |= SCHEDULES["soft"]
    policy = lora(tiny_llama, modules_to_save=["lm_head"])
    expected = history(make(policy, small_tokenizer, tmp_path, rows=rows, **extra))
    for step in (4, 8):
        again = make(policy, small_tokenizer, tmp_path, rows=rows, **extra)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
        assert resumed == expected
    folder = tmp_path / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("model*.safetensors"))
    other = make(policy, small_tokenizer, tmp_path, rows=rows, adapter_tolerance=1e-3, **extra)
    with pytest.raises(
        ValueError, match=r"adapter_tolerance: 1e-06 there, 0.001 here\): resume with those"
    ):
        other.train(resume_from_checkpoint=str(folder))


# --- a quantised base -----------------------------------------------------------------------------


def quantised(tokenizer, folder):
    """A model with a 4-bit base, as `BitsAndBytesConfig` loads it, and the weights it stands for in
    a plain one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bnb = pytest.importorskip("bitsandbytes")
    config = make_tiny_llama(tokenizer).config
    config.hidden_size, config.head_dim = 64, 16  # blocks of 64 weights
    plain = LlamaForCausalLM(config)
    plain.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    four_bit = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for name, module in four_bit.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    four_bit = peft.prepare_model_for_kbit_training(four_bit, use_gradient_checkpointing=False)
    return four_bit, plain


def test_a_run_on_a_4_bit_base(small_tokenizer, tmp_path, with_merged):
    policies = [lora(model) for model in quantised(small_tokenizer, tmp_path / "model")]
    layers = [m for n, m in policies[0].named_modules() if n.endswith("q_proj.base_layer")]
    assert {(type(m).__name__, m.weight.dtype) for m in layers} == {("Linear4bit", torch.uint8)}
    for schedule, places in {
        "hybrid": ["adapter"],
        "hard": ["adapter", "resident", "snapshot"],
    }.items():
        extra = {"max_steps": 7, **SCHEDULES[schedule]}
        truth = with_merged(policies[1], small_tokenizer, tmp_path, reference="adapter", **extra)
        expected = history(truth)
        extra |= {"save_strategy": "steps", "save_steps": 4}
        for place in places:
            folder = tmp_path / schedule / place
            trainer = make(policies[0], small_tokenizer, folder, reference=place, **extra)
            losses = history(trainer)
            assert losses == pytest.approx(expected, rel=1e-5)
            if place == "snapshot":
                continue
            again = make(policies[0], small_tokenizer, folder, reference=place, **extra)
            again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
            assert [log["loss"] for log in again.state.log_history if "loss" in log] == losses


def test_a_4_bit_base_packed_for_inference_is_refused(small_tokenizer, tmp_path):
    model, _ = quantised(small_tokenizer, tmp_path)
    prepare_model(model)
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 2]]))
    prepare_model(model)  # an evaluation has not packed it
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"q_proj: bitsandbytes has repacked .* load the model"):
        prepare_model(model)


# --- which one, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"ref_model_mixup_alpha": 1.0}, "snapshot"),
        ({"sync_ref_model": False}, "snapshot"),
        ({"ref_model_mixup_alpha": 0.6}, "adapter"),
        ({"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1}, "adapter"),
    ],
)
def test_auto_picks_the_cheapest(schedule, expected, tiny_llama, small_tokenizer, tmp_path, capsys):
    trainer = make(lora(tiny_llama), small_tokenizer, tmp_path, reference="auto", **schedule)
    assert trainer.reference.name == expected
    assert f"reference: {expected} (" in capsys.readouterr().err


def test_another_model_as_first_reference(tiny_llama, small_tokenizer, tmp_path):
    def build(**extra):
        config = TRConfig(**options(tmp_path, max_steps=2, overwrite_output_dir=True, **extra))
        rows = {"train_dataset": pair_rows(8), "processing_class": small_tokenizer}
        return TRTrainer(lora(tiny_llama), copy.deepcopy(tiny_llama), config, **rows)

    trainer = build(sync_ref_model=False)  # of another structure, but frozen
    assert trainer.reference.name == "resident"
    assert len(history(trainer)) == 2
    assert build(ref_model_mixup_alpha=1.0).reference.name == "resident"  # follows merged weights
    for place in ("adapter", "offloaded", "snapshot"):
        with pytest.raises(ValueError, match=f'"{place}" starts from the policy: leave ref_model'):
            build(reference=place, ref_model_mixup_alpha=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"use_dora": True, "target_modules": ["embed_tokens"]},
            "DoraEmbeddingVariant, whose weight is not .* use plain LoRA, or",
        ),
        ({"target_modules": ["lm_head"]}, "lm_head carries .*leave lm_head out of target_modules"),
    ],
)
def test_refused_adapters(options, message, tiny_llama, small_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make(lora(tiny_llama, **options), small_tokenizer, tmp_path, reference="adapter")
    assert "\n" not in str(error.value)


def test_refused_policies(tiny_llama, small_tokenizer, tmp_path, monkeypatch):
    expected = r'reference="adapter" needs a policy with a trained PEFT LoRA adapter, got LlamaFor'
    with pytest.raises(ValueError, match=expected):
        make(tiny_llama, small_tokenizer, tmp_path, reference="adapter")
    untrained = lora(tiny_llama, inference_mode=True)
    with pytest.raises(ValueError, match=r"got PeftModel: wrap it with peft\.get_peft_model"):
        AdapterReference(untrained, TrustRegion())
    torch.manual_seed(0)
    loha = peft.LoHaConfig(target_modules=["q_proj"], init_weights=False)
    hadamard = peft.get_peft_model(copy.deepcopy(tiny_llama), loha)
    with pytest.raises(
        ValueError, match=r"q_proj is a peft\.tuners\.loha\.layer\.Linear, whose weight is not W"
    ):
        AdapterReference(hadamard, TrustRegion())
    with pytest.raises(ValueError, match="would mix the factors of"):
        OffloadedReference(hadamard, TrustRegion(0.5, 2))
    with pytest.raises(ValueError, match=r"adapter_tolerance: expected .* in \[0, 1\), got 1"):
        make(lora(tiny_llama), small_tokenizer, tmp_path, reference="adapter", adapter_tolerance=1)
    for name in [n for n in sys.modules if n.split(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("tralign_fast.reference.adapter.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\(pip install 'tralign-fast\[peft\]'\)"):
        AdapterReference(tiny_llama, TrustRegion())


def test_smollm2_with_lora(smollm2):
    """The first six of its thirty layers."""
    model, whole = smollm2[0], smollm2[0].model.layers
    model.model.layers = whole[:6]
    try:
        policy = lora(model, r=8, trained=False, target_modules=["q_proj", "v_proj"])
    finally:
        model.model.layers = whole
    policy.get_base_model().config.num_hidden_layers = 6
    prepare_model(policy, packing=False)
    reference = AdapterReference(policy, TrustRegion(0.6, 2))
    truth = MergedReference(policy, TrustRegion(0.6, 2))
    shake(policy, 0, 0.2)
    reference.sync()
    truth.sync()
    batch = batch_of(layout="padded")
    expected = truth.logps(batch)
    torch.testing.assert_close(reference.logps(batch), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(sequence_logps(policy, batch), expected, rtol=1e-3)
