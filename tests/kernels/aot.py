"""Compiles the kernels that ship for one target, on a machine that may have no GPU, and prints what they use.

    python tests/kernels/aot.py cuda:90          (hip:gfx942; without TRITON_INTERPRET in the environment)

Every module of ssmkit.kernels that launches a kernel offers

    def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
        '''A label and a call of forward, backward or step on `meta` tensors, for each configuration that ships.'''

and those calls are made here with a driver that names the target and has no device: every launch in them compiles what
a GPU of that kind would compile for the same arguments, and stops there. One JSON object is printed per kernel.
"""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ssmkit.kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers per thread, bytes of local and of shared memory."""

    op: str
    configuration: str
    kernel: str
    target: str
    registers: int
    local_bytes: int
    spills: int
    shared_bytes: int
    num_warps: int


class TargetDriver:
    """Stands where Triton's device driver stands, for a target without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def parse_target(text: str) -> GPUTarget:
    """`cuda:90` or `hip:gfx942`."""
    backend, arch = text.split(":")
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)


def cuda_resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers, stack and local memory as cuobjdump of Triton's own package reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    # A spill is a store to the stack; ptxas keeps nothing else there for these kernels.
    return {"registers": found["REG"], "local_bytes": found["LOCAL"], "spills": found["STACK"]}


def hip_resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers, private segment and spills from the metadata that the AMD assembler writes."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))

    return {
        "registers": field("vgpr_count"),
        "local_bytes": field("private_segment_fixed_size"),
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spills": field("vgpr_spill_count"),
    }


def compile_shipped(target: GPUTarget, ops: list[str]) -> Iterator[Resources]:
    """Every kernel of every shipped configuration of `ops` (all, if empty), each distinct binary once."""
    triton.runtime.driver.set_active(TargetDriver(target))
    launch, compiled = JITFunction.run, []

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> CompiledKernel:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    seen = set()
    for name in ops or [module.name for module in pkgutil.iter_modules(ssmkit.kernels.__path__)]:
        module = importlib.import_module(f"ssmkit.kernels.{name}")
        for label, call in getattr(module, "shipped_configurations", tuple)():
            compiled.clear()
            call()
            for kernel in compiled:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                found = cuda_resources(kernel) if target.backend == "cuda" else hip_resources(kernel)
                yield Resources(
                    op=name,
                    configuration=label,
                    kernel=kernel.name,
                    target=f"{target.backend}:{target.arch}",
                    shared_bytes=kernel.metadata.shared,
                    num_warps=kernel.metadata.num_warps,
                    **found,
                )


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter does not compile; unset TRITON_INTERPRET"
    for resources in compile_shipped(parse_target(sys.argv[1]), sys.argv[2:]):
        print(json.dumps(dataclasses.asdict(resources)), flush=True)
