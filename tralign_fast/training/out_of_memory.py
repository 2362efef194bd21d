"""What an out-of-memory error of a run says besides its own words: what `plan` would have said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from tralign_fast.model.patching import causal_lm_of

_NAMED = 3  # changes


@contextlib.contextmanager
def out_of_memory_explained(trainer: Any) -> Iterator[None]:
    """Raises a `torch.OutOfMemoryError` of the run again, with a line more."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # its own words stay in front: `auto_find_batch_size` knows it by them
        raise torch.OutOfMemoryError(f"{error}\n{_advice(trainer)}") from error


def _advice(trainer: Any) -> str:
    from tralign_fast.memory.changes import changes  # which makes trainers, too

    work = _work_of(trainer)
    asked = f"tralign-fast: {work.pairs} rows of {work.tokens:,} tokens in all"
    if torch.cuda.is_available():
        peak, card = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        asked += f", at most {peak / 2**30:.1f} of {card / 2**30:.1f} GiB so far"
    less = "; ".join(what for what, _ in islice(changes(work), _NAMED))
    less = less or "--per_device_train_batch_size 1, a smaller max_length"
    return f"{asked}. What takes less, mildest first, as options of tralign-fast plan: {less}"


def _work_of(trainer: Any) -> Any:
    """Its `Workload`."""
    from tralign_fast.memory.workload import Workload

    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    ranks = [getattr(c, "r", None) for c in getattr(model, "peft_config", {}).values()]
    base = causal_lm_of(model)
    pairs = args.per_device_train_batch_size
    names = (
        "gradient_checkpointing", "gradient_checkpointing_layers", "gradient_release",
        "max_grad_norm",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    return Workload(
        base.config,
        pairs=pairs,
        tokens=max(trainer.largest_batch, 4 * pairs),
        lora_rank=ranks[0] if ranks else None,
        base_bits=4 if ranks and getattr(base, "is_loaded_in_4bit", False) else 16,
        gpus=args.world_size,
        options={**options, "reference": trainer.reference.name, "optim": str(args.optim.value)},
    )
