"""Options and methods of TRL's classes, of any version, without a counterpart of their name."""

from __future__ import annotations

import ast
import dataclasses
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Old:
    """An option of an earlier TRL or transformers."""

    say: str  # what is said of it
    name: str | None = None  # its name by now
    drop: str = "never"  # always, never, or off: where it says False, 0 or None

    def can_go(self, value: ast.expr) -> bool:
        """Whether the script computes the same without it, or what is said is all there is."""
        off = isinstance(value, ast.Constant) and not value.value
        return self.drop == "always" or (self.drop == "off" and off)


_SCRIPT = "load it with from_pretrained and pass the model"
_CONFIG: dict[str, Old] = {
    "max_prompt_length": Old("prompts are not cut by themselves, as in TRL 1.16", drop="always"),
    "max_completion_length": Old("max_length alone cuts, as in TRL 1.16", drop="always"),
    "max_target_length": Old("max_length alone cuts, as in TRL 1.16", drop="always"),
    "label_pad_token_id": Old("rows are packed, labels have no padding", drop="always"),
    "padding_value": Old("pad_token is the option", drop="always"),
    "use_logits_to_keep": Old("only scored tokens pass the head, always", drop="always"),
    "use_num_logits_to_keep": Old("only scored tokens pass the head, always", drop="always"),
    "use_liger_loss": Old("the head is this library's own; use_liger_kernel has Liger's layers",
                          drop="always"),
    "base_model_attribute_name": Old("it was of Liger's head", drop="always"),
    "force_use_ref_model": Old("a ref_model that is passed is used, always", drop="always"),
    "generate_during_eval": Old("nothing is generated; a callback can", drop="always"),
    "is_encoder_decoder": Old("models are causal", drop="off"),
    "reference_free": Old("every loss has its reference; SFT beside another is "
                          'loss_type=["sigmoid", "sft"]', drop="off"),
    "rpo_alpha": Old('write loss_type=["sigmoid", "sft"], loss_weights=[1.0, rpo_alpha]',
                     drop="off"),
    "dpop_lambda": Old("DPO-Positive can be a loss of your own (CONTRIBUTING.md)", drop="off"),
    "ref_model_init_kwargs": Old(f"{_SCRIPT} as ref_model", drop="off"),
    "model_adapter_name": Old("the active adapter is trained", drop="off"),
    "ref_adapter_name": Old("pass the adapted model as ref_model", drop="off"),
    "tools": Old("tools are a column of the rows", drop="off"),
    "evaluation_strategy": Old("eval_strategy by now", name="eval_strategy"),
    "warmup_ratio": Old("warmup_steps under 1 is a share by now", name="warmup_steps"),
    "no_cuda": Old("use_cpu by now", name="use_cpu"),
    "group_by_length": Old('train_sampling_strategy="group_by_length" by now', drop="off"),
    "save_safetensors": Old("weights are saved as safetensors, always", drop="always"),
    "logging_dir": Old("TENSORBOARD_LOGGING_DIR in the environment by now", drop="always"),
}  # fmt: skip
_TO_CONFIG = (
    "beta", "label_smoothing", "loss_type", "max_length", "truncation_mode", "disable_dropout",
    "f_divergence_type", "precompute_ref_log_probs", "model_init_kwargs", "dataset_num_proc",
    "desirable_weight", "undesirable_weight", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)  # fmt: skip
OLD_OF_TRAINERS: dict[str, Old] = {
    "tokenizer": Old("processing_class by now", name="processing_class"),
    **{name: Old("it is an option of the config") for name in _TO_CONFIG},
    **{name: old for name, old in _CONFIG.items() if old.name is None},
    "optimizer_cls_and_kwargs": Old("optim and optim_args of the config, or optimizers="),
    "model_init": Old("pass the model; a search makes trainers of its own"),
}
# what a TRL trainer has for those who call or override it
METHODS: dict[str, str] = {
    "compute_loss": "a loss of your own is one function and one entry of LOSSES (CONTRIBUTING.md)",
    "get_batch_loss_metrics": "a loss of your own is one function and one entry of LOSSES",
    "_compute_loss": "a loss of your own is one function and one entry of LOSSES",
    "dpo_loss": "tralign_fast.dpo_loss, or an entry of LOSSES",
    "kto_loss": "tralign_fast.kto_loss, or an entry of LOSSES",
    "concatenated_forward": "batches are packed; tralign_fast.linear_logprobs scores tokens",
    "concatenated_inputs": "batches are packed",
    "forward": "batches are packed; tralign_fast.linear_logprobs scores tokens",
    "get_batch_logps": "tralign_fast.logprobs_from_logits",
    "compute_ref_log_probs": "trainer.reference scores; precompute_ref_log_probs does it once",
    "compute_reference_log_probs": "trainer.reference scores; precompute_ref_log_probs, once",
    "null_ref_context": "trainer.reference scores",
    "generate_from_model_and_ref": "nothing is generated; a callback can",
    "store_metrics": "override log, or pass compute_metrics",
    "tokenize_row": "rows may come tokenised: prompt_ids, chosen_ids, rejected_ids",
    "process_row": "rows may come tokenised: prompt_ids, chosen_ids, rejected_ids",
    "_prepare_dataset": "rows may come tokenised: prompt_ids, chosen_ids, rejected_ids",
    "prediction_step": "compute_metrics gets rewards",
    "predict": "it gives metrics and no predictions; compute_metrics gets rewards",
}
OVERRIDES_ONLY = {"compute_loss", "prediction_step", "forward"}


_COLLATORS = {
    "DataCollatorForPreference", "DataCollatorForUnpairedPreference", "DPODataCollatorWithPadding",
}  # fmt: skip


def is_trls_collator(value: ast.expr) -> bool:
    """Whether a collator is TRL's own, made in the place of the argument; None is one, too."""
    if isinstance(value, ast.Constant) and value.value is None:
        return True
    made = value.func if isinstance(value, ast.Call) else None
    return getattr(made, "id", getattr(made, "attr", None)) in _COLLATORS


@functools.cache
def old_options() -> dict[str, Old]:
    """Those of options that the installed transformers has not under their old name."""
    known = known_options()
    return {name: old for name, old in _CONFIG.items() if name not in known}


@functools.cache
def known_options() -> frozenset[str]:
    from tralign_fast.training.config import TRConfig

    return frozenset(f.name for f in dataclasses.fields(TRConfig) if f.init)
