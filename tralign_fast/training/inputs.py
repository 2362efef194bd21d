"""From a run's rows and options to what its batches are made of."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tralign_fast.data.jobs import tokenizer_in
from tralign_fast.data.overlap import count_shared
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, SplitBatch
from tralign_fast.data.tokenization import (
    add_lengths,
    lend_in_groups,
    tokenize_pairs,
    tokenize_unpaired,
)
from tralign_fast.ops.backend import warn_once
from tralign_fast.training.config import TRConfig


def collator_of(
    args: TRConfig,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    vocab_size: int | None,
    given: Any = None,
) -> Any:
    """The collator of a run, or the one that was given, with a warning for each option that it does
    not follow."""
    made = PreferenceCollator(
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
    for name in () if given is None else ("ld_alpha", "token_budget", "pad_to_multiple_of"):
        asked = getattr(made, name)
        if asked is not None and getattr(given, name, None) != asked:
            warn_once(f"{name}={asked} has no effect: the data_collator that is given decides it")
    return made if given is None else given


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
    order = args.train_sampling_strategy
    by_length = order in ("group_by_length", "batch_rebalance")
    if training and not hasattr(dataset, "__len__"):
        if by_length:
            warn_once(
                f"train_sampling_strategy={order!r} has no effect: a stream's rows come as they are"
            )
        if args.dataloader_drop_last:
            warn_once(
                "dataloader_drop_last=True has no effect: a stream's last batch is trained on"
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
    if by_length:
        rows = add_lengths(rows, args.length_column_name)
    return rows


def held_out(
    dataset: Any,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: TRConfig,
) -> Any:
    """The rows of a run's evaluations as token ids; one warning for a dataset with rows that are
    trained on, too.

    Args:
        dataset: a dataset, or a dict of them.
        rows: those of the training, tokenised; a stream is not looked at, nor are streams held out.
    """
    found = tokenized(dataset, tokenizer, args, "eval")
    if not hasattr(rows, "__len__") or args.process_index > 0:
        return found
    for name, part in (found if isinstance(found, dict) else {"eval": found}).items():
        shared = count_shared(rows, part) if hasattr(part, "__len__") else 0
        if shared:
            warnings.warn(
                f"{name}: {shared} of {len(part)} rows are trained on, too, so that an evaluation "
                "tells nothing new of them; expected other rows (of one file or split "
                "dataset_split=train[:90%] and eval_split=train[90%:])",
                stacklevel=3,
            )
    return found


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
