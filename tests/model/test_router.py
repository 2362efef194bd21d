"""The load-balancing loss over weighted tokens, beside transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.conftest import make_small_tokenizer
from tests.training.test_load_balance import make_moe
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.router import asked, balance_loss, expert_counts, slopes_of
from tralign_fast.model.scoring import balance_alone, sequence_logps

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [10, 11], "rejected_ids": [12]},
    {"prompt_ids": [], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [3], "chosen_ids": [9, 9, 9, 9], "rejected_ids": [2]},
]
UNPAIRED = [
    {"prompt_ids": [5, 6, 7, 8, 9], "completion_ids": [10, 11], "label": True},
    {"prompt_ids": [3, 4], "completion_ids": [12], "label": False},
    {"prompt_ids": [7], "completion_ids": [4, 4, 5], "label": True},
]


def layers(layers=3, rows=40, experts=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, experts, generator=g).mul(3).requires_grad_() for _ in range(layers)]


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_of_a_mask_give_transformers_loss(masked, top_k):
    mask = torch.ones(4, 10, dtype=torch.int64)
    if masked:
        for row, length in enumerate((10, 3, 7, 1)):
            mask[row, length:] = 0
    ours, theirs = layers(), layers()
    weights = mask.flatten().float().repeat(3)
    loss = balance_loss(torch.cat(ours), weights, top_k)
    logits: Any = tuple(theirs)
    expected = load_balancing_loss_func(logits, 8, top_k, mask if masked else None)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for total in (loss, expected):
        total.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_a_weight_counts_a_row_so_often():
    (logits,) = layers(1)
    weights = torch.arange(40) % 4
    repeated = logits.repeat_interleave(weights, 0)
    expected = balance_loss(repeated, torch.ones(len(repeated)), 2)
    torch.testing.assert_close(balance_loss(logits, weights.float(), 2), expected)


def test_parts_with_the_slopes_of_the_whole_add_up():
    (logits,) = layers(1)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    cuts = [slice(0, 7), slice(7, 40)]
    counts = [expert_counts(logits.softmax(-1)[c], weights[c], 2) for c in cuts]
    slopes = slopes_of(counts[0] + counts[1])
    parts = sum(balance_loss(logits[c], weights[c], 2, slopes=slopes) for c in cuts)
    torch.testing.assert_close(parts, balance_loss(logits, weights, 2))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(precision):
    (logits,) = layers(1)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    logits = logits.detach().to(precision)
    with torch.autocast("cpu", torch.bfloat16):
        loss = balance_loss(logits, weights, 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, balance_loss(logits.float(), weights, 2))


@pytest.mark.parametrize("paired", [True, False, None])
def test_every_layout_counts_as_a_padded_batch_of_ones_own_tokens(paired):
    """None: unpaired rows without mismatched completions."""
    tokenizer = make_small_tokenizer()
    model = make_moe(tokenizer).eval()
    rows = PAIRS if paired else UNPAIRED
    keys = ["chosen_ids", "rejected_ids"] if paired else ["completion_ids"]
    own = [[*row["prompt_ids"], *row[key]] for key in keys for row in rows]
    length = max(map(len, own))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in own])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in own])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert expected > 2.002  # 2: even; what other initial weights give differs
    with prepare_model(model):
        for layout in ("shared", "packed", "padded"):
            collator = PreferenceCollator(bool(paired), layout, mismatched=paired is False)
            (batch,) = collator(rows).parts
            aux = balance_alone(model, asked(batch))
            torch.testing.assert_close(aux, expected, rtol=1e-5, atol=1e-5)


def test_layers_compiled_without_question_answer_it_later():
    torch._dynamo.reset()
    model = make_moe(make_small_tokenizer(), num_hidden_layers=1).eval()
    (batch,) = PreferenceCollator(paired=True, layout="padded")(PAIRS).parts
    with prepare_model(model, packing=False):
        expected = balance_alone(model, asked(batch))
    with prepare_model(model, packing=False) as prepared:
        prepared.compile_layers(backend="eager", dynamic=True)
        with torch.no_grad():
            sequence_logps(model, batch)
        torch.testing.assert_close(balance_alone(model, asked(batch)), expected)
    torch._dynamo.reset()
