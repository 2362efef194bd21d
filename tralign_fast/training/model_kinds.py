"""Whether a model, by name or as it is, is one of text or a vision-language model."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tralign_fast.training.config import TRConfig

# what a config is found by, of the keywords of from_pretrained
_WHERE = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder", "local_files_only")


def is_vision_language(model: str | PreTrainedModel, args: TRConfig) -> bool:
    config = model_config(model, args) if isinstance(model, str) else model.config
    return getattr(config, "vision_config", None) is not None


def model_class(name: str, args: TRConfig) -> Any:
    """The auto class that loads the model of that name."""
    config = model_config(name, args)
    kind = getattr(config, "model_type", None)
    made_as = (getattr(config, "architectures", None) or [""])[0]
    vision = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if vision and not made_as.endswith("ForCausalLM"):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def model_config(name: str, args: TRConfig) -> Any:
    """The config of the model of that name; None where there is none, as in an adapter's folder."""
    try:
        return AutoConfig.from_pretrained(name, **where_options(args))
    except (OSError, ValueError, KeyError):  # what is wrong is said when the model is loaded
        return None


def where_options(args: TRConfig) -> dict[str, Any]:
    """What `from_pretrained` of a config or tokenizer takes of the model's keywords."""
    options: Any = args.model_init_kwargs or {}
    asked = {key: options[key] for key in _WHERE if key in options}
    return {"trust_remote_code": args.trust_remote_code, **asked}
