"""What only a GPU has: variable-length attention, the head at its size and its peak memory."""

from __future__ import annotations

import copy

import pytest
import torch

import tralign_fast.model.attention as attention
from tests.model import test_checkpointing as checkpoints
from tests.model.test_attention import build, collate, gradients, run
from tralign_fast import linear_logprobs
from tralign_fast.model.checkpointing import lean_checkpoints
from tralign_fast.model.fused_lora import fuse_lora
from tralign_fast.model.patching import causal_lm_of, decoder_of
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.logits_budget import free_bytes
from tralign_fast.ops.logprobs import linear_logprobs_naive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def logps_and_gradients(model, layout):
    """Computed on the GPU, in the model's dtype."""
    model.zero_grad()
    logps = sequence_logps(model, collate(layout).to("cuda"))
    return logps.detach().cpu(), gradients(model, logps)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_variable_length_attention_is_as_good_as_one_call_a_sequence(name, layout, monkeypatch):
    """In bf16, against the same weights in fp32: the kernel has grouped heads, windows, prompts."""
    model = build(name).bfloat16()
    exact_model = copy.deepcopy(model).float()
    assert prepare_model(exact_model).packs
    exact = run(exact_model.cpu(), "padded")
    model.cuda()
    assert prepare_model(model).packs
    calls = []
    original = attention._torch_varlen

    def counting(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(attention, "_torch_varlen", counting)
    ours = logps_and_gradients(model, layout)
    assert len(calls) == model.config.num_hidden_layers
    monkeypatch.setattr(attention, "_varlen_function", lambda *_: None)
    theirs = logps_and_gradients(model, layout)
    # three layers in bf16: both are off by the same roundings in other places
    triples = [(ours[0], theirs[0], exact[0])]
    triples += [(ours[1][name], theirs[1][name], grad) for name, grad in exact[1].items()]
    for mine, other, truth in triples:
        error, allowed = (mine - truth).norm(), 2 * (other - truth).norm()
        assert error <= allowed + 2**-8 * truth.norm(), (error, allowed, truth.norm())


@pytest.mark.parametrize("kept", ["logits", "powers"])
@pytest.mark.parametrize("budget_mb", [0, 192, 1024])
def test_the_head_of_llama_3(budget_mb, kept):
    """Kept, kept in part, recomputed: N = 1,024, V = 128,256, against fp32."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1024, 512, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(128_256, 512, generator=g, device="cuda") / 512**0.5
    weight = weight.bfloat16().requires_grad_()
    targets = torch.randint(0, 128_256, (1024,), generator=g, device="cuda")
    grad = torch.randn(1024, generator=g, device="cuda")

    def ours():
        logps = linear_logprobs(hidden, weight, targets, logits_budget_mb=budget_mb, kept=kept)
        return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), grad)

    ours()  # cuBLAS allocates its workspace, once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = ours()
    # both gradients, fp32 and bf16 of hidden states; logits within the budget or 16 MiB
    others = 2 * weight.numel() + 8 * hidden.numel() + (4 << 20)
    others += 2 * hidden.numel() * (kept == "powers")  # hidden states times their rows' factors
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= others + (max(budget_mb, 16) << 20), peak
    leaves = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    exact = linear_logprobs_naive(*leaves, targets, dtype=torch.float32)
    expected = exact.detach(), *torch.autograd.grad(exact, leaves, grad)
    for mine, truth in zip(values, expected, strict=True):
        assert (mine.float() - truth).norm() <= 2**-7 * truth.norm()


@pytest.mark.parametrize("height", [-70.0, 70.0])
def test_powers_of_rows_out_of_the_ordinary(height):
    """A third of the rows are made again: the shipped tiles, beside logits that are kept."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 512, generator=g, device="cuda")
    weight = torch.randn(8_192, 512, generator=g, device="cuda") / 512**0.5
    hidden[:, 0], weight[:, 0] = 0, 1
    hidden[::3, 0] = height
    leaves = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    targets = torch.randint(0, 8_192, (300,), generator=g, device="cuda")
    grad = torch.randn(300, generator=g, device="cuda")
    both = []
    for kept in ("powers", "logits"):
        logps = linear_logprobs(*leaves, targets, kept=kept)
        both.append([logps.detach(), *torch.autograd.grad(logps, leaves, grad)])
    for mine, other in zip(*both, strict=True):
        assert (mine.float() - other.float()).norm() <= 2**-6 * other.float().norm()


def test_the_budget_sees_what_is_free():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()  # the rest of a larger block that is kept would not count as free
    before = free_bytes(device)
    block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) == pytest.approx(1 << 30, rel=0.05)
    del block  # held by the allocator, and free
    assert free_bytes(device) == pytest.approx(before, abs=64 << 20)


def test_log_probs_have_the_same_bits_in_every_run():
    model = build("llama").bfloat16().cuda()
    assert prepare_model(model).packs
    first, second = (logps_and_gradients(model, "shared") for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("seed", [1, -1, 2**63 + 5])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", checkpoints.CASES)
def test_checkpointed_layers_draw_what_they_draw_by_pytorchs_to_the_bit(
    name, autocast, seed, monkeypatch
):
    """With dropout: the backward sets seed and offset of the card's generator."""
    monkeypatch.setattr(checkpoints, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(checkpoints, "IDS", checkpoints.IDS.cuda())
    model = checkpoints.CASES[name]()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        theirs = checkpoints.gradients(model, seed), checkpoints.random_state()
        lean_checkpoints(model)
        for _ in range(2):
            ours = checkpoints.gradients(model, seed), checkpoints.random_state()
            assert ours[1] == theirs[1]
            assert torch.equal(ours[0][0], theirs[0][0])
            assert ours[0][1].keys() == theirs[0][1].keys()
            for parameter, gradient in theirs[0][1].items():
                assert torch.equal(ours[0][1][parameter], gradient), parameter


CHECKPOINTED = {
    "full": {},
    "attention dropout": {"attention_dropout": 0.1},
    "LoRA": {"lora_dropout": 0.0},
    "LoRA with dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("master", [False, True], ids=["bf16", "fp32 under autocast"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_layers_take_the_memory_that_pytorchs_take(name, master):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    options = CHECKPOINTED[name]
    own = {} if "lora_dropout" in options else options
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.float32 if master else torch.bfloat16).train()
        if "lora_dropout" in options:
            lora = LoraConfig(r=16, target_modules="all-linear", **options)
            model = get_peft_model(model, lora)
            fuse_lora(model)
        ids = torch.randint(0, 1024, (4, 2048))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    decoder = decoder_of(causal_lm_of(model))

    def peak() -> int:
        for kept in (False, True):  # a second batch adds to the gradients of the first
            if not kept:
                model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16, enabled=master):
                loss = decoder(input_ids=ids, use_cache=False).last_hidden_state.float().std()
            loss.backward()
        return torch.cuda.max_memory_allocated()

    peak()  # cuBLAS allocates its workspace, once
    theirs = peak()
    lean_checkpoints(model)
    peak()
    assert peak() <= 1.03 * theirs
