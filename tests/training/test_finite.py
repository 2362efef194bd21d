"""Nothing that is not finite is trained on: weights, states, reference and checkpoints keep their
bits, and no step waits for the device to find out."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tests.diagonal import diagonal
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast.ops.backend import warn_once
from tralign_fast.training.finite import PATIENCE, check_weights
from tralign_fast.training.gradient_release import BlockAdafactor, GradientRelease

RELEASE: dict[str, Any] = {"gradient_release": True, "max_grad_norm": 0.0}
PLACES = {
    "resident": {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1},
    "snapshot": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2},
    "offloaded": {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2},
    "adapter": {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1},
}


@pytest.fixture(autouse=True)
def warnings_anew():
    warn_once.cache_clear()


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def state_of(trainer):
    """Copies of the weights and of the optimizer's states."""
    optimizer = trainer.optimizer.optimizer
    return copy.deepcopy(
        ([p.detach() for p in trainer.model.parameters()], optimizer.state_dict()["state"])
    )


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


class Spoil(TrainerCallback):
    """One element of one gradient is `value` at step `at`; keeps what was before and after it."""

    def __init__(self, trainer, at, value):
        self.trainer, self.at, self.value, self.now = trainer, at, value, 0
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trained[-1].register_hook(self.spoilt)  # the nearest to the loss: all others come later
        trainer.add_callback(self)

    def spoilt(self, grad):
        if self.now != self.at:
            return grad
        grad = grad.clone()
        grad.view(-1)[0] = self.value
        return grad

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1
        if self.now == self.at:
            self.before = state_of(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        if self.now == self.at:
            self.after = state_of(self.trainer)


OPTIMS = {
    "fused": {}, "foreach": {"optim": "adamw_torch"}, "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"}, "accumulated": {"gradient_accumulation_steps": 2},
    "split": {"token_budget": 60}, "unclipped": {"max_grad_norm": 0.0},
    "released fused": RELEASE, "released foreach": {"optim": "adamw_torch", **RELEASE},
    "released adafactor": {"optim": "adafactor", "weight_decay": 0.1, **RELEASE},
}  # fmt: skip


SPOILT = [*(("resident", o) for o in OPTIMS), *((p, "fused") for p in PLACES)]


