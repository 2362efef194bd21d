"""Trainers of a workload, this library's and TRL's, at the start."""

from __future__ import annotations

from typing import Any

from tralign_fast.memory.workload import Workload
from tralign_fast.training.config import TRConfig
from tralign_fast.training.trainer import TRTrainer


def make_trainer(work: Workload, folder: str, *, on_gpu: bool = False) -> Any:
    """A `TRTrainer` of that work, at the start.

    Raises:
        ValueError: as `TRConfig` and `TRTrainer` do.
    """
    from datasets import Dataset

    trainer = TRTrainer(
        work.build(on_gpu),
        args=TRConfig(**work.arguments(folder, on_gpu)),
        train_dataset=Dataset.from_list(work.rows()),
        processing_class=one_word_tokenizer(),
    )
    if work.base_bits == 4 and work.gpus > 1:
        _leave_whole(trainer)
    return trainer


def _leave_whole(trainer: Any) -> None:
    """accelerate's FSDP2 shards no quantised weight that is stored in bytes. It knows them by
    bitsandbytes' class, which the stand-ins of `_quantise` have not."""
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in trainer.model.modules() if type(m) is Linear4bit]
    trainer.accelerator.state.fsdp_plugin.ignored_modules = layers


def make_trl_trainer(work: Workload, folder: str, *, on_gpu: bool = False) -> Any:
    """TRL's trainer of the same rows: padded, the reference resident, its own head.

    Raises:
        ImportError: TRL is not installed.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    config_class: Any = DPOConfig if work.paired else KTOConfig
    base: Any = DPOTrainer if work.paired else KTOTrainer

    class Tokenised(base):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    ours = (
        "reference", "gradient_release", "logits_budget_mb", "adapter_tolerance",
        "gradient_checkpointing_layers",
    )  # fmt: skip
    options = {k: v for k, v in work.arguments(folder, on_gpu).items() if k not in ours}
    # TRL refuses a moving reference with PEFT: its reference is the base then
    options["sync_ref_model"] = work.lora_rank is None
    loss = options.get("loss_type", "dpo")
    options["loss_type"] = {"dpo": "sigmoid"}.get(loss, loss)
    return Tokenised(
        work.build(on_gpu),
        ref_model=work.build(on_gpu) if work.lora_rank is None else None,
        args=config_class(**options),
        train_dataset=Dataset.from_list(work.rows()),
        processing_class=one_word_tokenizer(),
    )


def one_word_tokenizer() -> Any:
    """Trainers want one; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>"
    )
