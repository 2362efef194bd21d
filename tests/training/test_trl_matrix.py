"""Every loss of TRL × schedule of the reference × full weights or LoRA × dense or MoE: TRL's losses
to 1e-5 at each of eight steps, and its load-balancing loss where there is one.

TRL's own trainer is the yardstick, unchanged, where it has the combination: full weights with any
schedule (`ref_model=` and `SyncRefModelCallback`), LoRA with a frozen reference (its copy "ref" of
the adapter). It refuses LoRA with `sync_ref_model` (NotImplementedError); there it is given, with
`sync_ref_model=False`, a whole second model as `ref_model`, whose weights `MovesMerged` moves: PEFT
merges a copy of the policy, and each tensor becomes α·θ + (1-α)·ref. That is the definition of the
reference, with no factor mixed and none of our code in it; rows, log-probs and losses stay TRL's.

Adam divides by the root of the mean square: at its default ε of 1e-8 it makes a whole step of what
rounding left of a gradient that is zero. TRL's own run of aot_unpaired, hybrid, full, MoE is then
8.7e-5 off the same run in fp64 (1.3e-3 in the load-balancing loss; ours 4.8e-7 in both). `EPSILON`
lies above such gradients, in both trainers: TRL's run is then 4.8e-7 off its own in fp64.

The whole product is marked `matrix`; `SAMPLE` is in `make test`. Each test puts its largest
difference into the report (`--junitxml`) as the property "difference".
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import make_tiny_llama
from tests.training.test_load_balance import logs, make_moe
from tests.training.test_trl_losses import CASES, KTO_CASES, TRLS
from tests.training.test_trl_parity import STEPS, kto_rows, options, pair_rows, trl_classes
from tralign_fast import TRConfig, TRTrainer

peft = pytest.importorskip("peft")

EPSILON = 1e-5  # Adam's
TOLERANCE = 1e-5  # of the loss, and of 1 where it is smaller
SCHEDULES: dict[str, dict[str, Any]] = {
    "frozen": {"sync_ref_model": False},
    "soft": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1},
    "hard": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3},
    "hybrid": {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2},
}
# where our reference lives
PLACES = {
    "full": {"frozen": "auto", "soft": "resident", "hard": "snapshot", "hybrid": "offloaded"},
    "LoRA": {"frozen": "auto", "soft": "adapter", "hard": "adapter", "hybrid": "adapter"},
}
# each name of TRL's, and a sum; test_trl_losses.py has the options that change one
NAMES = [*(name for name in CASES if name in TRLS), *KTO_CASES, "several"]
LOSSES = {name: {**CASES, **KTO_CASES}[name] for name in NAMES}
SAMPLE = {
    ("ipo", "frozen", "LoRA", "dense"), ("sigmoid", "soft", "LoRA", "dense"),
    ("apo_zero_unpaired", "hard", "LoRA", "dense"), ("several", "hybrid", "LoRA", "dense"),
    ("discopop", "soft", "full", "MoE"), ("aot", "hard", "full", "MoE"),
    ("sppo_hard", "hybrid", "full", "MoE"), ("robust", "frozen", "LoRA", "MoE"),
    ("kto, weights", "soft", "LoRA", "MoE"), ("nca_pair", "hybrid", "LoRA", "MoE"),
}  # fmt: skip
WHOLE = list(itertools.product(LOSSES, SCHEDULES, ("full", "LoRA"), ("dense", "MoE")))


def start(weights, kind, tokenizer) -> Any:
    """The policy before its first step; LoRA's is not zero there, and reaches experts."""
    model = make_moe(tokenizer) if kind == "MoE" else make_tiny_llama(tokenizer)
    if weights == "full":
        return model
    torch.manual_seed(1)
    modules = ["q_proj", "v_proj", "o_proj", *(["up_proj"] if kind == "dense" else [])]
    experts = ["mlp.experts.down_proj"] if kind == "MoE" else None
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=modules, target_parameters=experts,
            init_lora_weights=False,
        ),
    )  # fmt: skip


