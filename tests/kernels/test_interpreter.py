"""Runs the kernel tests of this folder in a process where Triton interprets the kernels."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kernels.conftest import INTERPRETED, ROUNDS_TWICE

FOLDER = Path(__file__).parent
# Files without a test that can be interpreted.
NATIVE = {"test_aot", "test_interpreter"}
# Tests that must have passed (an old Triton may skip those of bits), so that a filter, a skip or a
# renamed fixture cannot empty a file unseen. A file that is not listed must have one.
AT_LEAST = {
    "test_ema": 170,
    "test_linear_logprob": 49,
    "test_logprob": 120,
    "test_lora_merge": 53,
    "test_ops": 16,
    "test_preference": 284,
    "test_traffic": 8,
}


@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
def test_every_kernel_test_passes_interpreted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    options = [
        "-m",
        "not gpu",
        "-q",
        "--durations=0",
        "--durations-min=1",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER), *options, f"--junitxml={report}"],
        cwd=FOLDER.parents[1],
        env={**environment, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout)  # pytest shows it when this test fails
    assert run.returncode == 0, f"{run.returncode=}, its output is above"

    passed: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = {child.tag: child.get("message") for child in case}
        counts = outcome.get("skipped") == ROUNDS_TWICE or not (
            outcome.keys() & {"failure", "error", "skipped"}
        )
        passed[case.attrib["classname"].split(".")[2]] += counts  # tests.kernels.test_ema
    for file in sorted({path.stem for path in FOLDER.glob("test_*.py")} - NATIVE):
        least = AT_LEAST.get(file, 1)
        assert passed[file] >= least, (
            f"{file}: {passed[file]} tests passed, expected {least} or more"
        )
