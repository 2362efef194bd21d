"""What docs/comparison.md says of TRL."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.integrations.conftest import logs
from tests.integrations.test_trl import METHODS, SAVING, lora


@pytest.mark.parametrize("method", [*METHODS, "rloo"])
def test_trl_refuses_to_move_an_adapters_reference(method, build):
    for extra in ({}, {"ref_model_mixup_alpha": 1.0}):
        with pytest.raises(NotImplementedError, match=r"sync_ref_model=True. while using a PEFT"):
            build(method, peft_config=lora(), sync_ref_model=True, **extra)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_refuses_precomputed_log_probs_of_a_moving_reference(method, build):
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        build(method, sync_ref_model=True, precompute_ref_log_probs=True)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_trl_refuses_to_move_a_reference_of_weight_zero(method, build):
    with pytest.raises(ValueError, match=r"beta=0\.0"):
        build(method, sync_ref_model=True, beta=0.0)


def test_trls_update_stops_short_in_bf16():
    from trl.trainer.callbacks import SyncRefModelCallback

    draw = torch.Generator().manual_seed(0)
    ref, policy = (torch.nn.Linear(20_000, 1, bias=False) for _ in range(2))
    start = torch.randn(1, 20_000, generator=draw).mul_(0.02).bfloat16()
    gap = torch.randn(1, 20_000, generator=draw).mul_(0.002)
    ref.weight = torch.nn.Parameter(start.clone())
    policy.weight = torch.nn.Parameter((start + gap).bfloat16())
    for _ in range(230):
        SyncRefModelCallback._sync_target_model(policy, ref, 0.01)
    moved = (ref.weight.detach().float() - start).mul(gap).sum() / gap.square().sum()
    assert 0.2 < moved.item() / (1 - 0.99**230) < 0.45


def test_trl_forgets_where_its_reference_was(build):
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
    first = build("dpo", **SAVING, **moving)
    start = [p.clone() for p in first.ref_model.parameters()]
    expected = [log["loss"] for log in logs(first)]
    again = build("dpo", **SAVING, **moving, max_steps=4)
    again.args.output_dir = first.args.output_dir
    losses = [
        log["loss"]
        for log in logs(again, resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")
    ]
    assert losses[:3] == expected[:3]
    assert abs(losses[3] - expected[3]) > 1e-4
    assert any((p - q).abs().max() > 0 for p, q in zip(start, first.ref_model.parameters()))  # noqa: B905


def test_trl_copies_a_loaded_adapter_for_the_reference(build, tiny_llama):
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(tiny_llama), lora())
    trainer = build("dpo", model=model, ref=False)
    assert list(trainer.model.peft_config) == ["default", "ref"]


def test_the_mean_of_factors_is_not_the_mean_of_adapters():
    """What TRL's open PR 6975 would move: A and B each; B·A is what the model computes with."""
    draw = torch.Generator().manual_seed(0)
    (a, b), (a_ref, b_ref) = (
        (torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw)) for _ in range(2)
    )
    exact = 0.5 * (b @ a) + 0.5 * (b_ref @ a_ref)
    by_factors = (0.5 * b + 0.5 * b_ref) @ (0.5 * a + 0.5 * a_ref)
    assert (by_factors - exact).norm() / exact.norm() > 0.5
