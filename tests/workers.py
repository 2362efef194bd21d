"""How `pytest -n 2` (`make test`) deals tests out to workers, and what it makes of one that dies.

A worker takes a file at a time, for most fixtures are of a module; the long files come first, so
that none is left for the end, when the other worker has nothing to do. Without `-n` none of this
happens.
"""

from __future__ import annotations

import pytest

# Taken first, in this order: the files of more than 30 s of CPU time each.
LONG = (
    "tests/kernels/test_interpreter.py",
    "tests/test_benchmarks.py",
    "tests/training/test_distributed.py",
    "tests/memory/test_memory.py",
    "tests/training/test_tensor_parallel.py",
    "tests/reference/test_adapter.py",
    "tests/reference/test_peft_kinds.py",
    "tests/training/test_checkpoints.py",
    "tests/reference/test_killed.py",
    "tests/reference/test_quantised.py",
    "tests/training/test_trl_losses.py",
    "tests/kernels/test_aot.py",
    "tests/model/test_compile.py",
    "tests/reference/test_windows.py",
    "tests/demo/test_demo.py",
    "tests/data/test_tokenization.py",
    "tests/integrations/test_distributed.py",
    "tests/reference/test_precomputed.py",
    "tests/test_benchmarks_launches.py",
    "tests/test_benchmarks_gpu_matrix.py",
    "tests/training/test_trl_surface.py",
    "tests/test_package.py",
    "tests/model/test_layer_kernels.py",
    "tests/model/test_graphs.py",
    "tests/test_benchmarks_ops.py",
    "tests/test_examples.py",
)
# Signals that end a process by its own fault: SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV.
FAULTS = (-4, -6, -7, -8, -11)

_workers = pytest.StashKey[list]()
_dead = pytest.StashKey[list]()


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_workers], config.stash[_dead] = [], []
    # xdist would run the test that ended a worker again in the next one
    if getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Files in the order in which they were collected, where `-n` comes without `--dist`."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return file_of(nodeid)

    config.option.loadscopereorder = False  # which is by the number of tests
    return FileByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {file: i for i, file in enumerate(LONG)}
        items.sort(key=lambda item: place.get(file_of(item.nodeid), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.config.stash[_workers].append(node)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    if error:
        node.config.stash[_dead].append(f"{node.gateway.id}: {error}")


@pytest.hookimpl(trylast=True)  # the workers have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run of which a worker died as it collected or at its end, which xdist does not."""
    dead = session.config.stash[_dead]
    for node in session.config.stash[_workers]:
        code = node.gateway._io.popen.poll()
        if code in FAULTS:
            dead.append(f"{node.gateway.id}: ended with {code}")
    if dead and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash[_dead]:
        terminalreporter.write_line(f"a worker died, which fails the run: {line}", red=True)
