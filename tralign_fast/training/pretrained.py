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
    set_seed,
)

from tralign_fast.ops.backend import warn_once
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.second import refuse_shared
from tralign_fast.training.config import TRConfig
from tralign_fast.training.model_kinds import model_class, where_options
from tralign_fast.training.option_types import shown


def given_models(
    model: str | PreTrainedModel,
    ref_model: str | PreTrainedModel | None,
    args: TRConfig,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The policy and the first reference of a run, from what a trainer is given; dropout off.

    Raises:
        ValueError: as the functions below, or nothing of the policy can be trained.
    """
    base = load_model(model, args, quantization_config)
    first = load_reference(ref_model, base, args, quantization_config)
    policy = with_adapter(base, peft_config, args)
    check_trainable(policy, model if isinstance(model, str) else None)
    if first is not None:
        refuse_shared(first, policy)
    if args.disable_dropout:
        disable_dropout(policy)
        if first is not None:
            disable_dropout(first)
    return policy, first


def load_model(
    model: str | PreTrainedModel, args: TRConfig, quantization_config: Any = None
) -> PreTrainedModel:
    """The model itself, or the one of that name, with `model_init_kwargs`, in fp32 as TRL does.

    Args:
        quantization_config: of transformers, for a model given by its name.

    Raises:
        ValueError: no such model, an option of it needs a package that is not there, or one that is
            loaded already is to be quantised.
    """
    if isinstance(model, str):
        options = _loading_options(args, quantization_config)
        return load_pretrained(model_class(model, args), model, **options)
    if quantization_config is not None:
        raise ValueError(
            "quantization_config: the model is loaded already; pass its name, or load it with "
            "from_pretrained(name, quantization_config=...)"
        )
    if args.model_init_kwargs:
        warn_once("model_init_kwargs has no effect: the model is given, not its name")
    return model


def load_reference(
    ref_model: str | PreTrainedModel | None,
    policy: PreTrainedModel,
    args: TRConfig,
    quantization_config: Any = None,
) -> PreTrainedModel | None:
    """The first reference itself, or the one of that name, loaded as a policy is.

    Raises:
        ValueError: it is the policy itself, or no such model.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the model itself; leave it out and a copy is made")
    if not isinstance(ref_model, str):
        return ref_model
    like_policy = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
    options = {**like_policy, **_loading_options(args, quantization_config, dtype=policy.dtype)}
    return load_pretrained(model_class(ref_model, args), ref_model, **options)


def _loading_options(
    args: TRConfig, quantization_config: Any, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    # JSON of the command line is a dict by now: TrainingArguments has parsed it
    asked = cast("dict[str, Any]", args.model_init_kwargs or {})
    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code, **asked}
    if quantization_config is None:
        return options
    if "quantization_config" in asked:
        raise ValueError(
            "quantization_config is given twice, to the trainer and in model_init_kwargs; expected "
            "one of them"
        )
    return {**options, "quantization_config": quantization_config}


def with_adapter(model: PreTrainedModel, peft_config: Any, args: TRConfig) -> PreTrainedModel:
    """The model inside a PEFT model of that configuration; None: the model as it is.

    The adapter's first weights follow from `seed`, as in TRL. On a quantised base they are bf16, as
    QLoRA has them (arXiv 2305.14314, section 3), but for DoRA's magnitudes, whose steps bf16 would
    round away.

    Raises:
        ValueError: PEFT is not installed, no configuration of PEFT, or a model that has an adapter.
    """
    if peft_config is None:
        return model
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ValueError("peft_config: PEFT is not installed: pip install peft") from error
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            "peft_config: expected a configuration of PEFT such as peft.LoraConfig(), got "
            f"{type(peft_config).__name__}"
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "peft_config: the model has an adapter already; leave peft_config out to train that "
            "one, or pass model.merge_and_unload()"
        )
    if getattr(peft_config, "lora_dropout", None) and args.disable_dropout:
        warn_once("lora_dropout has no effect: disable_dropout is True")
    set_seed(args.seed)
    quantised = getattr(model, "is_quantized", False)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers the weights of a layer into buffers of one dtype
    policy: Any = get_peft_model(model, peft_config, autocast_adapter_dtype=quantised or not zero3)
    if quantised:
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return policy


def check_trainable(model: PreTrainedModel, name: str | None) -> None:
    """Raises ValueError, with the remedy, where nothing of a model can be trained."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        merged = next((n for n, a, layer in trained_adapters(model) if a in _merged(layer)), None)
        if merged is not None:
            raise ValueError(
                f"the adapter of {merged} is merged into its base, and no gradient reaches it: "
                "call unmerge_adapter() before it is trained"
            )
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


def _merged(layer: Any) -> list[str]:
    return getattr(layer, "merged_adapters", [])


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: str | PreTrainedModel, args: TRConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the model's; one without a padding token pads with its EOS.

    Raises:
        ValueError: no tokenizer where the model comes from.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    found: Any = tokenizer
    if found is None:
        found = load_pretrained(AutoTokenizer, name, **where_options(args))
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def load_pretrained(factory: Any, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except ImportError as error:  # an attn_implementation or a quantisation without its package
        asked = ", ".join(
            f"{key}={shown(value)}"
            for key, value in options.items()
            if key != "dtype" and value not in (None, False)
        )
        raise ValueError(
            f"cannot load {name!r} with {asked}: {str(error).splitlines()[0]}"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a dozen types: safetensors, tokenizers, the hub, json, …
        kinds = {AutoTokenizer: "tokenizer", AutoProcessor: "processor"}
        what = kinds.get(factory, "model")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load {what} {name!r}: expected a hub id or a folder made by save_pretrained "
            f"({reason})"
        ) from error


def vocabulary_size(*models: PreTrainedModel | None) -> int:
    """Rows of the input embedding, also inside what PEFT wraps it in; the fewest of the models."""
    sizes = []
    for model in models:
        if model is not None:
            embeddings: Any = model.get_input_embeddings()
            embeddings = getattr(embeddings, "original_module", embeddings)
            sizes.append(getattr(embeddings, "base_layer", embeddings).num_embeddings)
    return min(sizes)


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
