"""The options that a trainer is given, in whatever class its user has them."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from tralign_fast.ops.backend import warn_once
from tralign_fast.training.config import TRConfig

# what transformers keeps of options that have another name by now, or sets by itself
_NOT_OPTIONS = {"_n_gpu", "push_to_hub_token"}


def run_arguments(args: Any) -> TRConfig:
    """A `TRConfig` as it is, or the one that says the same as TRL's or transformers' arguments.

    Options keep their values, defaults of their class among them: the reference of a `DPOConfig`
    is frozen unless it says `sync_ref_model=True`. Those that `TRConfig` alone has take its
    defaults; a plain `TrainingArguments` says nothing of the reference, which then moves.

    Raises:
        ValueError: not training arguments, or an option of theirs is set that has no counterpart;
            the message names it.
    """
    if args is None:
        return TRConfig("tr-output")
    if isinstance(args, TRConfig):
        return args
    kind = type(args).__name__
    if not isinstance(args, TrainingArguments):
        raise ValueError(
            f"args: expected a TRConfig, TRL's DPOConfig or KTOConfig, or transformers' "
            f"TrainingArguments, got {kind}"
        )
    known = {f.name for f in dataclasses.fields(TRConfig) if f.init}
    values: dict[str, Any] = {}
    foreign: list[str] = []
    as_text = args.to_dict()  # of classes, enums and dtypes, what they are made from
    for field in dataclasses.fields(args):
        if field.name in _NOT_OPTIONS or not field.init:
            continue
        value = getattr(args, field.name)
        if field.name in known:
            # to_dict() masks tokens, and unfolds accelerate's configuration
            values[field.name] = value if "token" in field.name else as_text[field.name]
        elif value not in (None, False, field.default):
            foreign.append(field.name)
    if foreign:
        raise ValueError(
            f"args: {kind} sets {', '.join(foreign)}, which TRConfig does not have; leave it out, "
            "or pass a TRConfig with what you mean"
        )
    config = TRConfig(**values)
    moves = "moves" if config.sync_ref_model else "is frozen, as sync_ref_model says"
    warn_once(f"args: the {kind} was taken over as a TRConfig; the reference {moves}")
    return config