class MovesMerged(TrainerCallback):
    """ref ← α·merged(θ) + (1-α)·ref after each τ-th optimizer step.

    A twin of the policy, made before TRL replaces the policy's forward, takes its weights and is
    merged by PEFT.
    """

    def __init__(self, policy, alpha, every):
        self.twin, self.alpha, self.every = copy.deepcopy(policy), alpha, every
        self.reference = self.merged(policy)
        self.syncs = 0

    def merged(self, policy):
        twin = copy.deepcopy(self.twin)
        twin.load_state_dict(policy.state_dict())
        return twin.merge_and_unload().requires_grad_(False)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            thetas = dict(self.merged(kwargs["model"]).named_parameters())
            for name, ref in self.reference.named_parameters():
                ref.copy_(self.alpha * thetas[name] + (1 - self.alpha) * ref)
            self.syncs += 1


def run_trl(policy, tokenizer, folder, loss, schedule, rows, **extra):
    """TRL's trainer after its run, by the yardstick that this file's first lines describe."""
    config, trainer_class = trl_classes("kto" if loss in KTO_CASES else "dpo")
    moves, sync = schedule.get("sync_ref_model", True), schedule
    callbacks, reference = [], None
    if isinstance(policy, peft.PeftModel):
        if moves:
            alpha, every = schedule["ref_model_mixup_alpha"], schedule["ref_model_sync_steps"]
            callbacks = [MovesMerged(policy, alpha, every)]
            reference, sync = callbacks[0].reference, SCHEDULES["frozen"]
    else:
        reference = copy.deepcopy(policy)
    trainer = trainer_class(
        copy.deepcopy(policy),
        ref_model=reference,
        args=config(**options(folder, **LOSSES[loss], **sync, **extra)),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    for callback in callbacks:
        assert callback.syncs == STEPS // schedule["ref_model_sync_steps"]
    return trainer


@pytest.mark.parametrize(
    ("loss", "schedule", "weights", "kind"),
    [pytest.param(*c, marks=[] if c in SAMPLE else pytest.mark.matrix) for c in WHOLE],
)
def test_losses_equal_trl_to_1e_5(
    loss, schedule, weights, kind, small_tokenizer, tmp_path, record_property
):
    rows = kto_rows() if loss in KTO_CASES else pair_rows()
    policy = start(weights, kind, small_tokenizer)
    extra = {"adam_epsilon": EPSILON, **({"router_aux_loss_coef": 0.05} if kind == "MoE" else {})}
    how = SCHEDULES[schedule]
    theirs = run_trl(policy, small_tokenizer, tmp_path / "trl", loss, how, rows, **extra)
    keys = ["loss", "aux_loss"] if kind == "MoE" else ["loss"]
    expected = {key: logs(theirs, key) for key in keys}
    assert all(len(set(values)) > 2 for values in expected.values())  # it is worth comparing
    place = PLACES[weights][schedule]
    args = {"reference": place, **LOSSES[loss], **how, **extra}
    mine = TRTrainer(
        copy.deepcopy(policy),
        args=TRConfig(**options(tmp_path / "ours", **args)),
        train_dataset=rows,
        processing_class=small_tokenizer,
    )
    mine.train()
    if schedule != "frozen":
        assert mine.state.log_history[-2]["tr/syncs"] == STEPS // how["ref_model_sync_steps"]
    worst, where = 0.0, None
    for key in keys:
        found = logs(mine, key)
        assert len(found) == len(expected[key]) == STEPS
        for step, (a, b) in enumerate(zip(found, expected[key], strict=True), 1):
            assert math.isfinite(a)
            off = abs(a - b) / max(1.0, abs(b))
            if off > worst:
                worst, where = off, (key, step, a, b)
    record_property("difference", worst)
    assert worst <= TOLERANCE, where


def test_the_sample_is_of_the_whole():
    assert set(WHOLE) >= SAMPLE
    assert {c[1:] for c in SAMPLE} >= {(schedule, "LoRA", "dense") for schedule in SCHEDULES}
    assert {c[1] for c in SAMPLE if c[3] == "MoE"} == set(SCHEDULES)
