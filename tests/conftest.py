"""Fixtures that several rooms of the test tree share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's tokenizer, from the package that ships the model."""
    from tralign_fast.smollm2 import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct in fp32; copy the model before training it."""
    from tralign_fast.smollm2 import load_smollm2

    return load_smollm2()


@pytest.fixture
def tiny_llama(tokenizer):
    """A two-layer Llama with SmolLM2's vocabulary, weights of a fixed seed, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
