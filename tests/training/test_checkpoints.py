"""Checkpoints: whole or not there, of one run, exact, and what a resume may change."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import make_tiny_llama
from tests.processes import check_ended, fork
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, pair_rows
from tralign_fast.training import resumable, runs
from tralign_fast.training.manifest import MANIFEST, check_manifest, read_manifest
from tralign_fast.training.runs import locked

ROOT = Path(__file__).parents[2]
SAVING: dict[str, Any] = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "ref_model_sync_steps": 2,
    "lr_scheduler_type": "constant",
}  # fmt: skip
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 4}
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 4}
PLACES: dict[str, dict[str, Any]] = {
    "resident": {"reference": "resident", **SOFT},
    "snapshot": {"reference": "snapshot", **HARD},
    "frozen": {"reference": "snapshot", "sync_ref_model": False},
    "offloaded": {"reference": "offloaded", **SOFT},
}
pytestmark = pytest.mark.filterwarnings("ignore:moved aside", "ignore:resumed with another")


def losses_of(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class StopAt(TrainerCallback):
    """Ends a run as a kill would: nothing is saved, nothing finished."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run_until(step: int, *args, **kwargs) -> None:
    trainer = make(*args, **kwargs)
    trainer.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.fixture(scope="module")
def finished(small_tokenizer, tmp_path_factory):
    """(folder, losses) of a run with checkpoints 2, 4 and 6; copy the folder before writing."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(make_tiny_llama(small_tokenizer), small_tokenizer, folder, **SAVING)
    return folder, history(trainer)


@pytest.fixture
def run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    return folder


# --- one run


def test_another_runs_checkpoints_are_neither_resumed_nor_counted(run, tiny_llama, small_tokenizer):
    extra = {**SAVING, "save_total_limit": 1}
    run_until(
        1, tiny_llama, small_tokenizer, run, **extra, overwrite_output_dir=True, seed=5
    )  # killed before its first checkpoint
    assert sorted(p.name for p in (run / "previous-1").iterdir()) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6", "run.json",
    ]  # fmt: skip
    again = make(tiny_llama, small_tokenizer, run, **extra, seed=5)
    with pytest.raises(ValueError, match="holds no whole checkpoint of its run"):
        again.train(resume_from_checkpoint=True)
    again.train()
    assert again.state.global_step == 6
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-6"]
    identity = json.loads((run / "run.json").read_text())["run"]
    assert read_manifest(run / "checkpoint-6")["run"] == identity
    assert read_manifest(run / "previous-1" / "checkpoint-6")["run"] != identity
    assert check_manifest(run / "previous-1" / "checkpoint-6")["step"] == 6


def test_a_foreign_checkpoint_is_passed_over_and_refused_by_name(
    run, finished, tiny_llama, small_tokenizer, tmp_path
):
    other = tmp_path / "other"
    history(make(tiny_llama, small_tokenizer, other, **{**SAVING, "max_steps": 2}))
    foreign = run / "checkpoint-9"
    shutil.copytree(other / "checkpoint-2", foreign)
    shutil.rmtree(run / "checkpoint-6")
    same = make(tiny_llama, small_tokenizer, run, **SAVING)
    with pytest.raises(ValueError, match="checkpoint-9 belongs to another run than"):
        same.train(resume_from_checkpoint=str(foreign))
    with pytest.warns(UserWarning, match="checkpoint-9 belongs to another run: it is passed over"):
        same.train(resume_from_checkpoint=True)
    assert losses_of(same) == finished[1]
    assert (run / "previous-1" / "checkpoint-9").is_dir()
    assert not foreign.exists()
    elsewhere = make(tiny_llama, small_tokenizer, other, **SAVING)
    with pytest.raises(ValueError, match="holds another run"):  # going on in a third run's folder
        elsewhere.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_a_run_goes_on_in_a_new_folder(run, finished, tiny_llama, small_tokenizer, tmp_path):
    moved = make(tiny_llama, small_tokenizer, tmp_path / "new", **SAVING)
    moved.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses_of(moved) == finished[1]
    assert (
        read_manifest(tmp_path / "new" / "checkpoint-6")["run"]
        == (read_manifest(run / "checkpoint-2")["run"])
    )


def test_a_branch_that_is_given_up_moves_aside(run, tiny_llama, small_tokenizer):
    """Killed on the new branch before its first checkpoint, the old one's is not taken for it."""
    trainer = make(tiny_llama, small_tokenizer, run, **SAVING, learning_rate=1e-3)
    trainer.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list((run / "previous-1").iterdir())) == 2


