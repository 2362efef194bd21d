"""From a run's rows and options to what its batches are made of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import has_length

from tralign_fast.data.jobs import tokenizer_in
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, SplitBatch
from tralign_fast.data.tokenization import (
    add_lengths,
    lend_in_groups,
    tokenize_pairs,
    tokenize_unpaired,
)
from tralign_fast.training.config import TRConfig


def collator_of(
    args: TRConfig, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, vocab_size: int | None
) -> PreferenceCollator:
    return PreferenceCollator(
        paired=args.objective.paired,
        mismatched=args.objective.needs_kl,
        ld_alpha=args.ld_alpha,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        token_budget=args.token_budget,
        pad_to_multiple_of=args.pad_to_multiple_of,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer_in(tokenizer).pad_token_id or 0,  # pyright: ignore[reportArgumentType]
        vocab_size=vocab_size,
    )


def tokenized(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: TRConfig,
    name: str,
    training: bool = False,
) -> Any:
    """The rows as token ids; to evaluate, those of each dataset in a dict."""
    if isinstance(dataset, dict) and not training:
        return {key: tokenized(part, tokenizer, args, key) for key, part in dataset.items()}
    if dataset is None:
        return None
    if args.precompute_ref_log_probs and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name}: precompute_ref_log_probs=True is not supported with IterableDataset, whose "
            "rows cannot be scored once for all; pass a Dataset, or leave the option out: a "
            "reference still scores ahead as far as it stands still"
        )
    paired = args.objective.paired
    tokenize: Any = tokenize_pairs if paired else tokenize_unpaired
    rows = tokenize(
        dataset,
        tokenizer,
        max_length=args.max_length,
        name=name,
        on_bad_rows=args.on_bad_rows,
        num_proc=args.dataset_num_proc,
        **({"truncation_mode": args.truncation_mode} if paired else {"one_label": not training}),
    )
    if not training and args.objective.needs_kl and hasattr(rows, "__len__"):
        # a row's KL term is the same in batches of any size: those of training decide, as in TRL
        rows = lend_in_groups(rows, args.per_device_train_batch_size)
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        rows = add_lengths(rows, args.length_column_name)
    return rows


def parts_of(batch: Any) -> tuple[PackedBatch, ...]:
    """The parts of a batch.

    Raises:
        ValueError: it is another collator's.
    """
    if not isinstance(batch, (PackedBatch, SplitBatch)):
        raise ValueError(
            "data_collator: expected one that makes a tralign_fast.data.packing.PackedBatch, got a "
            f"{type(batch).__name__}; leave it out"
        )
    return batch.parts


def with_batches(loader: Any, args: TRConfig) -> Any:
    """The dataloader of training.

    Raises:
        ValueError: an epoch of it has no batch, so that a run of so many steps would never end.
    """
    if has_length(loader) and len(loader) == 0:
        raise ValueError(
            f"dataloader_drop_last=True: the rows make no whole batch of {args.train_batch_size} "
            f"for each of {args.world_size} processes; expected more rows, or a smaller "
            "per_device_train_batch_size"
        )
    return loader
