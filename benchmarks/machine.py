"""The machine: what it is, and how fast it copies, multiplies and exponentiates at best, measured where asked."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIBRARIES = ("torch", "triton", "numpy", "transformers", "mambapy", "mamba_ssm", "causal_conv1d", "libggml-python")


def measure_limits(threads: int, device: str = "cpu") -> dict[str, float]:
    """Best rates per second now: `copy` in bytes read plus written, `exp` and `fma` in fp32 elements.

    On the CPU the latter two come from the compiled library, at its SIMD capability; without it they are left out.
    """
    rates = {"copy": copy_rate(device)}
    if device == "cpu":
        from ssmkit import native

        if not native.why_not():
            from ssmkit.native.rates import exp2_rate, fma_rate

            rates["exp"], rates["fma"] = exp2_rate(threads, 6), fma_rate(threads, 6)
    else:
        rates["fma"] = matmul_rate(device)
    return rates


def copy_rate(device: str, repeats: int = 4) -> float:
    """Bytes per second, read and written together, of a copy far larger than the caches."""
    size = 2**24 if device == "cpu" else 2**28
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = max(best, 2 * source.numel() * source.element_size() / (time.perf_counter() - start))
    return best


def matmul_rate(device: str, size: int = 4096, repeats: int = 4) -> float:
    """Multiply-adds per second of a large fp32 product."""
    a = torch.ones(size, size, device=device)
    best = 0.0
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = max(best, size**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Bound(NamedTuple):
    """The least time of a call, and what binds it: memory or arithmetic."""

    seconds: float
    binding: str


def seconds_at_best(cost: dict[str, float], rates: dict[str, float]) -> Bound | None:
    """The least time of a call that costs `cost` on a machine of these rates; None where no rate tells.

    Exponentials and multiply-adds compete for the same pipes and add up; moving bytes overlaps with both.
    """
    bounds = []
    if cost.get("bytes_moved") and rates.get("copy"):
        bounds.append(Bound(cost["bytes_moved"] / rates["copy"], "memory"))
    if any(cost.get(kind + "s") and not rates.get(kind) for kind in ("exp", "fma")):
        # Part of the arithmetic has no measured rate: a bound from the rest would flatter.
        return None
    arithmetic = sum(cost[kind + "s"] / rates[kind] for kind in ("exp", "fma") if cost.get(kind + "s"))
    if arithmetic:
        bounds.append(Bound(arithmetic, "arithmetic"))
    return max(bounds) if bounds else None


def describe(device: str = "cpu") -> dict[str, Any]:
    """Names and sizes that a reader of a result needs."""
    cpu = {"name": cpu_name(), "cores": os.cpu_count(), "capabilities": capabilities(), "caches": caches()}
    facts: dict[str, Any] = {"cpu": cpu, "kernel": platform.release(), "memory_bytes": memory_bytes()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"name": gpu.name, "memory_bytes": gpu.total_memory, "sm": f"{gpu.major}{gpu.minor}"}
    return facts


def cpu_name() -> str:
    """Model name, and the family and model numbers where the name says little."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    entry = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = entry.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {entry['cpu family']}, model {entry['model']})" if "cpu family" in entry else name


def folder_name(device: str = "cpu") -> str:
    """A name for this machine under benchmarks/results."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{cpu_name()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def capabilities() -> list[str]:
    """SIMD levels the compiled library can run here, the widest first."""
    from ssmkit import native

    return [] if native.why_not() else list(native.library().cpu_capabilities())


def caches() -> dict[str, str]:
    """Size of each cache of the first core, by level and type."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / entry).read_text().strip() for entry in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Python's, and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, marked where sources differ from it; "not a checkout" for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "not a checkout"
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/csrc", ":/kernels", ":/ssmkit", ":/setup.py"
    )
    return f"{head} with changes" if changed else head
