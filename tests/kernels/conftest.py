"""Where a kernel test runs: in Triton's interpreter on the CPU, or compiled on a GPU.

Triton decides at decoration whether a kernel is interpreted, hence one process does one of the two:

    pytest tests/kernels                      compiled, where a GPU is
    TRITON_INTERPRET=1 pytest tests/kernels   interpreted; test_interpreter.py starts this too
"""

import mmap

import pytest
import torch
import triton

from tests.quick import quicken_interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)
ROUNDS_TWICE = "this Triton's interpreter rounds tl.fma twice"  # why tests of bits are skipped


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    if INTERPRETED:
        quicken_interpreter()


@pytest.fixture(
    params=["interpreter"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tensors."""
    if request.param == "interpreter":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it interpreted")
    return torch.device("cuda")


@pytest.fixture
def untouched_bytes():
    """size, device → (size,) int8 that costs (on the CPU) no memory until it is written to.

    For offsets past 2³¹: address space is reserved, and only the pages a test touches exist.
    """

    def make(size: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            return torch.empty(size, dtype=torch.int8, device=device)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # the name is new in Python 3.13
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.int8)

    return make
