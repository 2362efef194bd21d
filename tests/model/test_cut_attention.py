"""Attention of pieces of groups, against the same rows on one process; no process is started."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.conftest import DEVICE
from tests.data.test_pieces import MIXED, divided, rows_of
from tests.model.test_attention import flash_attn_stand_in
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model import attention, cut_attention

A, K, D = 4, 2, 8  # heads, key-value heads, head size


def tensors(tokens):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(1, h, tokens, D, generator=generator) for h in (A, K, K, A))
    return [t.to(DEVICE, torch.float64) for t in made]


@pytest.mark.parametrize("varlen", [None, flash_attn_stand_in])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"softcap": 2.0, "window": 30}],
    ids=["causal", "window", "softcap"],
)
@pytest.mark.parametrize("count", [2, 3])
def test_pieces_see_what_the_whole_row_sees(count, options, varlen, monkeypatch):
    rows = rows_of(*MIXED, (2, 55, 57), (150, 130, 160))
    whole = PreferenceCollator(paired=True)(rows)
    batches = divided(rows, count, paired=True)
    assert all(batch.layout.cut is not None and batch.layout.groups for batch in batches)
    query, key, value, slope = tensors(whole.num_tokens)
    for t in (query, key, value):
        t.requires_grad_()
    asked = attention._Options(0.3, 0.0, options.get("window"), options.get("softcap"))
    attend = functools.partial(attention._attend, varlen)
    expected = attend(whole.layout, asked, query, key, value)
    expected_grads = torch.autograd.grad(
        expected, (query, key, value), slope.transpose(1, 2), retain_graph=True
    )
    # where each process's tokens stand in the whole row
    at = [places(whole, batch) for batch in batches]

    def gathered(own, width, group):
        assert group == "cp"
        parts = []
        for place, batch in zip(at, batches, strict=True):
            n = batch.layout.cut.tokens
            assert n <= width
            keys = torch.cat([key, value], 1)[0, :, place[:n]].transpose(0, 1)
            parts += [keys, keys.new_full((width - n, 2 * K, D), float("nan"))]  # nobody reads it
        return torch.cat(parts)

    monkeypatch.setattr(cut_attention, "gather_rows", gathered)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for place, batch in zip(at, batches, strict=True):
        own = (t[:, :, place] for t in (query, key, value))
        found = attend(batch.layout, asked, *own)
        torch.testing.assert_close(found, expected[:, place])
        total = total + (found * slope.transpose(1, 2)[:, place]).sum()
    grads = torch.autograd.grad(total, (query, key, value))
    # the softmax of soft-capped scores is one of fp32
    bounds = {"rtol": 1e-5, "atol": 1e-6} if asked.softcap and varlen is None else {}
    for found, exact in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, exact, **bounds)


def places(whole, batch):
    found = {token: i for i, token in enumerate(whole.input_ids[0].tolist())}
    return torch.tensor([found[token] for token in batch.input_ids[0].tolist()], device=DEVICE)
