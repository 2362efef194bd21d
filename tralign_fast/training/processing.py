"""What turns rows into token ids: the tokenizer or the processor of a model."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from tralign_fast.data.jobs import tokenizer_in
from tralign_fast.training.config import TRConfig
from tralign_fast.training.model_kinds import is_vision_language, where_options
from tralign_fast.training.pretrained import load_pretrained, load_tokenizer


def processing_of(
    given: Any, model: str | PreTrainedModel, args: TRConfig
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What was given, or the model's: the processor of a vision-language model, else a tokenizer.

    A model of text needs no more than the tokenizer of a processor. A tokenizer without a padding
    token pads with its EOS; `args.pad_token` goes before what it has.

    Raises:
        ValueError: neither a tokenizer nor a processor, none where the model comes from, or a
            `pad_token` that is not in the vocabulary.
    """
    if given is not None and not isinstance(given, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise ValueError(
            "processing_class: expected a tokenizer or a processor of transformers, got "
            f"{type(given).__name__}"
        )
    if is_vision_language(model, args) and not isinstance(given, PreTrainedTokenizerBase):
        name = model if isinstance(model, str) else model.config._name_or_path
        given = (
            given
            if given is not None
            else load_pretrained(AutoProcessor, name, **where_options(args))
        )
    elif given is not None:
        given = tokenizer_in(given)
    tokenizer = load_tokenizer(None if given is None else tokenizer_in(given), model, args)
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token: expected a token of the vocabulary of {type(tokenizer).__name__}, got "
                f"{args.pad_token!r}"
            )
        tokenizer.pad_token = args.pad_token
    return tokenizer if given is None else given
