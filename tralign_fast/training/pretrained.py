"""The model and the tokenizer that a trainer is given, by name or as they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tralign_fast.training.config import TRConfig
from tralign_fast.training.model_kinds import model_class


def load_model(model: str | PreTrainedModel, args: TRConfig) -> PreTrainedModel:
    """The model itself, or the one of that name, with `model_init_kwargs`, in fp32 as TRL does.

    Raises:
        ValueError: no such model, an option of it needs a package that is not there, or nothing of
            it can be trained.
    """
    loaded: PreTrainedModel
    if isinstance(model, str):
        # JSON of the command line is a dict by now: TrainingArguments has parsed it
        options = cast("dict[str, Any]", args.model_init_kwargs or {})
        loaded = load_pretrained(
            model_class(model, args), model, **{"dtype": torch.float32, **options}
        )
    else:
        loaded = model
    _check_trainable(loaded, model if isinstance(model, str) else None)
    return loaded


def _check_trainable(model: PreTrainedModel, name: str | None) -> None:
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if name is not None and getattr(model, "peft_config", None):
        remedy = (
            f"{name} holds an adapter, which is loaded for inference: pass "
            f"PeftModel.from_pretrained(base_model, {name!r}, is_trainable=True)"
        )
    elif getattr(model, "peft_config", None):
        remedy = (
            "its adapter was loaded for inference: pass is_trainable=True to "
            "PeftModel.from_pretrained"
        )
    else:
        remedy = (
            "call model.requires_grad_(True), also after merge_and_unload, or put an adapter on it "
            "with peft.get_peft_model"
        )
    raise ValueError(f"the model has no trainable parameter: {remedy}")


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: str | PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the model's; one without a padding token pads with its EOS.

    Raises:
        ValueError: no tokenizer where the model comes from.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    found: PreTrainedTokenizerBase = (
        tokenizer if tokenizer is not None else load_pretrained(AutoTokenizer, name)
    )
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def load_pretrained(factory: Any, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except ImportError as error:  # an attn_implementation or a quantisation without its package
        asked = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "dtype")
        raise ValueError(
            f"cannot load {name!r} with {asked}: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, ValueError) as error:
        kinds = {AutoTokenizer: "tokenizer", AutoProcessor: "processor"}
        what = kinds.get(factory, "model")
        raise ValueError(
            f"cannot load {what} {name!r}: expected a hub id or a folder made by save_pretrained "
            f"({str(error).splitlines()[0]})"
        ) from error


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding, also inside what PEFT wraps it in."""
    embeddings: Any = model.get_input_embeddings()
    embeddings = getattr(embeddings, "original_module", embeddings)
    return getattr(embeddings, "base_layer", embeddings).num_embeddings


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of dropping something to 0: modules, numbers, and layers left out.

    Half of transformers' models keep theirs as a number (`self.dropout = config.dropout`, for
    `F.dropout`), and some read it in the config at every forward: those entries of the config are
    changed too, and saved so.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _probabilities(vars(module)):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is not None:
            for name in _probabilities(vars(config)) & _read_in_forward(type(module)):
                setattr(config, name, 0.0)


def _probabilities(attributes: Mapping[str, Any]) -> set[str]:
    """Names such as `dropout`, `attn_pdrop`, `layerdrop`, `drop_prob`, where they hold one."""
    return {
        name
        for name, value in attributes.items()
        if "drop" in name.lower() and isinstance(value, float) and 0.0 < value <= 1.0
    }


@functools.cache
def _read_in_forward(module_class: type) -> frozenset[str]:
    """What methods that use `config` read of it, among others, once the module is there."""
    names: set[str] = set()
    for base in module_class.__mro__:
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and name != "__init__" and "config" in code.co_names:
                names.update(code.co_names)
    return frozenset(names)
