"""Activations of a group that several processes hold pieces of, on fake tensors."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from benchmarks.context_memory import peak

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def whole():
    return {each: peak(config(), 8192, 1, checkpointing=each) for each in (True, False)}


def config():
    return LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_activations_fall_with_the_number_of_processes(processes, checkpointing, whole):
    found, tokens = peak(config(), 8192, processes, checkpointing)
    assert tokens == 8192 // processes
    alone, _ = whole[checkpointing]
    # What does not fall: a token's keys and values, 2 · 2 heads of 64 in bf16, gathered for all
    # tokens while a layer runs, and as sequences (the prompt twice) for as long as they are kept.
    token = 2 * 2 * 64 * 2
    sequences = 1 if checkpointing else 2  # layers
    gathered = 8192 * token + sequences * (8192 + 4096) * token
    assert alone / processes < found < alone / processes + gathered
