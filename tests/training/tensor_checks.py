"""What processes that share layers send in a forward and backward, without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.data.test_pieces import rows_of
from tests.training.traffic import Traffic
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import token_logps_and_statistics

SIZES = ((9, 4, 5), (7, 3, 3))


def measured(folder: Path) -> dict[str, Any]:
    """Bytes of all-reduces on the packed rows of a batch: the model as transformers cuts it up, and
    its log-probs by this library, with and without gradient checkpointing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
    model.train()
    rows = rows_of(*SIZES)
    for row in rows:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            row[name] = [token % 50 for token in row[name]]
    (batch,) = PreferenceCollator(paired=True)(rows).parts
    assert batch.layout is not None
    found: dict[str, Any] = {
        "row": model.config.hidden_size * 4,  # bytes of a token's hidden state, fp32
        "tokens": batch.input_ids.numel(),
        "last": len(batch.layout.scored_rows(batch.input_ids.device)),  # of the last MLP
        "scored": len(batch.targets),
        "layers": model.config.num_hidden_layers,
        "embeddings": _is_cut(model.get_input_embeddings().weight),
        "theirs": _step(lambda: model.model(input_ids=batch.input_ids).last_hidden_state),
    }
    assert prepare_model(model).packs
    found["plain"] = _step(lambda: token_logps_and_statistics(model, batch, ())[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointing"] = _step(lambda: token_logps_and_statistics(model, batch, ())[0])
    return {"shared": found}


def _is_cut(weight: Any) -> bool:
    """Newer releases of transformers cut the embeddings along the vocabulary."""
    return isinstance(weight, DTensor) and any(p.is_shard() for p in weight.placements)


def _step(forward: Any) -> dict[str, int]:
    with Traffic() as forth:
        output = forward()
    with Traffic() as back:
        output.sum().backward()
    assert {*forth.of("step"), *back.of("step")} == {"all-reduce"}
    return {"forward": forth.of("step")["all-reduce"], "backward": back.of("step")["all-reduce"]}