HOLDER = """
import sys, time
from pathlib import Path
from tralign_fast.training.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_process_in_the_folder_is_refused_until_the_first_dies(
    tiny_llama, small_tokenizer, tmp_path
):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            trainer = make(tiny_llama, small_tokenizer, tmp_path, max_steps=1)
            with pytest.raises(
                ValueError, match=rf"in use by another run \(process {holder.pid} on"
            ):
                trainer.train()
        finally:
            holder.send_signal(signal.SIGKILL)
    trainer.train()
    with locked(tmp_path):  # and this process let it go
        pass


@pytest.mark.parametrize("moment", ["before the new name", "while the old one is deleted"])
def test_a_kill_between_two_renames_loses_nothing(
    moment, run, finished, tiny_llama, small_tokenizer, monkeypatch
):
    shutil.rmtree(run / "checkpoint-6")
    trainer = make(tiny_llama, small_tokenizer, run, **SAVING, save_total_limit=1)
    real = runs._delete

    def die(folder, checkpoints):
        real(folder, [])
        if checkpoints:  # in the middle of it
            (folder / ".deleting").mkdir()
            checkpoints[0].rename(folder / ".deleting" / checkpoints[0].name)
            raise KeyboardInterrupt

    def die_at_once(*args):
        raise KeyboardInterrupt

    if moment == "before the new name":
        monkeypatch.setattr(runs, "publish", die_at_once)
        monkeypatch.setattr("tralign_fast.training.resumable.publish", die_at_once)
    else:
        monkeypatch.setattr(runs, "_delete", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    again = make(tiny_llama, small_tokenizer, run, **SAVING)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    again.add_callback(Count())
    again.train(resume_from_checkpoint=True)
    assert losses_of(again) == finished[1]
    assert steps == []  # checkpoint-6 was whole, but for its name
    assert not (run / ".writing").exists()
    assert not (run / ".deleting").exists()


# --- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "missing": lambda file: file.unlink(),
    "flipped": flip,
}
FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "reference/model.safetensors", "reference/reference.json", "reference/rounding_rng.pt",
    MANIFEST,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_is_found_by_its_name(damage, run):
    checkpoint = run / "checkpoint-6"
    assert set(read_manifest(checkpoint)["files"]) >= set(FILES) - {MANIFEST}
    for name in [*read_manifest(checkpoint)["files"], MANIFEST]:
        file = checkpoint / name
        content = file.read_bytes()
        DAMAGE[damage](file)
        with pytest.raises(ValueError, match=name) as error:
            check_manifest(checkpoint)
        assert "\n" not in str(error.value)
        file.write_bytes(content)
    check_manifest(checkpoint)


@pytest.mark.parametrize(("name", "damage"), [("optimizer.pt", "missing"), (FILES[0], "flipped")])
def test_the_older_whole_one_is_used_and_a_damaged_one_refused_by_its_path(
    name, damage, run, finished, tiny_llama, small_tokenizer
):
    DAMAGE[damage](run / "checkpoint-6" / name)
    again = make(tiny_llama, small_tokenizer, run, **SAVING, save_total_limit=1)
    with pytest.raises(ValueError, match=rf"checkpoint-6 is damaged: {name}"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    with pytest.warns(UserWarning, match=rf"damaged: {name} .*it is passed over"):
        again.train(resume_from_checkpoint=True)
    assert losses_of(again) == finished[1]
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-6"]
    check_manifest(run / "checkpoint-6")
    assert (run / "previous-1" / "checkpoint-6").is_dir()  # the damaged one


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    synced: set[int] = set()

    def publish(written: Path, *rest: Any) -> None:
        for name in (*check_manifest(written)["files"], MANIFEST, "."):
            assert (written / name).stat().st_ino in synced, name
        synced.clear()
        runs.publish(written, *rest)

    monkeypatch.setattr(resumable, "publish", publish)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **{**SAVING, "max_steps": 2})
    trainer.train()
    assert synced == {tmp_path.stat().st_ino}  # which has the name


def test_weights_alone_are_not_resumed(tiny_llama, small_tokenizer, tmp_path):
    extra = {**SAVING, "max_steps": 2, "save_only_model": True}
    history(make(tiny_llama, small_tokenizer, tmp_path, **extra))
    again = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds weights alone \(save_only_model\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("async_save", [False, True], ids=["waits", "async"])
def test_the_best_checkpoint_is_kept_and_known_by_its_name(
    async_save, tiny_llama, small_tokenizer, tmp_path
):
    trainer = make(
        tiny_llama, small_tokenizer, tmp_path, held_out=pair_rows(4), **SAVING,
        eval_strategy="steps", eval_steps=2, save_total_limit=1, load_best_model_at_end=True,
        greater_is_better=True, metric_for_best_model="eval_loss", async_save=async_save,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert len([*tmp_path.glob("checkpoint-*")]) <= 2


# --- exactness


@pytest.mark.parametrize(
    "extra",
    [
        {"optim": "adafactor"},
        {"optim": "adafactor", "gradient_release": True, "max_grad_norm": 0.0},
        {"optim": "adamw_torch", "bf16": False},
    ],
    ids=["adafactor", "adafactor-release", "adamw"],
)
def test_bf16_weights_resume_exactly(extra, small_tokenizer, tmp_path):
    model: Any = make_tiny_llama(small_tokenizer)
    model = model.to(torch.bfloat16)
    options = {**SAVING, "learning_rate": 2e-2, "gradient_release": False, **extra}
    whole = make(model, small_tokenizer, tmp_path, **options)
    expected = history(whole)
    again = make(model, small_tokenizer, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again) == expected
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (again, whole)]
    for index, state in states[1].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert states[0][index][name].dtype == value.dtype
                assert torch.equal(states[0][index][name], value)


# --- what a resume changes

REFUSED: dict[str, Any] = {
    "loss_type": "ipo", "beta": 0.5, "label_smoothing": 0.1, "length_normalized": True,
    "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 3, "ema_rounding": "nearest",
    "sync_ref_model": False, "reference": "offloaded", "seed": 7, "data_seed": 3,
    "train_sampling_strategy": "random", "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "optim": "adafactor", "max_length": 63, "fp16": True,
}  # fmt: skip
SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_objective_or_the_order_is_refused(
    name, finished, tiny_llama, small_tokenizer
):
    folder = finished[0]
    before = sorted(p.name for p in folder.iterdir())
    if name == "fp16" and not torch.cuda.is_available():
        name, value = "bf16", True
    else:
        value = REFUSED[name]
    options = {**SAVING, name: value}
    method = options.pop("loss_type", "dpo")
    changed = make(tiny_llama, small_tokenizer, folder, method, **options)
    shown = "rows of a step" if name in SHARED else name
    with pytest.raises(ValueError, match=rf"other options \(.*{shown}: .* there, .* here") as error:
        changed.train(resume_from_checkpoint=True)
    assert "start a new run from its weights" in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_another_model_or_dtype_is_refused(finished, small_tokenizer):
    model: Any = make_tiny_llama(small_tokenizer)
    models = {
        "dtype": model.to(torch.bfloat16),
        "model": make_tiny_llama(small_tokenizer, hidden_size=16),
    }
    for name, other in models.items():
        trainer = make(other, small_tokenizer, finished[0], **SAVING)
        with pytest.raises(ValueError, match=rf"other options \({name}: "):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("default:resumed with another")
def test_what_is_taken_over_holds_and_is_said(run, tiny_llama, small_tokenizer):
    changes = {
        "learning_rate": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.5, "adam_beta2": 0.9,
        "lr_scheduler_type": "linear", "max_steps": 8,
    }  # fmt: skip
    trainer = make(tiny_llama, small_tokenizer, run, **{**SAVING, **changes})
    with pytest.warns(UserWarning, match="resumed with another") as said:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    lines = [str(w.message) for w in said if "resumed with another" in str(w.message)]
    assert {line.split(":")[0].removeprefix("resumed with another ") for line in lines} == set(
        changes
    )
    assert any("learning_rate: 0.005 in" in line and "here on 0.001" in line for line in lines)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    # linear from 1e-3 to 0 over eight steps: the fifth step's rate is logged after its scheduler
    # has moved on
    assert rates[:4] == [5e-3] * 4
    assert rates[4:] == pytest.approx([1e-3 * left / 8 for left in (4, 3, 2, 1)])
    group = trainer.optimizer.param_groups[0]
    assert group["betas"][1] == 0.9
    assert group["weight_decay"] == 0.3


# --- the disk and signals


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
    small_tokenizer, tmp_path
):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ValueError, match=r"output_dir .* cannot be written"):
            make("no-such-model", small_tokenizer, folder)


def test_a_full_disk_at_the_end_says_so(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    message = r"end: the model could not be written: the weights: .* MiB are free\); make room"
    try:
        with pytest.raises(ValueError, match=message):
            trainer.save_model(str(tmp_path / "end"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / "model.safetensors").stat().st_size > 50_000


def test_a_full_disk_names_file_and_checkpoint(tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **SAVING)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                size = (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 10_000, limits[1]))

    trainer.add_callback(FillDisk())
    try:
        with pytest.raises(ValueError, match=r"checkpoint-4 could not be written: optimizer.pt"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / ".writing").iterdir())  # its room is free again
    again = make(tiny_llama, small_tokenizer, tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends(number, finished, tiny_llama, small_tokenizer, tmp_path):
    extra = {**SAVING, "save_steps": 100}

    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    trainer.add_callback(Send())
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(SystemExit) as end:
            trainer.train()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    again = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    again.train(resume_from_checkpoint=True)
    assert losses_of(again) == finished[1]


TWO = """
import dataclasses, os, signal, sys, time
from pathlib import Path
import tralign_fast.training.trainer
from benchmarks.kill import CASES, start, wait

