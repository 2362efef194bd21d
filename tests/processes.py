"""Processes of tests that need no import of their own: forks of one that has imported everything.

    launch("tests.training.matrix_run", 4, FOLDER)   as torchrun starts a module
    fork("-m", "tralign_fast.cli", "train")          as the interpreter is started, once

A fresh interpreter takes 6 s of CPU time to import what a trainer imports, torchrun as much again.
The first call starts the process that is forked, which ends with this one. It has one thread and
has computed nothing, so a fork of it is what a fresh interpreter is after the same imports. There
is one for each value of TRITON_INTERPRET, which is decided at an import. Not for HF_HOME or
PYTHONHASHSEED, nor for what a test says of imports. `tests/commands/test_launch.py` goes through
torchrun itself.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tests.quick import look_up_packages_once, wait_for_no_disk

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "torch.distributed.fsdp", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "tralign_fast.training.trainer", "datasets", "peft", "pytest",
)  # fmt: skip
WITH_THEM = ("bitsandbytes", "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer")  # if installed
FIXED = ("HF_HOME", "PYTHONHASHSEED")
# seconds until what hangs is ended: less than gloo's half an hour, and no measure of a busy machine
PATIENCE = 1200.0
TORCHRUN_KILLS_AFTER = 30.0  # seconds between SIGTERM and SIGKILL

# TRITON_INTERPRET -> the process that is forked, and what it writes, for when it dies
_servers: dict[str, tuple[socket.socket, Any]] = {}


# --- the side of the test


def fork(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...` or `python -c CODE ...`, with os.environ where `env` is None."""
    return _ask(arguments, None, os.environ if env is None else env, timeout)


def launch(
    module: str, processes: int, *arguments: str, timeout: float = PATIENCE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc_per_node PROCESSES -m MODULE ...`, one thread a process.

    The return code is 0, or 1 if a process ended otherwise; the others are ended then.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment}
    return _ask(("-m", module, *arguments), processes, env, timeout)


def check_ended(run: subprocess.CompletedProcess[str]) -> None:
    """Shows what processes wrote that ended with another code than 0."""
    told = "\n".join(line for line in run.stderr.splitlines() if line.startswith("[rank"))
    assert run.returncode == 0, told[-4000:] or run.stderr[-4000:]


def torchrun(
    module: str, processes: int, *arguments: str, restarts: int = 0, timeout: float = PATIENCE,
    **environment: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """torchrun itself: for its own deeds, and for what is decided at an import."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(processes), "--max_restarts", str(restarts), "-m", module, *arguments,
    ]  # fmt: skip
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=timeout
    )


def _ask(
    arguments: tuple[str, ...], processes: int | None, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    for name in FIXED:
        assert env.get(name) == os.environ.get(name), f"{name} is decided at an import"
    interpret = env.get("TRITON_INTERPRET", "")
    if interpret not in _servers:
        _servers[interpret] = _start_server(interpret)
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder, ours:
        request = {
            "arguments": arguments, "processes": processes, "env": dict(env),
            "timeout": timeout, "folder": folder,
        }  # fmt: skip
        with theirs:
            socket.send_fds(_servers[interpret][0], [b"."], [theirs.fileno()])
        ours.sendall(json.dumps(request).encode() + b"\n")
        code = ours.makefile().readline()  # "" if what was forked is gone
        assert code, _died(interpret)
        out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("out", "err"))
    if code.strip() == "late":
        raise subprocess.TimeoutExpired(arguments, timeout, out, err)
    return subprocess.CompletedProcess(arguments, int(code), out, err)


def _died(interpret: str) -> str:
    said = _servers.pop(interpret)[1]
    said.seek(0)
    return f"the process that is forked has died: {said.read().decode(errors='replace')[-3000:]}"


def _start_server(interpret: str) -> tuple[socket.socket, Any]:
    ours, theirs = socket.socketpair()
    said = tempfile.TemporaryFile()  # noqa: SIM115
    own = {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes", str(theirs.fileno())], cwd=ROOT,
            env={**os.environ, **own}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        )  # fmt: skip

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours, said


# --- the side that is forked


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Forks for every request. Returns in processes that are to run something, and at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is waited for
    while True:
        _, fds, _, _ = socket.recv_fds(listener, 1, 1)
        if not fds:
            return None
        asked = socket.socket(fileno=fds[0])
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return oversee(asked)
        asked.close()


def oversee(asked: socket.socket) -> dict[str, Any]:
    """Forks the processes of one request, waits for them, answers; returns in those alone."""
    request = json.loads(asked.makefile().readline())
    ranks = range(request["processes"] or 1)
    pipe, port_to = os.pipe()
    children = []
    for rank in ranks:
        child = os.fork()
        if child == 0:
            asked.close()
            os.close(port_to)
            return _environment_of(rank, request, pipe)
        children.append(child)
    os.close(pipe)
    # the store of torchrun's agent; after the forks, for it has threads
    store = _make_store() if request["processes"] else None
    os.write(port_to, b"%-8d" % (store.port if store else 0) * len(ranks))
    os.close(port_to)
    answer = _wait(children, time.monotonic() + request["timeout"])
    if request["processes"] and answer != "late":
        answer = str(int(answer != "0"))
    asked.sendall(f"{answer}\n".encode())
    os._exit(0)


def _make_store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def _environment_of(rank: int, request: dict[str, Any], pipe: int) -> dict[str, Any]:
    """A process of the request becomes what torchrun or the shell would have started."""
    for name, descriptor in (("out", 1), ("err", 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(os.path.join(request["folder"], name), flags, 0o600), descriptor)
    port = int(os.read(pipe, 8))
    os.close(pipe)
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    if request["processes"]:
        count = str(request["processes"])
        os.environ.update({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
            "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": count, "ROLE_NAME": "default",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": f"{os.getppid()}-{port}",
        })  # fmt: skip
    return request


def _wait(children: list[int], until: float) -> str:
    """The code of the process that ended first with one that is not 0, as subprocess has it."""
    left, code, kill_at = set(children), 0, until
    while left:
        for child in [*left]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            left.remove(child)
            if code == 0 and status:
                code = os.waitstatus_to_exitcode(status)
                kill_at = min(until, time.monotonic() + TORCHRUN_KILLS_AFTER)
                _end(left, signal.SIGTERM)
        if left and time.monotonic() > kill_at:
            _end(left, signal.SIGKILL)
            if time.monotonic() > until:
                return "late"
        time.sleep(0.01)
    return str(code)


def _end(children: set[int], by: signal.Signals) -> None:
    for child in children:
        os.kill(child, by)


def run(arguments: list[str]) -> int:
    """What the interpreter makes of its command line, to its code."""
    how, what, *rest = arguments
    try:
        if how == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # torch.distributed's says which process it is
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """The end of the interpreter, less the 3 s in which it frees what was imported."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]: waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main(descriptor: int) -> None:
    listener = socket.socket(fileno=descriptor)
    for name in IMPORTS:
        importlib.import_module(name)
    for name in () if os.environ["TRITON_INTERPRET"] else WITH_THEM:  # which no kernel test uses
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    look_up_packages_once()
    wait_for_no_disk()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all of it
    request = serve(listener)
    leave(run(request["arguments"]) if request else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
