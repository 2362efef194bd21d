"""Which method a run trains: what `loss_type` says, or the columns of the rows where it is open."""

from __future__ import annotations

import sys
from typing import Any

from tralign_fast.data.columns import column_names
from tralign_fast.training.config import TRConfig

_LABELLED = ({"completion", "label"}, {"completion_ids", "label"})
_PAIRED = ({"chosen", "rejected"}, {"chosen_ids", "rejected_ids"})


def settle_method(args: TRConfig, method: str | None, *datasets: Any) -> None:
    """Sets `args.loss_type` where it is open; one line on stderr where the rows decided for KTO.

    Args:
        args: the options of the run.
        method: dpo or kto, of a trainer that trains nothing else; None: any.
        datasets: rows of training and of evaluation; the first that are there decide.

    Raises:
        ValueError: a loss that the trainer does not train, or options that the method which the
            rows mean does not take.
    """
    if not args.loss_is_open:
        if method is not None and args.objective.paired != (method == "dpo"):
            names = " + ".join(args.objective.names)
            takes = "pairs" if method == "dpo" else "completions with a label"
            raise ValueError(
                f"loss_type: expected a loss of {takes}, which TR{method.upper()}Trainer trains, "
                f"got {names}; TRTrainer trains it"
            )
        return
    args.loss_type = None  # rows of an earlier run with these options may have settled it
    if method is not None:
        args.settle_loss(method)
        return
    columns = next((column_names(rows) for rows in datasets if rows is not None), set())
    pairs = any(columns >= kind for kind in _PAIRED)
    labelled = next((kind for kind in _LABELLED if columns >= kind), None)
    if labelled is None or pairs:
        _settle_pairs(args)
        return
    args.settle_loss("kto")
    if args.process_index == 0:
        found = " and ".join(sorted(labelled))
        print(
            f'loss_type: the rows have {found}, so the run is KTO (loss_type="kto" says it, too)',
            file=sys.stderr,
        )


def _settle_pairs(args: TRConfig) -> None:
    """DPO; the options may still be KTO's, whose trainer in TRL unpairs pairs."""
    only_kto = not args.objective.paired
    try:
        args.settle_loss("dpo")
    except ValueError as error:
        if not only_kto:
            raise
        raise ValueError(
            f'{error}; loss_type="kto" takes it, and makes two rows of a pair'
        ) from None
