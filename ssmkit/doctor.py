"""`ssmkit doctor`: what this machine has, and which backend of each op can run on it, or why not and what to do."""

import argparse
import importlib
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import ssmkit
from ssmkit import native, ops
from ssmkit.backends import interpreting, unusable


def report() -> str:
    """The whole report as text."""
    facts = [
        ("ssmkit", ssmkit.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _triton()),
        ("compiler", _tool("g++", "c++", "clang++")),
        ("nvcc", _tool("nvcc")),
        ("CPU", _cpu()),
        ("GPU", _gpu()),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    rows = [row for op in ops.__all__ for row in _backends(op)]
    op_width, name_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines += ["", "backends, in order of preference"]
    lines += [f"  {op:<{op_width}}  {name:<{name_width}}  {state}" for op, name, state in rows]
    return "\n".join(lines)


def _backends(op: str) -> list[tuple[str, str, str]]:
    module = importlib.import_module(f"ssmkit.ops.{op}")
    rows = [(op, row.name, _state(row.name, row.module)) for row in module.BACKENDS]
    return [*rows, (op, "reference", "usable (plain torch, slow)")]


def _state(name: str, module: str) -> str:
    reason = unusable(name, module)
    if reason is None and name == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible to torch; on a machine with one, install a CUDA build of torch"
    if reason is not None:
        return f"not usable: {reason}"
    return (
        "usable (interpreted on the CPU, for tests)" if name == "triton" and not torch.cuda.is_available() else "usable"
    )


def _triton() -> str:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "not installed; pip install triton (Linux; needed on a GPU)"
    return f"{found}, interpreting (TRITON_INTERPRET=1)" if interpreting() else found


def _tool(*names: str) -> str:
    """The first of these programs that is found, with the line of its version."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        line = next((line for line in told if any(c.isdigit() for c in line) and "Copyright" not in line), "")
        return f"{path}: {line}"
    return f"not found (tried {', '.join(names)})"


def _cpu() -> str:
    reason = native.why_not()
    if reason:
        return f"{platform.machine()}; {reason}"
    library = native.library()
    return (
        f"{platform.machine()}, kernels for {library.cpu_capability()} "
        f"(this CPU can run: {', '.join(library.cpu_capabilities())}; SSMKIT_CPU_CAPABILITY chooses)"
    )


def _gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs only"
    if not torch.cuda.is_available():
        return f"none visible to torch (built for CUDA {torch.version.cuda}); check the driver with nvidia-smi"
    names = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        names.append(f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB)")
    return ", ".join(names)


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="ssmkit doctor", description=__doc__)
    parser.parse_args(argv)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
