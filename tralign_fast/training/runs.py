"""The folder of a run: one run at a time in it, and every checkpoint belongs to one run.

A run gets an identity when it starts (`run.json`), and each of its checkpoints carries it. What is
another run's, of a branch that was given up, or damaged, is moved aside into `previous-<n>/`, so
that it is neither resumed nor counted, and nothing is lost.

| started with                    | in a folder with checkpoints of                                |
|---------------------------------|----------------------------------------------------------------|
| no resume                       | any run: refused; with `overwrite_output_dir` moved aside      |
| `resume_from_checkpoint=True`   | this run: the newest whole one; all that is newer moves aside  |
|                                 | another run: passed over, moves aside                          |
| "auto", and a restart           | the newest whole one if there is any, else as without resume   |
| of torchrun's                   |                                                                |
| a path inside the folder        | this run: that one, newer ones move aside; another's: refused  |
| a path elsewhere                | the same run: as inside; none: the run goes on in this folder; |
|                                 | another: refused; with `overwrite_output_dir` moved aside      |
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from tralign_fast.distributed.elastic import launch, restarts
from tralign_fast.ops.backend import warn_once
from tralign_fast.training.manifest import (
    check_manifest,
    read_manifest,
    sync_folder,
    write_durably,
)

RUN_FILE = "run.json"
WRITING = ".writing"  # a checkpoint lies here until it is whole
_DELETING = ".deleting"  # … and here once it does not count
_LOCK = ".run.lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# by these another run is known; the second line goes where they go
_TRACES = ("checkpoint-*", "model*.safetensors", "adapter_model.safetensors", "summary.json")
_COMPANIONS = (
    RUN_FILE, "model*.safetensors.index.json", "adapter_config.json", "trainer_state.json",
    "training_args.bin",
)  # fmt: skip


class OpenedRun(NamedTuple):
    """What a run starts from."""

    identity: str
    checkpoint: str | None
    facts: dict[str, Any]  # of the checkpoint's manifest


def check_output_dir(output_dir: str | None) -> None:
    """Raises ValueError if the folder holds a run."""
    folder = Path(output_dir or ".")
    if found := _found(folder, _TRACES):
        raise ValueError(
            f"output_dir {folder} holds another run ({found[0].name}): choose another folder, "
            "resume it with resume_from_checkpoint, or pass overwrite_output_dir"
        )


def check_writable(output_dir: str | None) -> None:
    """Raises ValueError if nothing can be written into the folder, which need not be there yet."""
    folder = Path(output_dir or ".")
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    probe = there / f".writable-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another folder"
        ) from error


def newest_checkpoint(output_dir: str | None) -> Path:
    """The newest whole checkpoint of the run in a folder.

    Raises:
        ValueError: there is none.
    """
    return _newest(Path(output_dir or "."))[0]


def resume_of(folder: Path, resume: str | bool | None) -> str | bool | None:
    """What to go on from: a path, True for the newest whole checkpoint, None for nothing.

    Processes that torchrun has started again go on from the newest one of the run that they began,
    whatever they are asked to resume.
    """
    there = bool(_checkpoints(folder) or _checkpoints(folder / WRITING))
    if there and restarts() > 0 and _read_run(folder).get("launch") == launch():
        return True
    return (there or None) if resume == "auto" else resume


def open_run(
    folder: Path,
    resume: str | bool | None,
    *,
    overwrite: bool,
    check: Callable[[str, dict[str, Any]], None],
) -> OpenedRun:
    """Clears the folder for a run that starts or goes on, as the table above has it.

    Args:
        folder: the run's.
        resume: as in `Trainer.train`.
        overwrite: move another run aside.
        check: raises if the run cannot go on from a checkpoint, by its manifest; nothing has been
            moved by then.

    Raises:
        ValueError: the folder holds another run, or what is to be resumed is not whole, not there
            or another run's.
    """
    _clear_up(folder)
    resume = resume_of(folder, resume)
    if not resume:
        if not overwrite:
            check_output_dir(str(folder))
        return _start(folder, uuid.uuid4().hex)
    if resume is True:
        checkpoint, facts = _newest(folder)
        inside = True
    else:
        checkpoint = Path(str(resume))
        facts = _check_resumable(checkpoint)
        inside = checkpoint.resolve().parent == folder.resolve()
    identity, present = facts["run"], run_in(folder)
    if inside and present not in (None, identity):
        raise ValueError(
            f"{checkpoint} belongs to another run than {folder / RUN_FILE}: start with "
            "overwrite_output_dir and without resume_from_checkpoint, or resume one of this run"
        )
    if not inside and present != identity and not overwrite:
        check_output_dir(str(folder))
    check(str(checkpoint), facts)
    if not inside and present != identity:
        _start(folder, identity)
        return OpenedRun(identity, str(checkpoint), facts)
    others = [c for c in _checkpoints(folder) if not _goes_on(c, identity, facts["step"])]
    move_aside(folder, others, f"newer than {checkpoint.name}, damaged or another run's")
    if present is None or _read_run(folder).get("launch") != launch():
        write_durably(folder / RUN_FILE, _description(identity, _read_run(folder)))
    return OpenedRun(identity, str(checkpoint), facts)


def _start(folder: Path, identity: str) -> OpenedRun:
    """Another run leaves with its identity; whatever a kill leaves behind in between is foreign to
    the new one, too, whose identity is written first."""
    aside = folder / f"previous-{_next_number(folder)}"
    leaving = _found(folder, _TRACES)
    if leaving and (folder / RUN_FILE).exists():
        aside.mkdir()
        shutil.copy2(folder / RUN_FILE, aside)
    write_durably(folder / RUN_FILE, _description(identity))
    if leaving:
        companions = [p for p in _found(folder, _COMPANIONS) if p.name != RUN_FILE]
        move_aside(folder, [*leaving, *companions], "another run's", aside)
    return OpenedRun(identity, None, {})


def move_aside(folder: Path, paths: list[Path], why: str, aside: Path | None = None) -> None:
    """Into `previous-<n>/`, with one line."""
    if not paths:
        return
    aside = aside or folder / f"previous-{_next_number(folder)}"
    aside.mkdir(exist_ok=True)
    for path in paths:
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in paths[:5]) + (", …" if len(paths) > 5 else "")
    warnings.warn(f"moved aside into {aside}: {names} ({why})", stacklevel=2)


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    run = run_in(folder)
    for checkpoint in _checkpoints(folder):
        try:
            facts = read_manifest(checkpoint)
            if run is not None and facts["run"] != run:
                raise ValueError(f"{checkpoint} belongs to another run")
            return checkpoint, _check_resumable(checkpoint)
        except ValueError as error:
            warn_once(f"{error}: it is passed over")
    raise ValueError(f"output_dir {folder} holds no whole checkpoint of its run to resume from")


def _check_resumable(checkpoint: Path) -> dict[str, Any]:
    facts = check_manifest(checkpoint)
    if not facts["resumable"]:
        raise ValueError(f"{checkpoint} holds weights alone (save_only_model)")
    return facts


def _goes_on(checkpoint: Path, identity: str, step: int) -> bool:
    """Whether a checkpoint is on the way of the run that goes on from `step`."""
    try:
        facts = read_manifest(checkpoint)
    except ValueError:
        return False
    return facts["run"] == identity and facts["step"] <= step


def run_in(folder: Path) -> str | None:
    """The identity of the run in a folder."""
    return _read_run(folder).get("run")


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _description(identity: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a run that starts, or that goes on: it has started before."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    place = {"host": platform.node(), "process": os.getpid(), "launch": launch()}
    return {"run": identity, "started": (before or {}).get("started", now), **place}


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    steps = {path: int(match[1]) for match, path in found if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _next_number(folder: Path) -> int:
    numbers = [path.name.removeprefix("previous-") for path in folder.glob("previous-*")]
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)


def publish(written: Path, folder: Path, keep: int | None = None, best: str | None = None) -> None:
    """Gives a whole checkpoint its name, and deletes the oldest ones.

    Args:
        written: the checkpoint under `WRITING`, with its manifest.
        folder: where it belongs.
        keep: how many may be there (`save_total_limit`); None: all.
        best: one that stays in any case.
    """
    final = folder / written.name
    if final.exists():  # killed before the next line, the new one is found where it lies
        _delete(folder, [final])
    written.rename(final)
    sync_folder(folder)
    stay = {final.resolve()} | ({Path(best).resolve()} if best else set())
    if keep and keep > 0:
        old = [path for path in _checkpoints(folder) if path.resolve() not in stay]
        _delete(folder, old[max(0, keep - len(stay)) :])
    shutil.rmtree(folder / WRITING, ignore_errors=True)


def _delete(folder: Path, checkpoints: list[Path]) -> None:
    """A kill in the middle leaves nothing that looks like a checkpoint."""
    shutil.rmtree(folder / _DELETING, ignore_errors=True)
    for path in checkpoints:
        (folder / _DELETING).mkdir(exist_ok=True)
        path.rename(folder / _DELETING / path.name)
    shutil.rmtree(folder / _DELETING, ignore_errors=True)


def _clear_up(folder: Path) -> None:
    """What a kill left: a checkpoint that had all but its name gets it, the rest goes."""
    for written in _checkpoints(folder / WRITING):
        with contextlib.suppress(ValueError):
            read_manifest(written)
            if not (folder / written.name).exists():
                publish(written, folder)
    _delete(folder, [])
    shutil.rmtree(folder / WRITING, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can start a run in the folder. The lock dies with its process.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl

    with (folder / _LOCK).open("a+") as file:
        try:
            # of the process, not of the file: loader's workers, which are forked, do not hold it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warn_once(f"output_dir {folder} cannot be locked ({error.strerror})")
                yield
                return
            file.seek(0)
            raise ValueError(
                f"output_dir {folder} is in use by another run ({file.read().strip()}): wait for "
                "its end or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
