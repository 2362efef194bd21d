"""LoRA on a quantised base: bitsandbytes' 4 and 8 bit, and tensor subclasses as torchao makes them.

The truth is the same base with one adapter a layer that holds the mean of the merged deltas, all
of it as one matrix.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import make_tiny_llama
from tests.diagonal import diagonal
from tests.reference.test_adapter import batch_of, lora, shake
from tests.training.test_trainer import make
from tests.training.test_trl_parity import STEPS, history, options, pair_rows
from tralign_fast import TrustRegion, ema_update_
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.ema import is_quantised
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.merged import follow_merged_
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.resident import ResidentReference

peft = pytest.importorskip("peft")


class CodedWeight(torch.Tensor):
    """An int8 weight that tells fp32, as torchao's do: it can be multiplied, moved and copied."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes, scale):
        kwargs = {"dtype": torch.float32, "device": codes.device, "requires_grad": False}
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, **kwargs)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["codes"], tensors["scale"])

    def plain(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        same = (aten.detach.default, aten.clone.default, aten.alias.default)
        if func in (*same, aten._to_copy.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        if func in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default,
                    aten.view.default, aten._unsafe_view.default, aten.matmul.default):  # fmt: skip
            plain = pytree.tree_map_only(cls, cls.plain, (args, kwargs))
            return func(*plain[0], **plain[1])
        raise NotImplementedError(f"{func} of a coded weight")


def coded(tokenizer) -> Any:
    model = make_tiny_llama(tokenizer).requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = torch.nn.Parameter(CodedWeight(codes, scale), requires_grad=False)
    return model


def loaded(tokenizer, folder, **config) -> Any:
    pytest.importorskip("bitsandbytes")
    plain = make_tiny_llama(tokenizer, hidden_size=64, head_dim=16)  # blocks of 64 weights
    plain.save_pretrained(folder)
    options = BitsAndBytesConfig(**config)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


BASES = {
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bit in bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    # with a threshold, which columns are outliers depends on all the rows that run together
    "8 bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}

# An 8-bit layer rounds activations to 8 bits: what differs by 1e-7 may be rounded apart. TRL's own
# first loss, of a policy that is its reference, is off log 2 by 6e-5.
TOLERANCE = {"8 bit": 5e-4}


@pytest.fixture(params=[*BASES, "coded"])
def base(request, small_tokenizer, tmp_path) -> Any:
    if request.param == "coded":
        return coded(small_tokenizer)
    return loaded(small_tokenizer, tmp_path / "base", **BASES[request.param])


def weights_of(layer):
    """s·B·A of a layer."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (b @ a).detach()


class MeanOfDeltas:
    """The base, and the mean of what the adapter added, as a matrix for each layer."""

    def __init__(self, policy, alpha):
        self.policy, self.alpha = policy, alpha
        self.layers = [layer for _, _, layer in trained_adapters(policy)]
        self.means = [weights_of(layer) for layer in self.layers]

    @torch.no_grad()
    def logps(self, batch):
        held = []
        for layer, mean in zip(self.layers, self.means, strict=True):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            held.append((down.data, up.data))
            down.data = mean / layer.scaling["default"]
            up.data = torch.eye(len(mean))
        try:
            return sequence_logps(self.policy, batch)
        finally:
            for layer, (down, up) in zip(self.layers, held, strict=True):
                layer.lora_A["default"].weight.data = down
                layer.lora_B["default"].weight.data = up

    def sync(self):
        self.means = [
            mean.lerp(weights_of(layer), self.alpha)
            for mean, layer in zip(self.means, self.layers, strict=True)
        ]


@pytest.mark.parametrize(
    ("base", "alpha"), diagonal(3, [*BASES, "coded"], [1.0, 0.6, 0.05]), indirect=["base"]
)
def test_the_moving_reference_is_the_mean_of_the_deltas(alpha, base, request):
    kind = request.node.callspec.params["base"]
    policy = lora(base).eval()
    prepare_model(policy)
    reference = AdapterReference(policy, TrustRegion(alpha, 2))
    truth, batch, seen = MeanOfDeltas(policy, alpha), batch_of(), []
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    for step in range(6):
        seen.append(truth.logps(batch))
        atol = TOLERANCE.get(kind, 2e-5)
        torch.testing.assert_close(reference.logps(batch), seen[-1], rtol=1e-5, atol=atol)
        shake(policy, step)
        truth.sync()
        reference.sync()
    assert not torch.allclose(seen[0], seen[-1], rtol=1e-4)
    for name, parameter in policy.named_parameters():
        if name in frozen and isinstance(parameter, CodedWeight):
            assert torch.equal(parameter.codes, frozen[name].codes)
        elif name in frozen:  # as bytes: codes may read as NaN
            assert torch.equal(parameter.view(torch.uint8), frozen[name].view(torch.uint8))


def test_dora_on_a_quantised_base(small_tokenizer, tmp_path):
    """A 4-bit base against its numbers in a plain one."""
    from tests.reference.test_adapter import quantised

    policies = [
        lora(model, use_dora=True).eval() for model in quantised(small_tokenizer, tmp_path / "m")
    ]
    references = []
    for policy in policies:
        prepare_model(policy)
        references.append(AdapterReference(policy, TrustRegion(0.6, 2)))
    for step in range(4):
        a, b = (reference.logps(batch_of()) for reference in references)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
        for policy, reference in zip(policies, references, strict=True):
            shake(policy, step)
            reference.sync()
    assert not torch.allclose(a, sequence_logps(policies[0], batch_of()).detach(), rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "place"),
    diagonal(2, [*BASES, "coded"], ["resident", "snapshot", "offloaded", "adapter"]),
    indirect=["base"],
)
def test_places_have_the_same_losses_and_resume(place, base, small_tokenizer, tmp_path):
    policy = lora(base)
    extra = {"max_steps": 6, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    folder = tmp_path / "run"
    expected = history(make(policy, small_tokenizer, tmp_path / "a", reference="adapter", **extra))
    extra |= {"reference": place, "save_strategy": "steps", "save_steps": 3}
    losses = history(make(policy, small_tokenizer, folder, **extra))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) > 3
    again = make(policy, small_tokenizer, folder, **extra)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert resumed == pytest.approx(losses, rel=1e-6)


def test_losses_equal_trls_at_every_step(base, request, small_tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    from tralign_fast import TRConfig, TRTrainer

    policy = lora(base, trained=False)
    for parameter in policy.parameters():  # TRL's adapters of a base by bitsandbytes are in bf16
        if parameter.requires_grad and hasattr(base, "hf_quantizer"):
            parameter.data = parameter.data.bfloat16()
    shared = {"sync_ref_model": False, "learning_rate": 5e-3}
    runs = []
    both: list[Any] = [(DPOTrainer, DPOConfig), (TRTrainer, TRConfig)]
    for kind, config in both:
        trainer = kind(
            copy.deepcopy(policy),
            args=config(**options(tmp_path / kind.__name__, **shared)),
            train_dataset=pair_rows(),
            processing_class=small_tokenizer,
        )
        runs.append(history(trainer))
    assert len(runs[0]) == STEPS
    assert len({round(loss, 4) for loss in runs[0]}) > 4
    kind = request.node.callspec.params["base"]
    assert runs[1] == pytest.approx(runs[0], rel=TOLERANCE.get(kind, 1e-4))


# --- what a quantised weight is, and what cannot be done with it ----------------------------------


def test_what_is_quantised(base, small_tokenizer):
    names = {name for name, p in base.named_parameters() if is_quantised(p)}
    assert {name.split(".")[-2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert not is_quantised(torch.zeros(2, dtype=dtype))
    assert is_quantised(torch.zeros(2).to(torch.float8_e4m3fn))


def test_quantised_weights_do_not_move(base, small_tokenizer):
    name, weight = next((n, p) for n, p in base.named_parameters() if is_quantised(p))
    with pytest.raises(ValueError, match="quantised"):
        ema_update_([weight], [weight], 0.5)
    policy = lora(base)
    plain = make_tiny_llama(small_tokenizer, hidden_size=base.config.hidden_size, head_dim=(
        base.config.head_dim
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"in floating point .*leave ref_model out"):
        ResidentReference(policy, TrustRegion(0.6, 2), plain)
    names = list(base.named_parameters())
    with pytest.raises(ValueError, match=r"in floating point .*leave ref_model out"):
        follow_merged_(names, lora(plain), 0.6, rounding="nearest", generator=None)
    with pytest.raises(ValueError, match=f"{name} of ref_model is quantised"):
        OffloadedReference(plain, TrustRegion(0.6, 2), base)


def test_a_quantised_head_is_refused(small_tokenizer, tmp_path):
    model = loaded(small_tokenizer, tmp_path, load_in_8bit=True, llm_int8_skip_modules=[])
    if not is_quantised(model.lm_head.weight):
        pytest.skip("this transformers never quantises lm_head")
    with pytest.raises(ValueError, match=r"lm_head is quantised.*llm_int8_skip_modules"):
        prepare_model(model)
