"""What the compiler makes of every shipped kernel configuration, on every target.

    python -m benchmarks.report [sm_80 sm_90 sm_100 gfx942]

Compiles all of them ahead of time, which needs no device: Triton brings the assemblers (ptxas,
LLVM's AMDGPU backend). Prints a table, writes it to benchmarks/results/kernels.csv where all
targets are asked for, and fails if a configuration spills. Says nothing about how fast a kernel is.

    registers  of a thread
    shared     bytes of shared memory of a program
    spills     see `measure`
    moved      MB that a launch of the stated shape asks for, by its launch parameters (a test
               counts them in Triton's interpreter); what is read again comes from caches mostly
    ratio      moved / the least that any kernel must move between device memory and registers
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import tralign_kernels
from benchmarks.common import environment, format_table, write_csv

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}


def configurations(name: str) -> Iterator[dict[str, Any]]:
    """What every module of tralign_kernels lists in `aot_configurations` for a target."""
    backend = TARGETS[name].backend
    for module in pkgutil.iter_modules(tralign_kernels.__path__, "tralign_kernels."):
        listed = getattr(importlib.import_module(module.name), "aot_configurations", None)
        for configuration in () if listed is None else listed(backend):
            if name in configuration.get("targets", (name,)):
                yield configuration


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


def report(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every configuration of every named target."""
    return [
        {
            "target": name,
            **measure(configuration, TARGETS[name]),
            "shape": configuration["shape"],
            "moved_bytes": configuration["moved"],
            "minimum_bytes": configuration["minimum"],
            "ratio": configuration["moved"] / configuration["minimum"],
        }
        for name in names
        for configuration in configurations(name)
    ]


def main(names: Sequence[str]) -> None:
    rows = report(names or list(TARGETS))
    header = (
        "kernel",
        "target",
        "registers",
        "shared",
        "spills",
        "bytes",
        "shape",
        "moved",
        "ratio",
    )
    print(
        format_table(
            header,
            [
                [row["name"], row["target"], *(str(row[key]) for key in header[2:7]),
                 f"{row['moved_bytes'] / 1e6:.1f}", f"{row['ratio']:.2f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if not names:
        system = environment(("torch", "triton"))
        write_csv(RESULTS, [{**row, **system} for row in rows])
    spilled = [f"{row['target']} {row['name']}" for row in rows if row["spills"]]
    if spilled:
        sys.exit(f"{len(spilled)} configurations spill: {', '.join(spilled)}")


if __name__ == "__main__":
    main(sys.argv[1:])
