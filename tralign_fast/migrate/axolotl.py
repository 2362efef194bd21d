"""axolotl's YAML (`rl: dpo`, `ipo`, `kto`) as a recipe."""

from __future__ import annotations

from typing import Any

from tralign_fast.migrate.adapters import lora, quantised
from tralign_fast.migrate.dialect import (
    KEEP,
    Dialect,
    Options,
    Recipe,
    held_out,
    refused,
)

_LORA = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out", "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora", "peft_layers_to_transform": "layers_to_transform",
    "lora_target_parameters": "target_parameters",
}  # fmt: skip
_ATTENTION = {
    "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
    "flex_attention": "flex_attention",
}  # fmt: skip
# columns are read by their names, and a template is the tokenizer's
_READ_ALIKE = (None, "chat_template", "chat_template.default", "tokenizer_default")


def _method(recipe: Recipe, value: Any) -> Options:
    if value not in ("dpo", "ipo", "kto"):
        raise refused("rl", value, "dpo, ipo or kto")
    if recipe.given.get("dpo_loss_type") is not None:
        return {}
    alpha = recipe.given.get("rpo_alpha")
    if alpha and value != "kto":
        return {"loss_type": ["sigmoid" if value == "dpo" else "ipo", "sft"],
                "loss_weights": [1.0, alpha]}  # fmt: skip
    return {"loss_type": value}


def _datasets(recipe: Recipe, value: Any) -> Options:
    rows = _rows(recipe, "datasets", value)
    if rows is None:
        return {}
    source, split = rows
    options: Options = {"dataset": source, "dataset_split": split}
    held = held_out(recipe, split, recipe.given.get("val_set_size"))
    if held and recipe.given.get("test_datasets") is None:
        options |= {"eval_dataset": source, **held}
    return options


def _test_datasets(recipe: Recipe, value: Any) -> Options:
    rows = _rows(recipe, "test_datasets", value)
    return {} if rows is None else {"eval_dataset": rows[0], "eval_split": rows[1]}


def _rows(recipe: Recipe, name: str, value: Any) -> tuple[str, str] | None:
    """Where the rows of a list of datasets are, and their split."""
    entries = value if isinstance(value, list) else [value]
    if not entries or not isinstance(entries[0], dict) or "path" not in entries[0]:
        recipe.line_lost(name, "expected a list of tables with a path")
        return None
    first = entries[0]
    if len(entries) > 1:
        recipe.line_lost(name, f"the first of {len(entries)} is taken; put their rows together")
    files = first.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    if len(files) > 1:
        recipe.line_lost(f"{name}: data_files", "the first is taken; a folder of files is one set")
    if first.get("type") not in _READ_ALIKE or any(key.startswith("field_") for key in first):
        recipe.line_lost(
            f"{name}: type, field_*",
            "rows are prompt, chosen, rejected or prompt, completion, label (text or messages); "
            "rename the columns of others",
        )
    for key in ("name", "revision"):
        if first.get(key):
            recipe.line_lost(f"{name}: {key}", "load and save those rows, or take a file")
    return str(files[0] if files else first["path"]), str(first.get("split") or "train")


def _trl(recipe: Recipe, value: Any) -> Options:
    """The table of options that go to TRL as they are."""
    ours = ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    table = value if isinstance(value, dict) else {}
    for name in table.keys() - {*ours}:
        recipe.line_lost(f"trl: {name}", "it has no counterpart")
    return {name: table[name] for name in ours if table.get(name) is not None}


def _per_epoch(name: str) -> Any:
    def rule(recipe: Recipe, value: Any) -> Options:
        if recipe.given.get("max_steps"):
            recipe.line_lost(f"{name}s_per_epoch", f"write {name}_steps beside max_steps")
            return {}
        share = 1 / (float(value) * float(recipe.given.get("num_epochs") or 1))
        steps = {} if share >= 1 else {f"{name}_steps": round(share, 6)}
        return {f"{name}_strategy": "steps" if steps else "epoch", **steps}

    def evaluated(recipe: Recipe, value: Any) -> Options:
        given = recipe.given
        return (
            rule(recipe, value) if given.get("val_set_size") or given.get("test_datasets") else {}
        )

    return evaluated if name == "eval" else rule


def _adapter(recipe: Recipe, value: Any) -> Options:
    if value not in ("lora", "qlora"):
        recipe.line_lost(f"adapter={value}", "peft_config is a table of LoraConfig")
        return {}
    targets = {"target_modules": "all-linear"} if recipe.given.get("lora_target_linear") else {}
    return {"peft_config": lora(recipe.given, _LORA, targets)}


def _bits(bits: int) -> Any:
    return lambda recipe, value: {"quantization_config": quantised(bits)} if value else {}


def _chat_template(recipe: Recipe, value: Any) -> Options:
    if value not in _READ_ALIKE:
        recipe.line_lost(f"chat_template={value}", "the tokenizer's own template is taken")
    return {}


def _special_tokens(recipe: Recipe, value: Any) -> Options:
    table = dict(value) if isinstance(value, dict) else {}
    pad = table.pop("pad_token", None)
    for name in table:
        recipe.line_lost(f"special_tokens: {name}", "save a tokenizer that has it with the model")
    return {"pad_token": pad} if pad else {}


