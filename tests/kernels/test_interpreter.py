"""Runs the kernel tests of this folder in processes where Triton interprets the kernels."""

import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kernels.conftest import INTERPRETED, ROUNDS_TWICE
from tests.processes import fork

FOLDER = Path(__file__).parent
# Files without a test that can be interpreted.
NATIVE = {"test_aot", "test_interpreter"}
# Tests that must have passed (an old Triton may skip those of bits), so that a filter, a skip or a
# renamed fixture cannot empty a file unseen. A file that is not listed must have one.
AT_LEAST = {
    "test_adafactor": 90,
    "test_adamw": 33,
    "test_ema": 115,
    "test_linear_logprob": 33,
    "test_logprob": 75,
    "test_lora_merge": 27,
    "test_ops": 16,
    "test_preference": 175,
    "test_release_step": 20,
    "test_traffic": 8,
}


FILES = sorted({path.stem for path in FOLDER.glob("test_*.py")} - NATIVE)
not_twice = pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")


def interpret(report: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A pytest of its own, for Triton decides at the import of a kernel who runs it."""
    outer = ("PYTEST_ADDOPTS", "PYTEST_XDIST")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is used, and Hypothesis takes 1 s
    options = ["-q", "--durations=0", "--durations-min=1", "-p", "no:cacheprovider"]
    run = fork(
        "-m", "pytest", *arguments, *options, f"--junitxml={report}",
        env={**environment, "TRITON_INTERPRET": "1"}, timeout=1800,
    )  # fmt: skip
    print(run.stdout, run.stderr)  # pytest shows it when the test fails
    return run


def passed(case: ElementTree.Element) -> bool:
    outcome = {child.tag: child.get("message") for child in case}
    return outcome.get("skipped") == ROUNDS_TWICE or not (
        outcome.keys() & {"failure", "error", "skipped"}
    )


@not_twice
@pytest.mark.parametrize("file", FILES)
def test_the_kernel_tests_pass_interpreted(file: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    run = interpret(report, str(FOLDER / f"{file}.py"), "-m", "not gpu and not matrix")
    assert run.returncode == 0, f"{run.returncode=}, its output is above"
    count = sum(passed(case) for case in ElementTree.parse(report).iter("testcase"))
    least = AT_LEAST.get(file, 1)
    assert count >= least, f"{file}: {count} tests passed, expected {least} or more"


@not_twice
@pytest.mark.matrix
def test_the_matrices_of_kernel_tests_pass_interpreted(tmp_path: Path) -> None:
    run = interpret(tmp_path / "report.xml", str(FOLDER), "-m", "matrix and not gpu")
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("no kernel test is marked matrix")
    assert run.returncode == 0, f"{run.returncode=}, its output is above"


def test_every_file_that_must_pass_is_there() -> None:
    assert AT_LEAST.keys() <= {*FILES}
