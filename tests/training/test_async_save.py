"""Checkpoints that are written while training goes on: the same ones, whole or not there."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import TrainerCallback

from tests.conftest import make_tiny_llama
from tests.training.test_checkpoints import SAVING, StopAt, losses_of
from tests.training.test_trainer import make
from tralign_fast.distributed.background import Background
from tralign_fast.reference import shard_files
from tralign_fast.reference.writes import write
from tralign_fast.training import resumable
from tralign_fast.training.manifest import check_manifest
from tralign_fast.training.runs import newest_checkpoint

ASYNC: dict[str, Any] = {**SAVING, "async_save": True}
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 4}
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4}
PLACES = {
    "resident": {"reference": "resident", **SOFT},
    "snapshot": {"reference": "snapshot", **HARD},
    "offloaded": {"reference": "offloaded", **SOFT},
    "adapter": {"reference": "adapter", **SOFT},
}
pytestmark = pytest.mark.filterwarnings("ignore:moved aside")


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


class At(TrainerCallback):
    """Does something before the step after `step`."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def held(monkeypatch):
    """An event without which no checkpoint of step 4 gets its manifest."""
    go_on, write = threading.Event(), resumable.write_manifest

    def write_held(folder: Path, facts: dict[str, Any]) -> None:
        assert facts["step"] != 4 or go_on.wait(60)
        write(folder, facts)

    monkeypatch.setattr(resumable, "write_manifest", write_held)
    yield go_on
    go_on.set()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_save_has_its_own_values_in_the_same_buffers(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    background, weight, written = Background(), torch.ones(1000, device=device), []
    for step in range(3):
        with background.collecting():
            write(lambda content, group: written.append(content), {"weight": weight, "step": step})
        address = written[0]["weight"].data_ptr() if written else None
        weight += 1  # training goes on
        background.start(lambda: None)
        assert background.wait()
        assert written[-1]["step"] == step
        assert written[-1]["weight"].tolist() == [1.0 + step] * 1000
        assert address in (None, written[-1]["weight"].data_ptr())
        assert written[-1]["weight"].is_pinned() is torch.cuda.is_available()
    background.close()


@pytest.mark.parametrize(
    "place",
    ["offloaded", *(pytest.param(p, marks=pytest.mark.matrix) for p in PLACES if p != "offloaded")],
)
def test_files_are_those_of_a_run_that_waits_for_them(place, small_tokenizer, tmp_path):
    manifests, losses = [], []
    for name, saving in (("waits", SAVING), ("not", ASYNC)):
        policy: Any = make_tiny_llama(small_tokenizer)
        if place == "adapter":
            torch.manual_seed(0)
            policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
        trainer = make(policy, small_tokenizer, tmp_path / name, **{**saving, **PLACES[place]})
        trainer.train()
        losses.append(losses_of(trainer))
        assert steps_of(tmp_path / name) == [2, 4, 6]
        manifests.append(check_manifest(tmp_path / name / "checkpoint-4")["files"])
    assert losses[0] == losses[1]
    assert manifests[0].keys() == manifests[1].keys()
    # with the option, with times, and with metadata that safetensors writes in any order
    own = {"training_args.bin", "trainer_state.json", "reference/window.safetensors"}
    differ = {name for name, value in manifests[0].items() if manifests[1][name] != value}
    assert differ <= own


def test_training_goes_on_meanwhile_and_the_checkpoint_is_not_there(
    held, tiny_llama, small_tokenizer, tmp_path
):
    seen = []

    def look() -> None:
        seen.append((steps_of(tmp_path), newest_checkpoint(str(tmp_path)).name))
        held.set()

    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    trainer.add_callback(At(5, look))
    trainer.train()
    assert seen == [([2], "checkpoint-2")]
    assert steps_of(tmp_path) == [2, 4, 6]


def test_a_kill_in_mid_write_goes_on_from_the_one_before(
    held, tiny_llama, small_tokenizer, tmp_path
):
    left = tmp_path / "left"

    def copy() -> None:  # what a kill at this moment leaves on the disk
        assert any((tmp_path / "run" / ".writing" / "checkpoint-4").iterdir())
        shutil.copytree(tmp_path / "run", left)
        held.set()

    trainer = make(tiny_llama, small_tokenizer, tmp_path / "run", **ASYNC)
    trainer.add_callback(At(5, copy))
    trainer.train()
    again = make(tiny_llama, small_tokenizer, left, **ASYNC)
    again.add_callback(At(2, lambda: losses.append("resumed")))
    losses: list[Any] = []
    again.train(resume_from_checkpoint="auto")
    assert losses == ["resumed"]
    assert losses_of(again) == losses_of(trainer)
    assert not (left / ".writing").exists()


def test_an_error_leaves_the_last_one_whole(held, tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    trainer.add_callback(At(5, lambda: threading.Timer(0.3, held.set).start()))
    trainer.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps_of(tmp_path) == [2, 4]
    check_manifest(tmp_path / "checkpoint-4")
    assert trainer._background is None


def test_what_cannot_be_written_ends_the_run_at_the_next_save(
    monkeypatch, tiny_llama, small_tokenizer, tmp_path
):
    save = torch.save

    def fail(content: Any, path: Any, *args: Any, **options: Any) -> None:
        if Path(path).name == "optimizer.pt" and "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(content, path, *args, **options)

    monkeypatch.setattr(torch, "save", fail)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    message = r"checkpoint-4 could not be written: optimizer.pt: .* checkpoints before it are whole"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 6
    assert steps_of(tmp_path) == [2]
    assert not (tmp_path / ".writing" / "checkpoint-4").exists()


def test_the_file_that_failed_is_named_though_others_would_come_after_it(
    monkeypatch, tiny_llama, small_tokenizer, tmp_path
):
    def fail(tensors: Any, path: Any) -> None:
        Path(path).write_bytes(b"a part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(shard_files, "save_file", fail)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    with pytest.raises(ValueError, match=r"could not be written: model\.safetensors: Error"):
        trainer.train()


def test_a_signal_waits_for_its_checkpoint(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    trainer.add_callback(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 128 + signal.SIGTERM
    assert steps_of(tmp_path) == [2, 4, 5]
    check_manifest(tmp_path / "checkpoint-5")


def test_a_checkpoint_is_pushed_once_it_has_its_name(
    held, monkeypatch, tiny_llama, small_tokenizer, tmp_path
):
    pushed = []

    def push(self: Any, folder: str) -> None:
        pushed.append((Path(folder).name, check_manifest(Path(folder))["step"]))

    monkeypatch.setattr(resumable.Trainer, "_push_from_checkpoint", push)
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    trainer.args.push_to_hub = True
    trainer.add_callback(At(5, held.set))
    trainer.train()
    assert pushed == [("checkpoint-2", 2), ("checkpoint-4", 4), ("checkpoint-6", 6)]


def test_it_is_refused_beside_deepspeed(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **ASYNC)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="async_save=True: DeepSpeed's engine"):
        trainer.train()
