"""LoRA and quantised bases, as the YAML of other trainers has them."""

from __future__ import annotations

from typing import Any


def quantised(bits: int) -> dict[str, Any]:
    """A table of `BitsAndBytesConfig` with what QLoRA has (arXiv 2305.14314)."""
    if bits == 8:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def lora(given: dict[str, Any], names: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """A table of `LoraConfig` from the options that are there under other names."""
    found = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}
    return {**defaults, **found}
