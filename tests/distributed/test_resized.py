"""Runs that go on with another number of processes, in real ones (gloo), and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.distributed import DistributedConfig

from tests.distributed.resized_run import CASES, STEPS, trained
from tests.processes import check_ended, launch
from tests.training.tensor_parallel_run import save_models
from tests.training.test_trainer import make
from tests.training.test_trl_parity import kto_rows
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.distributed.resized import check_shares
from tralign_fast.reference.snapshot import SnapshotReference
from tralign_fast.reference.trust_region import TrustRegion

FSDP2 = ("dpo-snapshot", "dpo-offloaded", "dpo-resident", "kto-resident", "kto-snapshot")
pytestmark = pytest.mark.filterwarnings("ignore:a step of", "ignore:moved aside")


def run(count: int, kind: str, source: Path | None, step: int, into: Path, cases) -> Any:
    asked = (kind, str(source), str(step), str(into), *cases)
    return launch("tests.distributed.resized_run", count, *asked)


def processes(*args) -> None:
    check_ended(run(*args))


def found(folder: Path, case: str) -> dict[str, list[float]]:
    return json.loads((folder / case / "losses.json").read_text())


def check_same(now: dict[str, list[float]], before: dict[str, list[float]]) -> None:
    assert len(now["losses"]) == STEPS
    assert now["losses"] == pytest.approx(before["losses"], rel=1e-5)
    assert now["tokens"] == before["tokens"]
    assert now["evaluated"] == pytest.approx(before["evaluated"], rel=1e-5)
    assert len({*now["losses"]}) > STEPS // 2


SHRINKING = [
    ("ddp", "ddp", tuple(CASES)),
    ("fsdp2", "fsdp2", (*FSDP2, "dpo-lora-snapshot")),
    ("fsdp2-shards", "fsdp2-shards", (*FSDP2, "dpo-lora-snapshot")),
    ("fsdp2-shards", "fsdp2", FSDP2),
    ("ddp", "fsdp2-shards", FSDP2),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "then", "cases"), SHRINKING)
def test_four_processes_then_two_then_one(kind, then, cases, tmp_path):
    """Both leave in mid-window; the last one keeps weights whole."""
    processes(4, kind, None, 0, tmp_path / "4", cases)
    processes(2, then, tmp_path / "4", 3, tmp_path / "2", cases)
    for case in cases:
        whole = found(tmp_path / "4", case)
        check_same(found(tmp_path / "2", case), whole)
        checkpoint = str(tmp_path / "2" / case / "checkpoint-6")
        check_same(trained(case, tmp_path / "1", checkpoint, 1), whole)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-shards"])
def test_one_process_then_two_then_four(kind, tmp_path):
    cases = ("dpo-snapshot", "dpo-offloaded", "dpo-resident", "dpo-grouped")
    whole = {case: trained(case, tmp_path / "1", None, 1) for case in cases}
    processes(2, kind, tmp_path / "1", 3, tmp_path / "2", cases)
    processes(4, kind, tmp_path / "2", 6, tmp_path / "4", cases)
    for case in cases:
        check_same(found(tmp_path / "2", case), whole[case])
        check_same(found(tmp_path / "4", case), whole[case])


TENSOR_CASES = ("dpo-resident", "dpo-snapshot", "kto-offloaded")
# processes and layout that write a checkpoint, and that go on from it
TENSOR = [
    ((2, "tp2"), (2, "fsdp2"), ("dpo-resident", "dpo-snapshot", "dpo-tied")),
    ((2, "tp2"), (2, "fsdp2-shards"), ("dpo-resident", "dpo-snapshot")),
    ((4, "tp2-fsdp2"), (2, "ddp"), TENSOR_CASES),
    ((4, "tp2-fsdp2"), (2, "tp2"), TENSOR_CASES),
    ((2, "ddp"), (2, "tp2"), (*TENSOR_CASES, "dpo-uneven", "dpo-tied")),
    ((2, "ddp"), (4, "tp2-fsdp2"), TENSOR_CASES),
    ((2, "fsdp2"), (2, "tp2"), TENSOR_CASES),
    ((2, "fsdp2-shards"), (4, "tp2-fsdp2"), TENSOR_CASES),
]
needs_dtensors = pytest.mark.skipif(
    not hasattr(DistributedConfig, "tp_size"), reason="transformers before 5.17 has no DTensors"
)


@needs_dtensors
@pytest.mark.matrix
@pytest.mark.parametrize(("first", "then", "cases"), TENSOR)
def test_shared_layers_go_on_otherwise(first, then, cases, tmp_path):
    """Both leave in mid-window, and one process goes on from what the second one wrote."""
    save_models(tmp_path)
    processes(*first, None, 0, tmp_path / "first", cases)
    processes(*then, tmp_path / "first", 3, tmp_path / "then", cases)
    for case in cases:
        whole = found(tmp_path / "first", case)
        check_same(found(tmp_path / "then", case), whole)
        checkpoint = str(tmp_path / "then" / case / "checkpoint-6")
        check_same(trained(case, tmp_path / "1", checkpoint, 1), whole)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ((4, "fsdp2"), "reference/model.shards/__3_0.distcp"),
        pytest.param((2, "tp2"), "optimizer_0/__1_0.distcp", marks=needs_dtensors),
    ],
)
def test_a_missing_shard_ends_all_with_its_name(layout, name, tmp_path):
    save_models(tmp_path)
    processes(*layout, None, 0, tmp_path / "4", ["dpo-resident"])
    (tmp_path / "4" / "dpo-resident" / "checkpoint-3" / name).unlink()
    ended = run(2, layout[1], tmp_path / "4", 3, tmp_path / "2", ["dpo-resident"])
    assert ended.returncode != 0
    said = re.findall(r"ValueError: .*", ended.stderr)
    assert len(said) == 2
    assert len({*said}) == 1
    assert said[0].endswith(f"checkpoint-3 is damaged: {name} is missing")


# --- what is refused

SAVED = {
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "world_size": 4, "rows_of_step": 8,
    "sharding": "none", "lenders": None, "filled": True, "grouped": False, "by_file": False,
    "uneven": False,
}  # fmt: skip
PRESENT = {**SAVED, "train_batch_size": 2, "world_size": 2}


def test_processes_that_share_layers_count_once():
    shared = {**SAVED, "train_batch_size": 2, "sharding": "tensor parallelism of 2"}
    refused, line = check_shares(shared, PRESENT)
    assert refused == []
    assert line is not None
    assert line.startswith(
        "4 processes of tensor parallelism of 2 / 2 with the same rows x "
        "per_device_train_batch_size 2 x gradient_accumulation_steps 2 = 8 there, from here on 2 "
    )


def test_as_many_rows_of_a_step_go_on_with_one_line():
    refused, line = check_shares(SAVED, PRESENT)
    assert refused == []
    assert line == (
        "4 processes x per_device_train_batch_size 1 x gradient_accumulation_steps 2 = 8 there, "
        "from here on 2 processes x per_device_train_batch_size 2 x "
        "gradient_accumulation_steps 2 = 8"
    )
    assert check_shares(SAVED, SAVED) == ([], None)
    assert check_shares({}, PRESENT) == ([], None)  # of an older version, which told otherwise


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            {}, {"world_size": 3, "rows_of_step": 12},
            "rows of a step: 4 processes x .* = 8 there, 3 processes x .* = 12 here",
        ),
        (
            {"lenders": 1}, {"gradient_accumulation_steps": 1, "train_batch_size": 4},
            "KTO's KL term is a mean over",
        ),
        ({"lenders": 3}, {}, "among 3 of a process there, per_device_train_batch_size 2 here"),
        ({"sharding": "DeepSpeed"}, {"sharding": "DeepSpeed"}, "DeepSpeed wrote: 4 there, 2 here"),
        ({"sharding": "DeepSpeed"}, {"sharding": "FSDP2"}, "sharding: DeepSpeed there, FSDP2 here"),
        ({"by_file": True}, {}, "a stream's files are dealt out to: 4 there, 2 here"),
        ({}, {"train_sampling_strategy": "batch_rebalance"}, "what batch_rebalance deals"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_is_named_with_the_numbers(there, here, message):
    refused, _ = check_shares({**SAVED, **there}, {**PRESENT, **here})
    assert any(re.search(message, text) for text in refused), refused


@pytest.mark.parametrize(
    ("there", "here", "differs"),
    [
        ({"grouped": True}, {}, "a mean over a process's batch"),
        ({"uneven": True, "filled": False}, {}, "the last step of an epoch"),
        (
            {"uneven": True}, {"gradient_accumulation_steps": 1, "train_batch_size": 4},
            "the last step of an epoch",
        ),
        ({"uneven": True}, {}, None),
        ({"uneven": True}, {"world_size": 1, "train_batch_size": 4}, None),
    ],
)  # fmt: skip
def test_what_changes_the_losses_is_said(there, here, differs):
    line = check_shares({**SAVED, **there}, {**PRESENT, **here})[1]
    assert line is not None
    assert ("losses differ" in line) == (differs is not None)
    assert differs is None or differs in line


# --- the parts


def test_rows_lend_in_the_groups_of_the_first_processes():
    rows = [
        {"prompt_ids": [1], "completion_ids": [i], "label": True, "borrowed_ids": [i + 100]}
        for i in range(2, 8)
    ]
    lent = PreferenceCollator(paired=False, lenders=2)._lent(
        rows, [row["completion_ids"] for row in rows], tuple(range(6))
    )
    assert lent == [[3], [2], [5], [4], [7], [6]]
    alone = PreferenceCollator(paired=False, lenders=5)._lent(
        rows, [row["completion_ids"] for row in rows], tuple(range(6))
    )
    assert alone == [[6], [2], [3], [4], [5], [107]]


def test_a_window_knows_sequences_of_other_batches(tmp_path, tiny_llama, small_tokenizer):
    """A run with twice the batch in half the passes finds every score of a snapshot's window."""
    rows = Dataset.from_list(kto_rows(32).to_list())
    extra = {
        "reference": "snapshot", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4,
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    dpo = make(tiny_llama, small_tokenizer, tmp_path, **extra, gradient_accumulation_steps=2)
    dpo.train()
    expected = [log["loss"] for log in dpo.state.log_history if "loss" in log]
    again = make(
        tiny_llama, small_tokenizer, tmp_path, **extra, per_device_train_batch_size=8
    )  # fmt: skip
    with pytest.warns(UserWarning, match="dealt out anew: 1 process x per_device"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected, rel=1e-5)
    kto = make(
        tiny_llama, small_tokenizer, tmp_path / "kto", "kto", rows, **extra,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    kto.train()
    other = make(
        tiny_llama, small_tokenizer, tmp_path / "kto", "kto", rows, **extra,
        per_device_train_batch_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="rows that KTO's KL term is a mean over"):
        other.train(resume_from_checkpoint=True)


def test_scores_of_a_window_end_with_it(tiny_llama):
    reference = SnapshotReference(tiny_llama, TrustRegion(1.0, 4))
    reference._sequences.add([5], [0.5])
    batch = type("Batch", (), {"keys": (5, 5), "scored_lengths": (1, 1)})()
    assert torch.equal(reference._of_sequences(batch), torch.tensor([0.5, 0.5]))  # pyright: ignore[reportArgumentType]
    reference.sync()
    assert reference._of_sequences(batch) is None  # pyright: ignore[reportArgumentType]
