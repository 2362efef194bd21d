"""`transformers.Trainer` whose checkpoints are whole or not there, and belong to one run.

transformers writes a checkpoint file by file into its final folder, takes the folder with the
highest number for the newest one, and starts a fresh optimizer where its file is missing. Here it
is written into `.writing/`, gets a manifest when every process has written its part, and then its
name. What that costs: the files are read once for their checksums, and flushed to the disk. With
`async_save` all of that is done in the background, from a copy on the host.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, has_length

from tralign_fast.data.tokenization import lend_in_groups
from tralign_fast.distributed import other_layout, shards_on_disk
from tralign_fast.distributed.alike import check_rows
from tralign_fast.distributed.background import Background
from tralign_fast.distributed.optimizer_state import (
    follow_schedule,
    kept_options,
    load_exactly,
)
from tralign_fast.distributed.resized import deal_batches, processes_with_rows, shares_of
from tralign_fast.distributed.tensor_parallel import (
    is_sharded_by_transformers,
    sharing_processes,
)
from tralign_fast.model.converted import read_unmatched
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.sharding import reshard
from tralign_fast.reference.writes import write, writes_later
from tralign_fast.training.manifest import write_manifest
from tralign_fast.training.resume import (
    check_options,
    model_facts,
    place_in_stream,
    recorded_options,
)
from tralign_fast.training.runs import WRITING, OpenedRun, locked, open_run, publish, run_in
from tralign_fast.training.signals import StopOnSignal
from tralign_fast.training.some_steps import SomeSteps, check_batches

REFERENCE_FOLDER = "reference"
_WRITE_ERRORS = (OSError, SafetensorError)


class ResumableTrainer(Trainer):
    """Runs, checkpoints and resumes of a trainer that has a `reference`.

    `train` also ends on SIGTERM and SIGHUP, with a checkpoint and exit code 128 + signal, in a run
    that saves any.
    """

    reference: ReferencePolicy
    _run = OpenedRun("", None, {})
    _pushed: str | None = None
    _writes = False
    _facts: dict[str, Any] | None = None
    _read_from = ""  # the checkpoint that weights are read from
    _background: Background | None = None
    _started: tuple[Path, Path]  # where the last checkpoint is written, and where it belongs

    def __init__(self, model: Any, args: Any, **options: Any) -> None:
        only_model = args.save_only_model
        # transformers refuses to save the optimizer of a model that it has cut up itself
        args.save_only_model = only_model or is_sharded_by_transformers(model)
        try:
            super().__init__(model=model, args=args, **options)
        finally:
            args.save_only_model = only_model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains, or goes on from a checkpoint.

        Args:
            resume_from_checkpoint: True: the newest whole checkpoint of the run in `output_dir`;
                "auto": the same if there is one, else a run starts; or a checkpoint's folder. What
                may differ from the run that wrote it: `resume.py`. Processes that torchrun has
                started again (`--max-restarts`) go on from the newest one of their run.

        Raises:
            ValueError: the folder holds another run or is in use; there is nothing whole to resume
                from; options differ that a resume cannot change; the disk is full.
        """
        folder = Path(self.args.output_dir or ".")
        saves = self.args.save_strategy != SaveStrategy.NO
        signals = self._signals()
        check_rows(self.train_dataset, self.reference.run.get("data"))
        with contextlib.ExitStack() as stack:
            options = self._options()
            self._run = self._on_main(
                lambda: self._open(stack, folder, resume_from_checkpoint, options)
            )
            self.reference.folder = folder
            self._deal_out()
            if self._run.checkpoint is None:
                self.reference.restart()
            stack.enter_context(signals.listening(saves))
            stack.enter_context(self._in_background())
            output = super().train(self._run.checkpoint, *args, **kwargs)
        if signals.received is not None:
            last = f"checkpoint-{self.state.global_step}"
            self.accelerator.print(
                f"signal {signals.received}: stopped after step {self.state.global_step}; "
                f"go on from {folder / last} with resume_from_checkpoint=True",
                file=sys.stderr,
            )
            raise SystemExit(128 + signals.received)
        if self._run.facts.get("step") == self.state.global_step >= self.state.max_steps:
            self.accelerator.print(
                f"{self._run.checkpoint} is the end of its run: nothing was left to train",
                file=sys.stderr,
            )
        return output

    def _open(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        resume: str | bool | None,
        options: dict[str, Any],
    ) -> OpenedRun:
        stack.enter_context(locked(folder))
        again = self._run.identity != "" and run_in(folder) == self._run.identity
        overwrite = getattr(self.args, "overwrite_output_dir", False)
        return open_run(
            folder, resume, overwrite=overwrite or again,
            check=lambda checkpoint, facts: check_options(facts["options"], options, checkpoint),
        )  # fmt: skip

    def _on_main(self, action: Any) -> Any:
        """What `action` returns or raises in the main process, in all of them."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                if self.args.world_size == 1:
                    raise
                outcome[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def _signals(self) -> StopOnSignal:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StopOnSignal):
                return callback
        callback = StopOnSignal()
        for added in (_EndInTime(), _CountOnce(), callback, SomeSteps()):
            self.add_callback(added)
        return callback

    def _options(self) -> dict[str, Any]:
        if self._facts is None:  # before anything shards or wraps the model
            assert self.model is not None
            self._facts = {**model_facts(self.model), **self.reference.run}
        recorded = recorded_options(self.args, self.reference.name, self._facts)
        return {**recorded, **shares_of(self, self._run.facts.get("options", {}))}

    def _deal_out(self) -> None:
        """A run that began with other processes lends completions as it did there."""
        lenders = self._run.facts.get("options", {}).get("lenders")
        collator: Any = self.data_collator
        if hasattr(collator, "lenders"):
            collator.lenders = lenders
        if lenders not in (None, self.args.train_batch_size) and self.eval_dataset is not None:
            sets: Any = self.eval_dataset
            if isinstance(sets, dict):
                self.eval_dataset = {k: lend_in_groups(d, lenders) for k, d in sets.items()}
            else:
                self.eval_dataset = lend_in_groups(sets, lenders)

    def get_train_dataloader(self) -> Any:
        filled = self._run.facts.get("options", {}).get("filled", False)
        loader = super().get_train_dataloader()
        check_batches(loader, self.args)
        return deal_batches(loader, filled and processes_with_rows(self) == 1)

    # --- writing ----------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / WRITING) if self._writes else folder

    def _save_checkpoint(self, model, trial) -> None:
        self._await_writing()
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        written = run / WRITING / name
        later = self._background
        try:
            if self.args.should_save:
                shutil.rmtree(run / WRITING, ignore_errors=True)
                written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with self._writing(), later.collecting() if later else contextlib.nullcontext():
                if not self.args.save_only_model:
                    self.reference.save(written / REFERENCE_FOLDER)
                with self._tokens_of_all():
                    super()._save_checkpoint(model, trial)
            make_whole = self._finishing(written, run)
            self._started = (written, run / name)
            if later is not None:
                later.start(make_whole)
                return
            self.accelerator.wait_for_everyone()
            make_whole()
        except (*_WRITE_ERRORS, RuntimeError) as error:
            raise _write_error(error, written, run / name) from error
        self.accelerator.wait_for_everyone()
        self._push()

    def _finishing(self, written: Path, run: Path) -> Callable[[], None]:
        """What makes a checkpoint whole, once all have written it; what it needs of the run is read
        here."""
        best = self.state.best_model_checkpoint == str(written)
        if best:
            self.state.best_model_checkpoint = str(run / written.name)
        if not self.args.should_save:
            return lambda: None
        if best:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        facts = {
            "run": self._run.identity,
            "step": self.state.global_step,
            "resumable": not self.args.save_only_model,
            "options": self._options(),
        }
        keep, stays = self.args.save_total_limit, self.state.best_model_checkpoint

        def finish() -> None:
            write_manifest(written, facts)
            publish(written, run, keep, stays)

        return finish

    def _push(self) -> None:
        if self._pushed is not None:
            self._pushed = None
            super()._push_from_checkpoint(str(self._started[1]))

    def _await_writing(self) -> None:
        """Waits for the checkpoint that is written in the background, if one is.

        Raises:
            ValueError: it could not be written.
        """
        try:
            waited = self._background is not None and self._background.wait()
        except (*_WRITE_ERRORS, RuntimeError) as error:
            raise _write_error(error, *self._started) from error
        if waited:
            self._push()

    @contextlib.contextmanager
    def _in_background(self) -> Iterator[None]:
        """Inside, checkpoints are written while training goes on, if `async_save` asks for it; at
        the end, however it comes, the last one is whole."""
        if not getattr(self.args, "async_save", False):
            yield
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "async_save=True: DeepSpeed's engine writes its checkpoints itself: set it to "
                "False, or use FSDP2"
            )
        self._background = Background()
        try:
            yield
            self._await_writing()
        except BaseException:
            with contextlib.suppress(Exception):  # the one that ended the run is told
                self._background.wait()
            raise
        finally:
            self._background.close()
            self._background = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._writes = True
        try:
            yield
        finally:
            self._writes = False

    @contextlib.contextmanager
    def _tokens_of_all(self) -> Iterator[None]:
        """Inside, the state counts tokens of all processes: it is the first one's that is saved.
        Those that share layers see the same ones."""
        own = self.state.num_input_tokens_seen
        count = torch.tensor(own, device=self.args.device)
        of_all = int(self.accelerator.reduce(count, reduction="sum"))  # pyright: ignore[reportArgumentType]
        self.state.num_input_tokens_seen = of_all // sharing_processes(self.model)
        try:
            yield
        finally:
            self.state.num_input_tokens_seen = own

    def _writes_later(self) -> bool:
        """Whether weights and optimizer are written in the background: an adapter is small."""
        return writes_later() and not hasattr(self.model, "peft_config")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # transformers gathers what it has cut up itself as it saves
        if not self._writes_later() or is_sharded_by_transformers(self.model):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            assert self.model is not None
            save = super()._save
            held = self.model.state_dict() if state_dict is None else state_dict
            write(lambda state, group: save(output_dir, state_dict=state), held)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        optimizer: Any = self.optimizer
        assert self.model is not None
        if is_sharded_by_transformers(self.model):
            shards_on_disk.save_optimizer(self.model, optimizer, folder)
        elif not self._writes_later():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        elif self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            whole = plugin.state_dict_type.name == "FULL_STATE_DICT"
            shards_on_disk.save_fsdp(self.model, optimizer, folder, whole)
        elif self.args.should_save:
            path = folder / OPTIMIZER_NAME
            write(lambda state, group: torch.save(state, path), optimizer.state_dict())
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._pushed = checkpoint_folder  # when it has its name

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        reshard(self.model)  # an evaluation leaves the head's weights gathered, under other names
        try:
            super().save_model(output_dir, _internal_call)
        except (*_WRITE_ERRORS, RuntimeError) as error:
            folder = Path(output_dir or self.args.output_dir or ".")
            fault = None if _internal_call else _fault_of_disk(error, folder)
            if fault is None:
                raise
            raise ValueError(
                f"{folder}: the model could not be written: {fault}; make room and save it again "
                "(save_model), or take the run's last checkpoint"
            ) from error
        joins = is_sharded_by_transformers(self.model) and not self.args.should_save
        if joins and not hasattr(self, "is_distributed_loading_by_transformers"):
            # the other processes have to send their parts, which transformers before 5.24 forgets
            model: Any = self.model
            model.save_pretrained(output_dir or self.args.output_dir, is_main_process=False)

    # --- reading ----------------------------------------------------------------------------------

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begun = super()._init_training_state(*args, **kwargs)
        steps = self._run.facts.get("options", {}).get("max_steps", 0)
        sized = has_length(self.train_dataset)
        if self._run.checkpoint is None or sized or steps <= 0 or self.args.ignore_data_skip:
            return begun
        epochs, done = place_in_stream(self.state.epoch or 0.0, steps)
        return epochs, done * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.reference.load(Path(resume_from_checkpoint) / REFERENCE_FOLDER)
        self._read_from = resume_from_checkpoint
        if not self._read_weights():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of this process; of another one where the checkpoint has fewer: a run starts with the
        same state in all."""
        saved = self._run.facts.get("options", {}).get("world_size", self.args.world_size)
        if checkpoint is None or saved == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        source = Path(checkpoint).absolute() / _rng_file(self.args.process_index % saved, saved)
        with tempfile.TemporaryDirectory() as folder:
            name = _rng_file(self.args.process_index, self.args.world_size)
            (Path(folder) / name).symlink_to(source)
            super()._load_rng_state(folder)

    def _load_best_model(self) -> None:
        self._await_writing()
        self._read_from = self.state.best_model_checkpoint or ""
        if not self._read_weights():
            super()._load_best_model()

    def _read_weights(self) -> bool:
        """Reads weights that transformers would not: those of a model that it has cut up, or of a
        checkpoint of another layout. False: there was nothing to do."""
        assert self.model is not None
        folder = Path(self._read_from)
        if other_layout.is_own_layout(self, folder):
            return False
        reshard(self.model)  # a forward without backward leaves the head's weights gathered
        other_layout.load_weights(self, folder)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        assert self.model is not None
        if not read_unmatched(self.model, self._read_from, load_result.missing_keys):
            super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", []))
        if self.is_deepspeed_enabled:  # its engine has loaded weights and optimizer
            self.reference.load(folder / REFERENCE_FOLDER)
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not other_layout.is_own_layout(self, folder, optimizer=True):
            other_layout.load_optimizer(self, folder)
        elif self.is_fsdp_enabled:
            with kept_options(self.optimizer):
                super()._load_optimizer_and_scheduler(checkpoint)
        else:
            # on the host: the optimizer takes it to its parameters' devices, state by state
            on_host = self.args.device.type == "cpu"
            state = torch.load(
                folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=not on_host
            )
            load_exactly(self.optimizer, state)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        follow_schedule(self.optimizer, self.lr_scheduler, base_lrs)