@pytest.mark.parametrize(("run", "value"), diagonal(2, SPOILT, [math.inf, math.nan]))
def test_a_spoilt_step_changes_nothing(run, value, tiny_llama, small_tokenizer, tmp_path):
    """Step 3 of 6. Gradient release has updated nothing yet when the first gradient is spoilt."""
    place, optim = run
    extra = {
        "max_steps": 6, "reference": place, **PLACES[place], **OPTIMS[optim],
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    model = lora(tiny_llama) if place == "adapter" else tiny_llama
    trainer = make(model, small_tokenizer, tmp_path, **extra)
    spoil = Spoil(trainer, 3, value)
    with pytest.warns(UserWarning, match="step 3: the gradient was NaN or infinite"):
        losses = history(trainer)
    assert same_bits(spoil.before, spoil.after)
    assert len(spoil.before[1]) > 0 or "sgd" in optim  # there were states to keep
    assert all(map(math.isfinite, losses))
    assert not same_bits(spoil.after, state_of(trainer))  # it goes on
    assert [log.get("tr/skipped_steps") for log in trainer.state.log_history if "loss" in log] == [
        None, None, 1, 1, 1, 1
    ]  # fmt: skip
    for file in tmp_path.glob("checkpoint-*/**/*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values()), file
    check_weights(trainer.model)


@pytest.mark.parametrize("options", [{}, RELEASE])
def test_the_last_step_and_the_first(options, tiny_llama, small_tokenizer, tmp_path):
    for at in (1, 4):
        trainer = make(
            tiny_llama, small_tokenizer, tmp_path / str(at), max_steps=4, logging_steps=50,
            save_strategy="steps", save_steps=4, **options,
        )  # fmt: skip
        spoil = Spoil(trainer, at, math.inf)
        trainer.train()
        assert same_bits(spoil.before[0], spoil.after[0])
        if at == 1:  # fused kernels have made states, of zeros and of no step
            assert all(not t.any() for s in spoil.after[1].values() for t in s.values())
        else:
            assert same_bits(spoil.before[1], spoil.after[1])
        assert trainer._finite.skipped == 1
        again = make(
            tiny_llama, small_tokenizer, tmp_path / str(at), max_steps=5, logging_steps=50,
            save_strategy="steps", save_steps=4, **options,
        )  # fmt: skip
        again.train(resume_from_checkpoint=str(tmp_path / str(at) / "checkpoint-4"))
        check_weights(again.model)


def test_an_infinite_score_of_the_reference_moves_nothing(tiny_llama, small_tokenizer, tmp_path):
    """Its loss is 0 and its gradient too: neither would show it."""
    trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=6, logging_steps=4)
    real, states = trainer.reference.logps, []

    def logps(batch):
        scores = real(batch)
        if trainer.state.global_step == 1:
            scores[5] = -math.inf
        return scores

    trainer.reference.logps = logps

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(state_of(trainer))

    trainer.add_callback(Watch())
    with pytest.raises(ValueError, match="step 2: the reference's log-probs of row 5 are NaN or"):
        trainer.train()
    assert len(states) == 4  # found out where it logs
    assert same_bits(states[0], states[1])
    assert not same_bits(states[1], states[2])


@pytest.mark.parametrize("steps", [3, PATIENCE + 5])
def test_a_run_that_trains_nothing_ends(steps, tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": steps, "save_strategy": "steps", "save_steps": 100, "logging_steps": 4}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, "kto", **extra)
    objective = trainer._objective
    spoilt = {**objective.options, "desirable_weight": math.nan, "undesirable_weight": math.nan}
    trainer._objective = dataclasses.replace(objective, options=spoilt)
    last = min(steps, PATIENCE)
    with pytest.raises(ValueError, match=f"steps 1 to {last}: no gradient was finite, and nothing"):
        trainer.train()
    for mine, theirs in zip(trainer.model.parameters(), tiny_llama.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_overflowing_weight_is_not_saved(tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)

    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.model.lm_head.weight.data[0, 0] = math.inf

    trainer.add_callback(Overflow())
    with pytest.raises(ValueError, match=r"weight lm_head.weight is NaN or infinite, nothing was"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="lm_head"):
        trainer.save_model(str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


class _Reads(TorchDispatchMode):
    """How often the host reads a tensor's value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default
        self.count += func in read or func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "reads"), [({}, 0), ({"optim": "adamw_torch"}, 1), (RELEASE, 0)]
)
def test_no_step_waits_for_the_device(options, reads, tiny_llama, small_tokenizer, tmp_path):
    """With fused kernels; others wait once, before the optimizer."""
    extra = {"max_steps": 5, "logging_steps": 50, "ref_model_sync_steps": 50, **options}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    counted = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            counted.append(mode.count)

        on_step_end = on_step_begin

    trainer.add_callback(Watch())
    with _Reads() as mode:
        trainer.train()
    steps = [b - a for a, b in zip(counted[::2], counted[1::2], strict=True)]
    own = steps[2:]  # AdamW without fused kernels reads its own count on a CPU
    if options.get("optim") != "adamw_torch":
        assert own == [reads] * 3
    trainer._finite.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (40, 12), (3, 16, 8)])
@pytest.mark.parametrize("options", [{}, {"scale_parameter": True}, {"weight_decay": 0.1}])
def test_block_adafactor_is_told_on_the_device(options, shape, dtype):
    torch.manual_seed(0)
    base = {"lr": 0.1, "relative_step": False, "scale_parameter": False, **options}
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = GradientRelease(BlockAdafactor([weight], **base))
    states = []
    for value in (math.nan, None, math.inf, None):
        before = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        factor = torch.ones(shape, dtype=dtype)
        if value is not None:
            factor.view(-1)[-1] = value
        (weight * factor).sum().backward()
        assert bool(optimizer.found_inf) == (value is not None)
        optimizer.step()
        assert not optimizer.found_inf
        after = weight.detach().clone(), optimizer.state_dict()["state"]
        assert same_bits(before, after) == (value is not None)
        states.append(after[1])
    assert states[0] == {}  # as if there had been no step
    assert states[-1][0]["step"] == 2
