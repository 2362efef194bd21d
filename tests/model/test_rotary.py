"""Rotary embeddings in fewer operators: the same bits, where they are what they stand for."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.model.test_layer_kernels import build, collate
from tralign_fast.model import rotary
from tralign_fast.model.patching import has_forward
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps


def turned(model: Any) -> int:
    return sum(has_forward(m, rotary.FEWER_OPERATORS) for m in model.modules())


def outcome(model: Any, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = sequence_logps(model, collate())
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logps.detach(), **grads}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "granite", "olmo2"])
def test_losses_and_gradients_are_the_same_to_the_bit(name, kind):
    model = build(name).train()
    if kind == "bf16":
        model.bfloat16()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with prepare_model(model, layer_kernels="none"):
        assert not turned(model)
        expected = outcome(model, kind == "autocast")
    with prepare_model(model):
        assert turned(model) == model.config.num_hidden_layers
        found = outcome(model, kind == "autocast")
    assert not turned(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_half_of_the_operators_are_left():
    def operators(**options: Any) -> Counter[str]:
        model = build("llama").train()
        prepare_model(model, **options)
        with Operators() as seen:
            outcome(model)
        return seen.counts

    before, now = operators(layer_kernels="none"), operators()
    layers = 2
    assert before["slice_backward"] >= 4 * layers > now["slice_backward"]
    assert before["neg"] >= 4 * layers > now["neg"]
    # of a layer: four slices, two minuses, two joins, and what takes them back
    assert before.total() - now.total() >= 15 * layers


def test_what_layers_multiply_with_is_made_once_for_all_of_them(monkeypatch):
    model = build("llama").train()
    prepare_model(model)
    made = []
    original = rotary._signed
    monkeypatch.setattr(rotary, "_signed", lambda *a: made.append(original(*a)) or made[-1])
    outcome(model)
    assert len(made) == 2
    assert made[0] is made[1]


def test_tensors_that_were_changed_in_place_are_looked_at_again():
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    first = rotary._signed(cos, sin)
    assert rotary._signed(cos, sin) is first
    sin.mul_(2)
    again = rotary._signed(cos, sin)
    assert torch.equal(again[1], 2 * first[1])
    assert rotary._signed(cos + 0, sin)[0] is not again[0]


def test_an_evaluation_in_inference_mode_leaves_nothing_that_training_cannot_use():
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    with torch.inference_mode():
        rotary._signed(cos, sin)
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    rotary.turn(x, *rotary._signed(cos, sin)).sum().backward()
    assert x.grad is not None


def test_embeddings_of_another_kind_keep_their_own_code():
    model = build("cohere")  # pairs of neighbours, not halves
    prepare_model(model)
    assert not turned(model)

    def almost(q, k, cos, sin):
        return tuple(t * (1 + 1e-6) for t in rotary._in_place_of(None)(q, k, cos, sin))

    def of_two(q, k):
        return q, k

    assert not rotary.turns_by_halves(almost)
    assert not rotary.turns_by_halves(of_two)


def test_a_function_that_returns_the_dtype_of_the_queries_is_left_to_itself():
    def own(q, k, cos, sin):  # OLMo, whose cosines are fp32 whatever the weights are
        made = rotary._in_place_of(None)(q.float(), k.float(), cos.float(), sin.float())
        return tuple(a.to(b.dtype) for a, b in zip(made, (q, k), strict=True))

    def of_one_dtype(q, k, cos, sin):
        if q.dtype == cos.dtype:
            return rotary._in_place_of(None)(q, k, cos, sin)
        return own(q, k, cos, sin)

    q, k = (torch.randn(1, heads, 5, 8, dtype=torch.bfloat16) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 5, 8)
    assert rotary.turns_by_halves(of_one_dtype)
    found = rotary._in_place_of(of_one_dtype)(q, k, cos, sin)
    for a, b in zip(found, own(q, k, cos, sin), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_fewer_tokens_of_queries_than_of_keys_reach_the_models_function():
    called = []
    rotate = rotary._in_place_of(lambda *args: called.append(args))
    cos = torch.randn(1, 5, 8)
    rotate(torch.randn(1, 2, 1, 8), torch.randn(1, 1, 5, 8), cos, cos + 0)
    assert len(called) == 1


def test_calls_of_another_kind_reach_the_models_function():
    called = []

    def own(*args, **kwargs):
        called.append((args, kwargs))
        return args[:2]

    rotate = rotary._in_place_of(own)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    cos = torch.randn(1, 5, 8)
    rotate(q, k, cos, cos + 0)
    assert not called
    rotate(q, k, cos, cos + 0, unsqueeze_dim=1)
    rotate(q, k, cos, cos + 0, 1)
    rotate(q, k, cos[..., :4], cos[..., :4])
    rotate(q, k, cos, (cos + 0).requires_grad_())
    assert len(called) == 4


def test_a_copy_of_the_model_turns_by_itself_and_an_undo_gives_the_own_code_back():
    model = build("llama").train()
    prepared = prepare_model(model)
    twin = copy.deepcopy(model)
    prepared.undo()
    assert turned(model) == 0
    assert turned(twin) == 2
    with prepare_model(model):
        expected = outcome(model)
    found = outcome(twin)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_cosine_of_inference_mode_is_not_remembered():
    with torch.inference_mode():
        cos = torch.randn(1, 5, 8)
    sin, q, k = torch.randn(1, 5, 8), torch.randn(1, 3, 5, 8), torch.randn(1, 1, 5, 8)
    for mine, own in zip(
        rotary._in_place_of(None)(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(mine, own, rtol=0, atol=0)
