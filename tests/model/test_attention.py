"""Packed rows against separate padded sequences: log-probs, every gradient, real architectures."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import tralign_fast.model.attention as attention
from tests.conftest import DEVICE
from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.backend import warn_once

V = 97
COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name):
    import transformers as t

    configs = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": 8}),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {"sliding_window": 5}),
        "gemma2": (
            t.Gemma2ForCausalLM,
            t.Gemma2Config,
            {
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 6,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 8.0,
            },
        ),
        "cohere": (t.CohereForCausalLM, t.CohereConfig, {}),
        "granite": (t.GraniteForCausalLM, t.GraniteConfig, {"logits_scaling": 3.0}),
        "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config, {}),
        "gpt-oss": (
            t.GptOssForCausalLM,
            t.GptOssConfig,
            {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        ),
    }
    model, config, extra = configs[name]
    torch.manual_seed(0)
    model = model(config(**{**COMMON, **extra}))
    with torch.no_grad():
        for p in model.parameters():  # weights large enough that a wrong mask cannot hide
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model


def examples(seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(0, V, (n,), generator=g).tolist()  # noqa: E731
    lengths = [(7, 5, 9), (3, 6, 1), (12, 1, 14), (1, 3, 3)]
    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in lengths
    ]


def collate(layout="shared") -> PackedBatch:
    (batch,) = PreferenceCollator(paired=True, layout=layout)(examples()).parts
    return batch


def run(model, layout, **checkpointing):
    model.train()
    model.zero_grad()
    logps = sequence_logps(model.to(DEVICE), collate(layout).to(DEVICE))
    return logps.detach().cpu(), gradients(model, logps)


def gradients(model, logps):
    (logps * torch.linspace(-1, 1, len(logps)).to(logps)).sum().backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(packed, separate):
    torch.testing.assert_close(packed[0], separate[0], rtol=1e-5, atol=3e-5)
    assert packed[1].keys() == separate[1].keys()
    for name, grad in separate[1].items():
        error = (packed[1][name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 3e-5, (name, error)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_packed_equals_separate_sequences(name, layout):
    model = build(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")  # the one that honours the softcap
    separate = run_before_preparing(model)
    assert prepare_model(model).packs
    packed = run(model, layout)
    assert_same(packed, separate)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_mlp_runs_on_the_scored_rows_alone(checkpointing):
    model = build("llama")
    assert prepare_model(model).packs
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen, strict=True):
        layer.mlp.down_proj.register_forward_hook(
            lambda _, args, __, rows=rows: rows.append(args[0].shape[1])
        )
    all_rows = collate("shared").num_tokens
    scored = sum(1 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in examples())
    assert scored < all_rows
    run(model, "shared")
    assert [set(rows) for rows in seen] == [{all_rows}] * (len(seen) - 1) + [{scored}]
    for rows in seen:
        rows.clear()
    run(model, "padded")  # and afterwards on all of them
    assert len({rows[0] for rows in seen}) == 1


def run_before_preparing(model):
    """Padded sequences through the model's own forward and logits, nothing of ours in between."""
    model.train()
    model.zero_grad()
    batch = collate("padded").to(DEVICE)
    logits = model.to(DEVICE)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    token_logps = logits.flatten(0, 1)[batch.score_index].log_softmax(-1)
    logps = batch.sum_per_sequence(token_logps.gather(1, batch.targets[:, None])[:, 0])
    return logps.detach().cpu(), gradients(model, logps)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant):
    model = build("llama")
    assert prepare_model(model).packs
    plain = run(model, "shared")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, "shared"), plain)


def flash_attn_stand_in(q, k, v, arguments, window, options):
    """flash-attn 2's documented semantics in plain PyTorch: sequence i has queries
    cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1], the causal mask aligned at the bottom right;
    window (left, 0) lets query j see keys in [j + Lk - Lq - left, j + Lk - Lq]; GQA repeats heads.
    """
    assert options.dropout == 0.0
    out = torch.full_like(q, float("nan"))
    cu_q, cu_k = arguments.cu_seqlens_q.tolist(), arguments.cu_seqlens_k.tolist()
    assert cu_q[-1] == q.shape[0]
    assert cu_k[-1] == k.shape[0] == v.shape[0]
    repeat = q.shape[1] // k.shape[1]
    pieces = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        assert b - a <= arguments.max_seqlen_q
        assert d - c <= arguments.max_seqlen_k
        keys, values = (t[c:d].repeat_interleave(repeat, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * options.scaling
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        row = torch.arange(b - a, device=q.device)[:, None] + (d - c) - (b - a)
        column = torch.arange(d - c, device=q.device)[None]
        visible = column <= row
        if window[0] >= 0:
            visible &= column >= row - window[0]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, values))
    assert sum(len(p) for p in pieces) == out.shape[0]
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_variable_length_indices(name, layout, monkeypatch):
    """The one-call path: keys gathered, queries in place, every sequence sees its own prompt."""
    model = build(name)
    assert prepare_model(model).packs
    separate = run(model, "padded")
    calls = []

    def stand_in(*args):
        calls.append(1)
        return flash_attn_stand_in(*args)

    monkeypatch.setattr(attention, "_varlen_function", lambda *_: stand_in)
    packed = run(model, layout)
    assert len(calls) == COMMON["num_hidden_layers"]
    assert_same(packed, separate)


@pytest.mark.parametrize("name", ["gpt-oss", "rwkv"])
def test_a_model_that_cannot_share_falls_back_with_one_warning(name):
    warn_once.cache_clear()
    if name == "rwkv":  # recurrent; Mamba asks the hub for kernels in transformers 5.4
        from transformers import RwkvConfig, RwkvForCausalLM

        torch.manual_seed(0)
        model = RwkvForCausalLM(RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2))
    else:
        model = build(name)
    before = model.config._attn_implementation
    with pytest.warns(UserWarning, match="cannot share prompts in a packed row") as caught:
        assert not prepare_model(model).packs
    assert len([w for w in caught if "packed row" in str(w.message)]) == 1
    assert model.config._attn_implementation == before
    logps = sequence_logps(model, collate("padded"))
    assert torch.isfinite(logps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_shares_wrongly_is_found_out(dtype, monkeypatch, smollm2):
    """One causal sequence over the whole row, as a model has it that ignores the layout."""
    import copy

    def whole_row(query, key, value, layout, options):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.scaling, enable_gqa=True
        ).transpose(1, 2)

    model = copy.deepcopy(smollm2[0]).to(dtype)
    assert prepare_model(copy.deepcopy(model)).packs
    monkeypatch.setattr(attention, "_attend_segments", whole_row)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="packed rows give other log-probs"):
        assert not prepare_model(model).packs


def test_no_layer_makes_of_a_mask_what_it_adds_to_its_scores():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model = build("llama")
    prepare_model(model)
    batch = collate().to(DEVICE)
    sequence_logps(model, batch)  # makes one for each shape
    with Calls() as calls:
        sequence_logps(model, batch)
    assert any("scaled_dot_product" in name for name in calls.seen)
    assert not {"aten::where", "aten::scalar_tensor"} & set(calls.seen)


def test_generation_is_as_before():
    model = build("llama").eval()
    prompt = torch.tensor([[0, 5, 6, 7], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # left padding
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    before = model.generate(prompt, **options)
    assert prepare_model(model).packs
    assert torch.equal(model.generate(prompt, **options), before)


def test_saved_models_do_not_remember_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama")
    prepare_model(model)
    model.save_pretrained(tmp_path)
    assert "tralign" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