folder = Path(sys.argv[1])
case = CASES["resident, DPO, two processes"]
case = dataclasses.replace(case, options={**case.options, "max_steps": 5000, "save_steps": 10000})
sys.stdout.reconfigure(line_buffering=True)
children = start(case, folder, resume=False)
log = folder / "log-0.txt"
while not (log.exists() and "'loss'" in log.read_text()):
    time.sleep(0.05)
os.kill(children[1], signal.SIGTERM)
assert wait(children, 120) == [143, 143]
"""


def test_a_signal_to_one_of_two_processes_ends_both_at_one_step(tmp_path):
    check_ended(fork("-c", TWO, str(tmp_path)))
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(check_manifest(checkpoint)["files"])


def test_what_nohup_ignores_stays_ignored(tiny_llama, small_tokenizer, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make(tiny_llama, small_tokenizer, tmp_path, **{**SAVING, "max_steps": 2})

        class Send(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                os.kill(os.getpid(), signal.SIGHUP)

        trainer.add_callback(Send())
        trainer.train()
        assert trainer.state.global_step == 2
    finally:
        signal.signal(signal.SIGHUP, before)


# --- a model that cannot be trained


def test_a_model_without_a_trainable_parameter_is_refused(tiny_llama, small_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llama.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    base = make_tiny_llama(small_tokenizer)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    cases = {
        "is_trainable=True to": loaded,
        r"is_trainable=True\)": folder,
        "requires_grad_": peft.PeftModel.from_pretrained(
            make_tiny_llama(small_tokenizer), tmp_path / "adapter"
        ).merge_and_unload(),
    }
    for remedy, model in cases.items():
        with pytest.raises(ValueError, match=rf"no trainable parameter: .*{remedy}"):
            make(model, small_tokenizer, tmp_path / "run", rows=[{"never": "read"}])


# --- kills


def test_killed_runs_resume_to_the_losses_of_one_that_was_not(tmp_path):
    """A sample of `python -m benchmarks.kill`."""
    command = ["-m", "benchmarks.kill", "--trials", "2", "--touches"]
    cases = ("snapshot, DPO", "resident, DPO, bf16 Adafactor, release")
    for case in cases:
        command += ["--case", case]
    done = fork(*command, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "2 trials, " in done.stdout
    assert ", 0 faults" in done.stdout
