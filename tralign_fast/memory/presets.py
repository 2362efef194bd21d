"""Models that `tralign-fast plan` knows without a network: their configs, and their hub ids."""

from __future__ import annotations

from typing import Any


def _config(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int | None = None,
            **more: Any) -> dict[str, Any]:  # fmt: skip
    found = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip
    return found if kv is None else {**found, "num_key_value_heads": kv}


_LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}  # fmt: skip
_QWEN: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
_SMOL: dict[str, Any] = {"vocab_size": 49152, "tie_word_embeddings": True}
_TIED = {"tie_word_embeddings": True}
_SMALL_QWEN = {**_QWEN, **_TIED}

# name -> (hub id, config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B-Instruct",
        _config("llama", 2048, 8192, 16, 32, 8, **{**_LLAMA, **_TIED, "head_dim": 64}),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B-Instruct",
        _config("llama", 3072, 8192, 28, 24, 8, **{**_LLAMA, **_TIED, "head_dim": 128}),
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B-Instruct", _config("llama", 4096, 14336, 32, 32, 8, **_LLAMA)
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B-Instruct", _config("llama", 8192, 28672, 80, 64, 8, **_LLAMA)
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _config("qwen3", 1024, 3072, 28, 16, 8, **_SMALL_QWEN)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _config("qwen3", 2048, 6144, 28, 16, 8, **_SMALL_QWEN)),
    "qwen3-4b": ("Qwen/Qwen3-4B", _config("qwen3", 2560, 9728, 36, 32, 8, **_SMALL_QWEN)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _config("qwen3", 4096, 12288, 36, 32, 8, **_QWEN)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _config("qwen3", 5120, 17408, 40, 40, 8, **_QWEN)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _config("qwen3", 5120, 25600, 64, 64, 8, **_QWEN)),
    "mistral-7b": (
        "mistralai/Mistral-7B-Instruct-v0.3",
        _config("mistral", 4096, 14336, 32, 32, 8, vocab_size=32768, sliding_window=None),
    ),
    "gemma-2-2b": ("google/gemma-2-2b-it", _config("gemma2", 2304, 9216, 26, 8, 4, **_GEMMA)),
    "gemma-2-9b": ("google/gemma-2-9b-it", _config("gemma2", 3584, 14336, 42, 16, 8, **_GEMMA)),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct", _config("llama", 576, 1536, 30, 9, 3, **_SMOL)
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M-Instruct", _config("llama", 960, 2560, 32, 15, 5, **_SMOL)
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", _config("llama", 2048, 8192, 24, 32, 32, **_SMOL)
    ),
    "phi-4-mini": (
        "microsoft/Phi-4-mini-instruct",
        _config("phi3", 3072, 8192, 32, 24, 8, vocab_size=200064, **_TIED),
    ),
    "phi-4": ("microsoft/phi-4", _config("phi3", 5120, 17920, 40, 40, 10, vocab_size=100352)),
    "pythia-1b": ("EleutherAI/pythia-1b", _config("gpt_neox", 2048, 8192, 16, 8, vocab_size=50304)),
    "pythia-2.8b": (
        "EleutherAI/pythia-2.8b", _config("gpt_neox", 2560, 10240, 32, 32, vocab_size=50304)
    ),
    "pythia-6.9b": (
        "EleutherAI/pythia-6.9b", _config("gpt_neox", 4096, 16384, 32, 32, vocab_size=50432)
    ),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {name: config for name, (_, config) in MODELS.items()}


def preset_of(model: str) -> str | None:
    """The preset of that name or hub id."""
    if model in MODELS:
        return model
    return next((name for name, (hub, _) in MODELS.items() if hub.lower() == model.lower()), None)
