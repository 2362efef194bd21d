"""Completions of prompts, greedy, so that two models can be read side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tralign_fast.commands.record import SAMPLES, write_json
from tralign_fast.ops.backend import warn_once

# keywords of `generate`, whatever the model's own configuration says
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class Samples:
    """Completions of a run's held-out prompts before and after it, by its first process.

    Those from before are in the run's folder from then on, so that a resumed run has them.
    """

    def __init__(self, trainer: Any, options: Any) -> None:
        self.trainer, self.tokens = trainer, options.sample_tokens
        self.file = Path(trainer.args.output_dir or ".") / SAMPLES
        self.rows: list[dict[str, str]] = []
        rows = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self.prompts: list[list[int]] = []
        if "sample_tokens" in options.given and not options.sample_prompts:
            warn_once("sample_tokens has no effect: sample_prompts is 0")
        if options.sample_prompts and sharded:
            warn_once("sample_prompts has no effect: the weights are sharded")
        elif options.sample_prompts and trainer.is_world_process_zero():
            self.prompts = prompt_ids_of(rows, options.sample_prompts)

    def take(self, when: str) -> None:
        """Completes the prompts, "before" or "after"."""
        if not self.prompts:
            return
        resumed = (
            when == "before" and self.file.is_file() and list(self.file.parent.glob("checkpoint-*"))
        )
        if resumed:
            self.rows = json.loads(self.file.read_text(encoding="utf-8"))
            return
        tokenizer = self.trainer.processing_class
        texts = complete(self.trainer.model, tokenizer, self.prompts, self.tokens)
        if not self.rows:
            decode = getattr(tokenizer, "tokenizer", tokenizer).decode
            self.rows = [{"prompt": decode(ids, skip_special_tokens=True)} for ids in self.prompts]
        for row, text in zip(self.rows, texts, strict=True):
            row[when] = text
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.rows)


def prompt_ids_of(rows: Any, count: int) -> list[list[int]]:
    """Token ids of the first different prompts of tokenised rows, spread over them."""
    found: dict[tuple[int, ...], None] = {}
    step = max(1, len(rows) // max(1, count))
    for start in range(step):  # the spread ones first
        for index in range(start, len(rows), step):
            found.setdefault(tuple(rows[index]["prompt_ids"]))
            if len(found) == count:
                return [list(ids) for ids in found]
    return [list(ids) for ids in found]


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    batch: int = 8,
    **sampling: Any,
) -> list[str]:
    """The completion of each prompt, in text without special tokens.

    Args:
        model: a causal LM of transformers; its training mode is kept.
        prompts: token ids.
        tokens: of a completion at most.
        sampling: keywords of `generate`; none: greedy.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    texts = []
    try:
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            width = max(len(ids) for ids in part)
            ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in part], device=device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in part], device=device
            )
            options = sampling or GREEDY
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad,
                use_cache=True, **options,
            )  # fmt: skip
            texts += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return [text.strip() for text in texts]