def _checkpointing(recipe: Recipe, value: Any) -> Options:
    if isinstance(value, str):
        return {"gradient_checkpointing": True, "activation_offloading": True}
    return {"gradient_checkpointing": KEEP}


def _plugins(recipe: Recipe, value: Any) -> Options:
    for name in value if isinstance(value, list) else [value]:
        if "TrustRegionPlugin" not in str(name) and "LigerPlugin" not in str(name):
            recipe.line_lost(f"plugins: {name}", "it has no counterpart")
    return {}


def _wandb(recipe: Recipe, value: Any) -> Options:
    recipe.line_lost(f"wandb_project={value}", "set WANDB_PROJECT in the environment")
    return {"report_to": "wandb"}


def _if_true(options: Options) -> Any:
    return lambda recipe, value: options if value else {}


def _finish(recipe: Recipe) -> Options:
    given = recipe.given
    if given.get("rl") is None:
        raise refused("rl", None, "dpo, ipo or kto (other trainings have no reference)")
    extra: Options = {}
    kwargs: Options = {}
    if not given.get("fp16") and given.get("bf16", "auto"):
        kwargs["dtype"] = "bfloat16"
    if revision := given.get("revision_of_model"):
        kwargs["revision"] = revision
    for name, ours in _ATTENTION.items():
        if given.get(name):
            kwargs["attn_implementation"] = ours
    if given.get("attn_implementation"):
        kwargs["attn_implementation"] = given["attn_implementation"]
    if kwargs:
        extra["model_init_kwargs"] = kwargs
    if "eval_dataset" in recipe.options:
        extra["per_device_eval_batch_size"] = given.get("micro_batch_size") or 1
        if given.get("eval_steps"):
            extra["eval_strategy"] = "steps"
        elif "eval_strategy" not in recipe.options:
            extra["eval_strategy"] = "epoch"
    if {"ref_model_mixup_alpha", "ref_model_sync_steps"} & {*recipe.options}:
        extra["sync_ref_model"] = True
    if not any(given.get(name) is not None for name in ("warmup_steps", "warmup_ratio")):
        recipe.line_lost("warmup", "axolotl warms up for 3% of the run by default; warmup_steps")
    # defaults of axolotl that are not those here
    defaults = {"max_length": 512, "gradient_checkpointing": False, "lr_scheduler_type": "cosine",
                "per_device_train_batch_size": 1, "num_train_epochs": 1.0,
                "report_to": "none"}  # fmt: skip
    return {**extra, **defaults}


_NOT_NEEDED = (
    "adapter_args base_model_config bfloat16 dataset_prepared_path debug dpo_generate_during_eval "
    "dpo_use_logits_to_keep eval_max_new_tokens eval_sample_packing eval_table_size "
    "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model local_rank "
    "lora_mlp_kernel lora_o_kernel lora_qkv_kernel model_type pad_to_sequence_len "
    "remove_unused_columns revision_of_model rpo_alpha sample_packing shuffle_merged_datasets "
    "strict tokenizer_type train_on_inputs type_of_model val_set_size wandb_entity wandb_log_model "
    "wandb_mode wandb_watch attn_implementation lora_target_linear"
)
AXOLOTL = Dialect(
    "axolotl",
    {
        **dict.fromkeys(_NOT_NEEDED.split()),
        **dict.fromkeys(_LORA),
        **dict.fromkeys(_ATTENTION),
        "base_model": "model",
        "rl": _method,
        "rl_beta": "beta",
        "dpo_beta": "beta",
        "trl": _trl,
        "dpo_label_smoothing": "label_smoothing",
        "dpo_loss_type": "loss_type",
        "dpo_loss_weights": "loss_weights",
        "dpo_use_weighting": "use_weighting",
        "dpo_padding_free": "padding_free",
        "kto_desirable_weight": "desirable_weight",
        "kto_undesirable_weight": "undesirable_weight",
        "trust_region_alpha": "ref_model_mixup_alpha",
        "trust_region_every": "ref_model_sync_steps",
        "datasets": _datasets,
        "test_datasets": _test_datasets,
        "dataset_processes": "dataset_num_proc",
        "dataset_num_proc": "dataset_num_proc",
        "sequence_len": "max_length",
        "chat_template": _chat_template,
        "special_tokens": _special_tokens,
        "adapter": _adapter,
        "load_in_4bit": _bits(4),
        "load_in_8bit": _bits(8),
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "warmup_ratio": "warmup_steps",
        "bf16": lambda recipe, value: {} if value == "auto" else {"bf16": KEEP},
        "gradient_checkpointing": _checkpointing,
        "group_by_length": _if_true({"train_sampling_strategy": "group_by_length"}),
        "evals_per_epoch": _per_epoch("eval"),
        "saves_per_epoch": _per_epoch("save"),
        "wandb_project": _wandb,
        "wandb_name": "run_name",
        "wandb_run_id": None,
        "hub_model_id": lambda recipe, value: {"hub_model_id": KEEP, "push_to_hub": True},
        "plugins": _plugins,
        **dict.fromkeys(
            ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm"),
            _if_true({"use_liger_kernel": True}),
        ),
        "liger_fused_linear_cross_entropy": None,
    },
    _finish,
)
