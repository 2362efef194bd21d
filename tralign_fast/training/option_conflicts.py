"""Options that contradict each other: refused where a run cannot be what they say, and one warning
each where one of them has no effect.

A value is taken for set if it is not the default: a dataclass does not know more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tralign_fast.ops.backend import device_kind, warn_once
from tralign_fast.reference.snapshot import SnapshotReference
from tralign_fast.training.option_types import nearest

# What no graph of the decoder can replay.
UNGRAPHED = ("torch_compile", "activation_offloading", "neftune_noise_alpha")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules of transformers


def check_conflicts(config: Any) -> None:
    """Checks pairs of options, each of which may have its value by itself.

    Raises:
        ValueError: options that exclude each other; names both and what to set.
    """
    for message in _contradictions(config):
        raise ValueError(message)
    if config.reference == "snapshot":
        SnapshotReference.check_schedule(config.trust_region)
    for name, why in _without_effect(config):
        warn_once(f"{name}={_plain(getattr(config, name))!r} has no effect: {why}")
    if config.token_budget is not None and not config.packing:
        warn_once(
            f"token_budget={config.token_budget} counts tokens without padding, and packing=False "
            "pads: rows are longer"
        )


def _contradictions(config: Any) -> Iterator[str]:
    """What no run can be; the first one ends it."""
    losses = config.loss_type or []  # None: the rows decide
    twice = {n for n in losses if losses.count(n) > 1}
    if {"dpo", "sigmoid"} <= {*losses}:
        twice.add("sigmoid")
    if twice:
        yield (
            f"loss_type: expected each loss once, got {', '.join(losses)}: weigh "
            f"{min(twice)} by loss_weights"
        )
    if "inputs" in (config.include_for_metrics or ()):
        yield (
            "include_for_metrics: expected no inputs, as batches are packed rows; label_ids tell "
            "the completions, in the order of the rows"
        )
    if not config.accelerator_config.use_seedable_sampler:
        yield (
            "accelerator_config: expected use_seedable_sampler true, by which a resumed run and a "
            "window that reads ahead know the order of an epoch's rows"
        )
    if config.padding_free and not config.packing:
        yield "padding_free=True: expected packing=True, which is what it means; drop one of them"
    if config.label_smoothing_factor:
        yield (
            f"label_smoothing_factor: expected 0, got {config.label_smoothing_factor}: it is of "
            "classifiers; label_smoothing is the option of losses"
        )
    other = next((n for n in UNGRAPHED if getattr(config, n)), None)
    if config.cuda_graphs and other is not None:
        yield f"cuda_graphs=True: expected no {other}, which no graph can replay; drop one of them"
    kwargs = config.gradient_checkpointing_kwargs
    layers = config.gradient_checkpointing_layers
    if layers is not None and isinstance(kwargs, dict) and "every_n_layers" in kwargs:
        yield (
            f"gradient_checkpointing_layers={layers:g}: expected no every_n_layers in "
            "gradient_checkpointing_kwargs, which chooses other layers; drop one of them"
        )
    if config.gradient_release and config.deepspeed:
        yield (
            "gradient_release=True: expected no deepspeed, whose engine keeps the gradients; leave "
            "one of them out"
        )


def check_best_model(config: Any) -> None:
    """What `load_best_model_at_end` needs of evaluation and saving.

    Raises:
        ValueError: they do not happen, or not at the same time.
    """
    evaluated, saved = _plain(config.eval_strategy), _plain(config.save_strategy)
    if not config.load_best_model_at_end:
        return
    if evaluated == "no":
        raise ValueError(
            "load_best_model_at_end=True: expected evaluations by which the best model is known, "
            'got eval_strategy="no"'
        )
    if saved not in ("best", evaluated):
        raise ValueError(
            "load_best_model_at_end=True: expected checkpoints when the model is evaluated, got "
            f'save_strategy="{saved}" and eval_strategy="{evaluated}"'
        )


def check_evaluation(config: Any, rows: Any) -> None:
    """Whether there are rows to evaluate on when, and only when, evaluations are asked for.

    Raises:
        ValueError: evaluations without rows.
    """
    evaluated = _plain(config.eval_strategy)
    if rows is None and evaluated != "no":
        raise ValueError(f'eval_strategy="{evaluated}": expected an eval_dataset, got none')
    if rows is not None and evaluated == "no" and not config.eval_on_start:
        warn_once('eval_dataset has no effect: eval_strategy is "no"')


def check_trackers(names: Any) -> None:
    """Raises ValueError for a name of `report_to` that is unknown or not installed."""
    from transformers.integrations import integration_utils

    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = integration_utils.get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in known:
            meant = nearest(name, [*known, "none", "all"])
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ValueError(
                f"report_to: expected none, all or some of {', '.join(known)}, got {name!r}{hint}"
            )
        # these two are not listed wherever they are
        if name not in (*installed, "azure_ml", "flyte"):
            there = f" ({', '.join(installed)})" if installed else ""
            raise ValueError(
                f"report_to: {name} is not installed; expected none, or trackers that are{there}"
            )


def _without_effect(config: Any) -> Iterator[tuple[str, str]]:
    """(option, why) of those that are set and that nothing reads."""
    given = {f.name for f in dataclasses.fields(config) if f.init and _is_set(config, f)}
    for name, why in (
        *_of_the_reference(config), *_of_the_batches(config), *_of_the_loop(config),
    ):  # fmt: skip
        if name in given:
            yield name, why


def _of_the_reference(config: Any) -> Iterator[tuple[str, str]]:
    moves = ("ref_model_sync_steps", "ema_rounding", "adapter_tolerance")
    if not config.sync_ref_model:
        for name in ("ref_model_mixup_alpha", *moves):
            yield name, "sync_ref_model=False freezes the reference"
    elif config.ref_model_mixup_alpha == 0:
        for name in moves:
            yield name, "ref_model_mixup_alpha=0 freezes the reference"
    elif config.ref_model_mixup_alpha == 1:
        yield "ema_rounding", "ref_model_mixup_alpha=1 copies weights as they are"
    if config.reference not in ("auto", "adapter"):
        yield "adapter_tolerance", f'it is of reference="adapter", this is "{config.reference}"'
    batch = "precompute_ref_batch_size"
    if config.reference == "resident":
        yield batch, 'reference="resident" scores every batch in its own step'
    elif config.token_budget is not None:
        yield batch, "with a token_budget a window is scored part after part"
    elif (config.precompute_ref_batch_size or 1) < config.per_device_train_batch_size > 1:
        size = config.per_device_train_batch_size
        yield batch, f"a window is scored in whole batches of per_device_train_batch_size={size}"


def _of_the_batches(config: Any) -> Iterator[tuple[str, str]]:
    if all("nll" in spec.inputs for spec in config.objective.specs):
        names = " + ".join(config.objective.names)
        yield "length_normalized", f"{names} has no log-ratios that are divided"
    if device_kind(config.device) == "cpu" and config.cuda_graphs:
        yield "cuda_graphs", "graphs are of a GPU"
    if config.layer_kernels != "liger":
        yield "liger_kernel_config", f'layer_kernels is "{config.layer_kernels}", not "liger"'


def _of_the_loop(config: Any) -> Iterator[tuple[str, str]]:
    evaluated, saved = _plain(config.eval_strategy), _plain(config.save_strategy)
    if config.device.type == "cpu":
        yield "fp16", "accelerate has no fp16 on a CPU; bf16=True is there"
    if evaluated == "no" and not config.eval_on_start:
        yield "log_kl_initial", 'eval_strategy is "no", so that only a call of evaluate() reads it'
    if evaluated != "steps":
        yield "eval_steps", f'eval_strategy is "{evaluated}"'
    if saved != "steps":
        yield "save_steps", f'save_strategy is "{saved}"'
    if evaluated != "steps" and (logged := _plain(config.logging_strategy)) != "steps":
        yield "logging_steps", f'logging_strategy is "{logged}"'
    if (schedule := _plain(config.lr_scheduler_type)) in _WITHOUT_WARMUP:
        yield "warmup_steps", f'lr_scheduler_type is "{schedule}", which knows no warm-up'
    if saved == "no":
        for name in ("save_total_limit", "save_only_model", "async_save"):
            yield name, 'save_strategy is "no"'
    if not config.gradient_checkpointing:
        for name in ("gradient_checkpointing_kwargs", "gradient_checkpointing_layers"):
            yield name, "gradient_checkpointing is False"


def _is_set(config: Any, field: dataclasses.Field) -> bool:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return getattr(config, field.name) != default


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
