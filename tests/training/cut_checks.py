"""What processes that hold pieces of a group compute and send, without a trainer around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.data.test_pieces import MIXED, rows_of
from tests.training.traffic import Traffic, least_bytes_sent
from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import token_logps_and_statistics

SIZES = (*MIXED, (2, 55, 57), (400, 31, 8))
STATISTICS = ("entropy", "mean_logits", "is_top1")


def measured(folder: Path) -> dict[str, Any]:
    """With and without gradient checkpointing: errors against one process, and bytes."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return {
        "plain": _measure(folder, checkpointing=False),
        "checkpointing": _measure(folder, checkpointing=True),
    }


def _measure(folder: Path, checkpointing: bool) -> dict[str, Any]:
    processes = dist.get_world_size()
    rows = rows_of(*SIZES)
    for row in rows:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            row[name] = [token % 50 for token in row[name]]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    assert prepare_model(model).packs
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (whole,) = PreferenceCollator(paired=True)(rows).parts
    exact, exact_found = _step(model, whole)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    group: Any = dist.group.WORLD
    (batch,) = PreferenceCollator(
        paired=True, division=(dist.get_rank(), processes), cut_over=group.group_name
    )(rows).parts
    with Traffic() as traffic:
        logps, found = _step(model, batch)
    sums = [p.grad for p in model.parameters()]
    for own in sums:
        dist.all_reduce(own)
    assert batch.layout is not None
    assert batch.pieces is not None
    cut, config = batch.layout.cut, model.config
    assert cut is not None
    keys = 2 * config.num_key_value_heads * config.head_dim * 4  # bytes of keys and values, fp32
    at = _tokens_of(whole, batch)
    errors = [float((logps - exact[at]).abs().max())]
    errors += [float((found[n].float() - exact_found[n][at].float()).abs().max()) for n in found]
    scores = 4 * batch.pieces.width * processes * (1 + len(STATISTICS))
    layers = config.num_hidden_layers * processes * cut.width * keys
    return {
        "logps": max(errors),
        "gradients": max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(sums, grads, strict=True)
        ),
        "bytes": traffic.of("step"),
        "keys": layers,
        "scores": scores,
        "sent": sum(least_bytes_sent(k, n, processes) for k, n in traffic.of("step").items()),
        "filling": cut.width * processes - _length(batch),
        "owned": batch.own_examples,
    }


def _step(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of a loss in which every token has a weight of its own."""
    logps, found = token_logps_and_statistics(model, batch, STATISTICS)
    weights = torch.cos(batch.targets.float())
    (logps * weights).sum().mul(float(batch.own_examples > 0)).backward()
    return logps.detach(), found


def _tokens_of(whole: PackedBatch, batch: PackedBatch) -> torch.Tensor:
    """Where the scored tokens of a process's batch stand among those of the whole one."""
    examples, offsets = len(whole.rows), whole.offsets.tolist()
    places = [
        torch.arange(offsets[s], offsets[s + 1])
        for k in range(2)
        for row in batch.rows
        for s in [k * examples + whole.rows.index(row)]
    ]
    return torch.cat(places)


def _length(batch: PackedBatch) -> int:
    """Tokens of the groups that are cut."""
    total = torch.tensor([batch.layout.cut.tokens])  # pyright: ignore[reportOptionalMemberAccess]
    dist.all_reduce(total)
    return int(total)
