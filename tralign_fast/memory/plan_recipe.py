"""`plan --config recipe.yaml`: what a recipe of `train` would hold."""

from __future__ import annotations

import argparse
from typing import Any

from tralign_fast.ops.logits_budget import STANDARD_MB

# option of `train` -> option of `plan`
_SAME = {
    "model": "model", "dataset": "dataset", "reference": "reference", "optim": "optim",
    "ref_model_mixup_alpha": "alpha", "per_device_train_batch_size": "pairs",
    "gradient_release": "gradient_release", "gradient_checkpointing": "gradient_checkpointing",
    "logits_budget_mb": "logits_budget_mb",
}  # fmt: skip
# options of `train` that change what is held, and that a plan takes over as they are
_MORE = ("vocab_filter", "kept", "use_weighting", "precompute_ref_log_probs", "adapter_tolerance")
_LORA_RANK = 16  # of train, where none is named


def plan_arguments(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments of `plan` with a recipe of `train` resolved, and options for its `TRConfig`.

    A recipe of plan's own options stays as it is. What stands on the command line wins.

    Raises:
        ValueError: as the recipe would be refused by `train`.
    """
    from tralign_fast.command_line import Given, options_in

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    try:
        found, rest = first.parse_known_args(arguments)
    except SystemExit:  # no value, which plan's own parser says
        return arguments, {}
    if found.config is None or not _is_of_train(options_in(found.config)):
        return arguments, {}
    from tralign_fast.training.config import TRConfig
    from tralign_fast.training.train_options import TrainOptions

    given = Given("train", [TrainOptions, TRConfig], ["--config", found.config])
    named = {word.split("=")[0].lstrip("-").replace("-", "_") for word in rest}
    options, more = of_recipe(given)
    words = [w for n, v in options.items() if n not in named for w in (f"--{n}", str(v))]
    return [*words, *rest], more


def _is_of_train(names: set[str]) -> bool:
    return bool(names & {"dataset", "dataset_name", "output_dir", "max_length", "use_peft"})


def of_recipe(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of a plan by name, options that its `TRConfig` has besides)."""
    plan = {ours: getattr(given, name) for name, ours in _SAME.items()}
    if plan["logits_budget_mb"] is None:  # by what is free, which a plan is to find out
        plan["logits_budget_mb"] = STANDARD_MB
    plan["optim"] = getattr(plan["optim"], "value", plan["optim"])
    if given.gradient_checkpointing_layers is not None:
        plan["gradient_checkpointing_layers"] = given.gradient_checkpointing_layers
    losses = given.loss_type
    plan["method"] = losses[0] if isinstance(losses, list) else losses or "dpo"
    every = given.ref_model_sync_steps
    plan["sync"] = 0 if given.sync_ref_model is False else max(2, int(every))
    length = given.max_length or 1024
    # a sequence is half of its pair's prompts and a quarter, one completion, as a plan has them
    plan["tokens"] = given.token_budget or plan["pairs"] * length * 4 // 3
    init = given.model_init_kwargs if isinstance(given.model_init_kwargs, dict) else {}
    few = given.load_in_4bit
    plan["dtype"] = given.dtype or init.get("dtype") or ("bfloat16" if few else "float32")
    if given.use_peft:
        plan["lora_rank"] = given.lora_r or _LORA_RANK
    if few:
        plan["base_bits"] = 4
    if given.num_processes and given.parallel in ("fsdp2", "zero3"):
        plan["gpus"] = given.num_processes
    more = {name: getattr(given, name) for name in _MORE if name in given.names}
    more["bf16"] = given.bf16 is not False  # left out, it is on where there is a GPU
    return plan, more