class _EndInTime(TrainerCallback):
    """Lets a run that is resumed at its end end there: transformers takes one more step if that is
    inside an epoch."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:  # a checkpoint is written while these are set
            control.should_log = control.should_evaluate = control.should_save = False

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_training_stop = True


class _CountOnce(TrainerCallback):
    """A checkpoint counts tokens of all processes: from there on the first one has that count."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        first = state.is_world_process_zero
        state.num_input_tokens_seen *= sharing_processes(model) if first else 0
        state.train_batch_size = args.train_batch_size  # not that of the checkpoint's processes


def _rng_file(process: int, processes: int) -> str:
    return "rng_state.pth" if processes == 1 else f"rng_state_{process}.pth"


def _write_error(error: BaseException, written: Path, final: Path) -> BaseException:
    """One line with the file's name; the error itself if it is not of the disk."""
    fault = _fault_of_disk(error, written)
    if fault is None:
        return error
    shutil.rmtree(written, ignore_errors=True)  # room for those that are whole
    return ValueError(f"{final} could not be written: {fault}; checkpoints before it are whole")


def _fault_of_disk(error: BaseException, folder: Path) -> str | None:
    """Which file of `folder` could not be written, and why; None: the error is not of the disk."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    of_torch = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    if not isinstance(error, _WRITE_ERRORS) and not of_torch:
        return None
    weights = isinstance(error, SafetensorError)  # which leaves nothing of the file behind
    pattern = "*.safetensors" if weights else "*"
    files = [f for f in folder.rglob(pattern) if f.is_file()] if folder.exists() else []
    name = getattr(error, "filename", None) or ("the weights" if weights else None)
    if files and getattr(error, "filename", None) is None:
        # a tick of the clock may hold several files: of those the one that took the room
        name = max(files, key=lambda file: (file.stat().st_mtime_ns, file.stat().st_size))
    here = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    free = shutil.disk_usage(here).free / 2**20
    return f"{Path(name).name if name else 'its folder'}: {text} ({free:.0f} MiB are free)"
