"""The budget of logits by what a GPU has free, which stand-ins say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tralign_fast import linear_logprobs
from tralign_fast.memory.plan_recipe import of_recipe
from tralign_fast.ops import logits_budget, logprobs
from tralign_fast.ops.logits_budget import budget_bytes, free_bytes

MIB, GIB = 2**20, 2**30
ON_GPU: Any = SimpleNamespace(device=torch.device("cuda", 0))  # all that is asked of hidden states


@pytest.fixture
def card(monkeypatch):
    """A GPU of 80 GiB, nothing on it; `asked` counts the questions."""
    card = SimpleNamespace(
        free=80 * GIB, held=0, used=0, split=0, share=1.0, capturing=False, compiling=False, asked=0
    )

    def mem_get_info(device):
        card.asked += 1
        return card.free, 80 * GIB

    def memory_stats(device):
        return {
            "reserved_bytes.all.current": card.held, "allocated_bytes.all.current": card.used,
            "inactive_split_bytes.all.current": card.split,
        }  # fmt: skip

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_stats", memory_stats)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: card.share)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: card.compiling)
    return card


@pytest.mark.parametrize("asked", [0, 4, 1024, 1500.5, 9000])
def test_what_is_asked_for_is_taken(asked, card):
    assert budget_bytes(asked, 100 * GIB, ON_GPU) == int(asked * MIB)
    assert card.asked == 0


@pytest.mark.parametrize(
    ("free", "budget"),
    [(80, 4096), (8, 4096), (7.99, 2048), (4, 2048), (3.99, 1024), (0.1, 1024), (0, 1024)],
)
def test_half_of_what_is_free_at_most(free, budget, card):
    card.free = int(free * GIB)
    assert budget_bytes(None, 100 * GIB, ON_GPU) == budget * MIB


def test_a_batch_that_fits_the_standard_asks_nothing(card):
    assert budget_bytes(None, GIB, ON_GPU) == GIB
    assert card.asked == 0
    assert budget_bytes(None, GIB + 1, ON_GPU) == 4 * GIB
    assert card.asked == 1


def test_memory_is_looked_at_in_every_step(card):
    """AdamW's states come with the first step, and take what was free before."""
    assert budget_bytes(None, 8 * GIB, ON_GPU) == 4 * GIB
    card.free = 2 * GIB
    assert budget_bytes(None, 8 * GIB, ON_GPU) == GIB


def test_the_allocators_free_blocks_count(card):
    """After a step the allocator holds nearly all of the card: free blocks, and free parts of
    blocks in use, which it cannot join to others."""
    card.free, card.held, card.used, card.split = 1 * GIB, 79 * GIB, 60 * GIB, 5 * GIB
    assert free_bytes(ON_GPU.device) == 15 * GIB
    card.split = 19 * GIB
    assert free_bytes(ON_GPU.device) == 1 * GIB


def test_a_process_with_a_share_of_the_card(card):
    card.share, card.held, card.used = 0.25, 16 * GIB, 15 * GIB
    card.free = 64 * GIB
    assert free_bytes(ON_GPU.device) == 5 * GIB
    card.held = card.used = 21 * GIB  # by another setting than now
    assert free_bytes(ON_GPU.device) == 0


@pytest.mark.parametrize("state", ["capturing", "compiling"])
def test_a_graph_keeps_no_answer(state, card):
    setattr(card, state, True)
    assert budget_bytes(None, 100 * GIB, ON_GPU) == GIB
    assert card.asked == 0


def test_elsewhere_the_standard(card):
    assert budget_bytes(None, 100 * GIB, torch.zeros(1)) == GIB
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda")
        assert budget_bytes(None, 100 * GIB, fake) == GIB
    assert card.asked == 0


def test_the_head_asks_for_its_logits(monkeypatch):
    """All of them with a gradient, none without, which keeps none."""
    seen = []
    monkeypatch.setattr(
        logprobs, "budget_bytes", lambda asked, wanted, hidden: seen.append((asked, wanted)) or 0
    )
    hidden, weight, targets = torch.randn(6, 8), torch.randn(50, 8), torch.arange(6)
    linear_logprobs(hidden, weight, targets)
    linear_logprobs(hidden.bfloat16().requires_grad_(), weight.bfloat16(), targets)
    linear_logprobs(hidden.requires_grad_(), weight, targets, logits_budget_mb=1024)
    assert seen == [(None, 0), (None, 6 * 50 * 2), (1024, 6 * 50 * 4)]


def test_a_plan_traces_the_standard():
    given = SimpleNamespace(
        model="m", dataset="d", reference="auto", optim="adamw_torch", ref_model_mixup_alpha=0.6,
        per_device_train_batch_size=2, gradient_release=False, gradient_checkpointing=True,
        gradient_checkpointing_layers=None, logits_budget_mb=None, loss_type="dpo",
        ref_model_sync_steps=512, sync_ref_model=True, max_length=None,
        token_budget=None, model_init_kwargs=None, load_in_4bit=False, dtype=None, use_peft=False,
        num_processes=None, parallel=None, bf16=None, names=set(),
    )  # fmt: skip
    assert of_recipe(given)[0]["logits_budget_mb"] == logits_budget.STANDARD_MB == 1024
