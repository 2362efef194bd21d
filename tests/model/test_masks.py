"""Models whose layers get other masks than packed rows have: found out, whatever their length."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from tests.model.test_attention import COMMON, build
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.masks import watch_masks
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.backend import warn_once

EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
QWEN = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, **EXPERTS}
WINDOW = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
UNTOLD, OWN = "has a mask that its attention is not told", "has a mask of its own"
REFUSED = {
    # a window or chunks in the mask alone
    "PhiMoE": (t.PhimoeForCausalLM, t.PhimoeConfig, {"sliding_window": 16, **EXPERTS}, UNTOLD),
    "Qwen2-MoE": (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, {**QWEN, **WINDOW}, UNTOLD),
    "Qwen2-MoE, 4096": (
        t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, {**QWEN, **WINDOW, "sliding_window": 4096}, UNTOLD,
    ),
    "Llama 4": (
        t.Llama4ForCausalLM, t.Llama4TextConfig,
        {"attention_chunk_size": 16, "intermediate_size_mlp": 64, "head_dim": 8, **EXPERTS}, UNTOLD,
    ),
    # a mask made by each layer
    "Doge": (t.DogeForCausalLM, t.DogeConfig, {"keep_window_size": 16}, OWN),
}  # fmt: skip
PACKED = {
    "PhiMoE": (t.PhimoeForCausalLM, t.PhimoeConfig, {"sliding_window": None, **EXPERTS}),
    "Qwen2-MoE": (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, {**QWEN, "use_sliding_window": False}),
    "Mistral": (t.MistralForCausalLM, t.MistralConfig, {"sliding_window": 16}),
    "Qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": 8, **WINDOW}),
    "Gemma 3": (
        t.Gemma3ForCausalLM, t.Gemma3TextConfig,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "Llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
}  # fmt: skip


def small(model, config, extra):
    torch.manual_seed(0)
    model = model(config(**{**COMMON, **extra})).eval()
    with torch.no_grad():
        for p in model.parameters():  # large enough that a wrong mask shows
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model


def long_batch(layout):
    """Sequences that outgrow every window above."""
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(3, 97, (n,), generator=g).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
        for p, c, r in [(21, 9, 30), (3, 40, 12)]
    ]
    (batch,) = PreferenceCollator(paired=True, layout=layout)(rows).parts
    return batch


def own_logps(model):
    """Of the untouched model's logits."""
    batch = long_batch("padded")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits.flatten(0, 1)[batch.score_index].log_softmax(-1)
    return batch.sum_per_sequence(logps.gather(1, batch.targets[:, None])[:, 0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_packed_rows_do_not_have_is_found_out(name, implementation):
    *parts, reason = REFUSED[name]
    model = small(*parts)
    model.set_attn_implementation(implementation)
    expected = own_logps(model)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"cannot share prompts in a packed row .*{reason}"):
        assert not prepare_model(model).packs
    with torch.no_grad():
        logps = sequence_logps(model, long_batch("padded"))
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_windows_that_the_attention_is_told_are_packed(name, implementation):
    model = small(*PACKED[name])
    model.set_attn_implementation(implementation)
    expected = own_logps(model)
    assert prepare_model(model).packs
    with torch.no_grad():
        logps = sequence_logps(model, long_batch("shared"))
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=3e-5)


def test_a_window_that_the_mask_does_not_have_is_found_out():
    """A layer that passes a window which its own attention, by the mask, does not have."""
    model = build("mistral")
    model.config.sliding_window = None  # of the masks; the layers have their own
    for layer in model.model.layers:
        layer.self_attn.config = build("mistral").config
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"MistralAttention {UNTOLD}"):
        assert not prepare_model(model).packs


def test_a_model_that_makes_its_masks_itself_is_found_out():
    """As remote code does: a 4-D mask of its own, handed to transformers' attention."""
    model = build("llama").eval()

    def with_window(module, args, kwargs):
        tokens = kwargs["input_ids"].shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(-15)
        if (mask := kwargs["attention_mask"]).dim() == 2:
            kwargs["attention_mask"] = seen & mask[:, None, None, :].bool()
        return args, kwargs

    model.model.register_forward_pre_hook(with_window, with_kwargs=True)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"LlamaAttention {OWN}"):
        assert not prepare_model(model).packs


def test_nothing_is_watched_outside_of_the_try():
    model = build("llama")
    prepare_model(model)
    with watch_masks() as outer:
        with watch_masks() as inner:
            sequence_logps(model, long_batch("padded"))
        assert inner._seen
        assert inner.reason is None
        sequence_logps(model, long_batch("padded"))
    assert outer._seen
    seen = dict(outer._seen)
    sequence_logps(model, long_batch("padded"))
    assert outer._seen == seen
