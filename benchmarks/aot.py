"""Compiles every shipped kernel configuration ahead of time and reads what the compiler made of it.

    python -m benchmarks.aot [sm_80 sm_90 sm_100 gfx942]

Needs no device: Triton brings the assemblers (ptxas, LLVM's AMDGPU backend). Says how many
registers a kernel takes and whether any of them spill, nothing about how fast it is.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import tralign_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}


def configurations(backend: str) -> Iterator[dict[str, Any]]:
    """What every module of tralign_kernels lists in `aot_configurations(backend)`."""
    for module in pkgutil.iter_modules(tralign_kernels.__path__, "tralign_kernels."):
        listed = getattr(importlib.import_module(module.name), "aot_configurations", None)
        yield from listed(backend) if listed is not None else ()


def compile_configuration(configuration: dict[str, Any], target: GPUTarget) -> CompiledKernel:
    source = ASTSource(
        configuration["fn"],
        configuration["signature"],
        configuration["constexprs"],
        configuration["attrs"],
    )
    return triton.compile(source, target=target, options=configuration["options"])


def measure(configuration: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Compiles one configuration for one target.

    Returns:
        name; registers: per thread; shared: bytes of shared memory a program; spills: on NVIDIA the
        bytes of a thread's stack frame (where ptxas spills to; these kernels have no other use for
        one), on AMD the number of spilled vector and scalar registers; bytes: size of the binary.
    """
    kernel = compile_configuration(configuration, target)
    if target.backend == "cuda":
        binary = kernel.asm["cubin"]
        registers, spills = _read_cubin(binary)
    else:
        binary = kernel.asm["hsaco"]
        registers, spills = _read_amdgcn(kernel.asm["amdgcn"])
    return {
        "name": configuration["name"],
        "registers": registers,
        "shared": kernel.metadata.shared,
        "spills": spills,
        "bytes": len(binary),
    }


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)[-1]
    return int(registers), int(stack) + int(local)


def _read_amdgcn(assembly: str) -> tuple[int, int]:
    count = {
        key: int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[-1])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


def main(names: list[str]) -> None:
    print(f"{'target':8}{'kernel':44}{'registers':>10}{'shared':>8}{'spills':>8}{'bytes':>8}")
    for name in names or TARGETS:
        target = TARGETS[name]
        for configuration in configurations(target.backend):
            row = measure(configuration, target)
            print(
                f"{name:8}{row['name']:44}{row['registers']:10}{row['shared']:8}"
                f"{row['spills']:8}{row['bytes']:8}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
