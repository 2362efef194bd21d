"""LLaMA-Factory's YAML (`stage: dpo`, `kto`) as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tralign_fast.migrate.adapters import lora, quantised
from tralign_fast.migrate.dialect import KEEP, Dialect, Options, Recipe, held_out, refused, words

_LORA = {
    "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "use_dora": "use_dora", "use_rslora": "use_rslora",
}  # fmt: skip
_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}


def _stage(recipe: Recipe, value: Any) -> Options:
    if value not in ("dpo", "kto"):
        raise refused("stage", value, "dpo or kto (other stages have no reference)")
    if value == "kto":
        if recipe.given.get("pref_ftx"):
            recipe.line_lost("pref_ftx", "sft is a loss of pairs, and kto is not")
        return {"loss_type": "kto", "train_sampling_strategy": "random"}
    loss = recipe.given.get("pref_loss") or "sigmoid"
    if loss not in ("sigmoid", "hinge", "ipo"):
        raise refused("pref_loss", loss, "sigmoid, hinge or ipo (others have no reference)")
    weight = recipe.given.get("pref_ftx")
    if not weight:
        return {"loss_type": loss}
    recipe.done.changes(
        "pref_ftx: the SFT term is a mean over the tokens of a batch, in LLaMA-Factory over those "
        "of each row first"
    )
    return {"loss_type": [loss, "sft"], "loss_weights": [1.0, weight]}


def _dataset(recipe: Recipe, value: Any) -> Options:
    source = _source(recipe, "dataset", value)
    count = recipe.given.get("max_samples")
    options: Options = {"dataset": source}
    if count:
        options["dataset_split"] = f"train[:{count}]"
    size = recipe.given.get("val_size")
    if size and count:
        recipe.line_lost(
            f"val_size={size}", "slices of max_samples: write eval_dataset, eval_split"
        )
    elif size:
        options |= {"eval_dataset": source, **held_out(recipe, "train", size)}
    return options


def _eval_dataset(recipe: Recipe, value: Any) -> Options:
    return {"eval_dataset": _source(recipe, "eval_dataset", value), "eval_split": "train"}


def _source(recipe: Recipe, name: str, value: Any) -> str:
    """The file or the id on the hub that a name of dataset_info.json means."""
    names = words(value)
    if len(names) > 1:
        recipe.line_lost(name, f"the first of {len(names)} is taken; put their rows together")
    first = names[0] if names else str(value)
    folder = Path(str(recipe.given.get("dataset_dir") or "data"))
    for place in (folder, recipe.path.parent / folder):
        try:
            entry = json.loads((place / "dataset_info.json").read_text("utf-8"))[first]
            source = entry.get("hf_hub_url") or str(place / entry["file_name"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        recipe.line_lost(
            f"{name}={first}",
            f"{source}; rows are prompt, chosen, rejected or prompt, completion, label (text or "
            "messages): rename the columns of others",
        )
        return source
    recipe.line_lost(
        f"{name}={first}",
        "a name of dataset_info.json, which was not found: write the file or the id on the hub",
    )
    return first


def _finetuning(recipe: Recipe, value: Any) -> Options:
    if value == "full":
        return {}
    if value != "lora":
        recipe.line_lost(f"finetuning_type={value}", "peft_config is a table of LoraConfig")
        return {}
    given = recipe.given
    rank = given.get("lora_rank") or 8
    target = given.get("lora_target") or "all"
    defaults = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
                "target_modules": "all-linear" if target == "all" else words(target)}  # fmt: skip
    if given.get("additional_target"):
        defaults["modules_to_save"] = words(given["additional_target"])
    return {"peft_config": lora(given, _LORA, defaults)}


def _bits(recipe: Recipe, value: Any) -> Options:
    kind = recipe.given.get("quantization_method") or "bnb"
    if value not in (4, 8) or kind not in ("bnb", "bitsandbytes"):
        recipe.line_lost(f"quantization_bit={value}", "4 or 8 bit of bitsandbytes")
        return {}
    return {"quantization_config": quantised(value)}


def _template(recipe: Recipe, value: Any) -> Options:
    recipe.line_lost(f"template={value}", "the tokenizer's own chat template is taken")
    return {}


def _reference(recipe: Recipe, value: Any) -> Options:
    recipe.line_lost(f"ref_model={value}", "a script: TRTrainer(model, ref_model=...)")
    return {}


def _finish(recipe: Recipe) -> Options:
    given = recipe.given
    if given.get("stage") is None:
        raise refused("stage", None, "dpo or kto (other stages have no reference)")
    extra: Options = {}
    if given.get("finetuning_type") is None:
        extra |= _finetuning(recipe, "lora")
    full = given.get("finetuning_type") == "full"
    kwargs: Options = {}
    if given.get("pure_bf16") or (given.get("bf16") and not full):
        kwargs["dtype"] = "bfloat16"
    if given.get("model_revision") not in (None, "main"):
        kwargs["revision"] = given["model_revision"]
    if given.get("flash_attn") in _ATTENTION:
        kwargs["attn_implementation"] = _ATTENTION[given["flash_attn"]]
    if kwargs:
        extra["model_init_kwargs"] = kwargs
    if given.get("disable_gradient_checkpointing"):
        extra["gradient_checkpointing"] = False
    # defaults of LLaMA-Factory that are not those here
    defaults = {"max_length": 2048, "learning_rate": 5e-5, "logging_steps": 500,
                "report_to": "none"}  # fmt: skip
    return {**extra, **defaults}


_NOT_NEEDED = (
    "additional_target dataset_dir disable_gradient_checkpointing do_eval do_predict do_train "
    "finetuning_type flash_attn lora_target max_samples media_dir model_revision neat_packing "
    "overwrite_cache packing plot_loss pref_ftx pref_loss pure_bf16 quantization_method "
    "remove_unused_columns upcast_layernorm use_fast_tokenizer val_size save_safetensors "
    "double_quantization quantization_type preprocessing_batch_size"
)
LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    {
        **dict.fromkeys(_NOT_NEEDED.split()),
        **dict.fromkeys(_LORA),
        "model_name_or_path": "model",
        "stage": _stage,
        "finetuning_type": _finetuning,
        "pref_beta": "beta",
        "dpo_label_smoothing": "label_smoothing",
        "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
        "dataset": _dataset,
        "eval_dataset": _eval_dataset,
        "cutoff_len": "max_length",
        "template": _template,
        "preprocessing_num_workers": "dataset_num_proc",
        "quantization_bit": _bits,
        "ref_model": _reference,
        "warmup_ratio": "warmup_steps",
        "evaluation_strategy": "eval_strategy",
        "enable_liger_kernel": "use_liger_kernel",
        "group_by_length": lambda recipe, value: (
            {"train_sampling_strategy": "group_by_length"} if value else {}
        ),
        "overwrite_output_dir": lambda recipe, value: {"overwrite_output_dir": KEEP},
    },
    _finish,
)
