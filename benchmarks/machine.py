"""The machine: what it is, and how fast it copies, multiplies and exponentiates at best, measured where asked."""

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIBRARIES = ("torch", "triton", "numpy", "transformers", "mambapy", "mamba_ssm", "causal_conv1d", "libggml-python")
ARITHMETIC = ("exp", "fma", "product")


def measure_limits(threads: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Best rates per second now: `copy` and `read` in bytes (copied ones twice), `exp` and `fma` in fp32 elements, and
    `product`, the multiply-adds of torch's matrix product of that dtype.

    On the CPU `exp` and `fma` come from the compiled library, at its SIMD capability; without it they are left out.
    """
    rates = {"copy": copy_rate(device), "read": read_rate(device), "product": product_rate(device, dtype)}
    if device == "cpu":
        from ssmkit import native

        if not native.why_not():
            from ssmkit.native.rates import exp2_rate, fma_rate

            rates["exp"], rates["fma"] = exp2_rate(threads, 6), fma_rate(threads, 6)
    else:
        rates["fma"] = product_rate(device, torch.float32)
    return rates


def copy_rate(device: str, repeats: int = 4) -> float:
    """Bytes per second, read and written together, of a copy far larger than the caches."""
    source = torch.ones(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), repeats, device)


def read_rate(device: str, repeats: int = 4) -> float:
    """Bytes per second of numbers far larger than the caches, added up."""
    numbers = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    return numbers.nbytes / _best(numbers.sum, repeats, device)


def product_rate(device: str, dtype: torch.dtype, repeats: int = 8) -> float:
    """Multiply-adds per second of a square matrix product, of the size at which torch is fastest."""
    size = 512 if device == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    return size**3 / _best(lambda: a @ a, repeats, device)


def _best(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of the fastest call."""
    best = math.inf
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
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

    Exponentials, multiply-adds and matrix products compete for the same pipes and add up; moving bytes overlaps with
    them.
    """
    bounds = []
    memory = sum(
        cost[kind] / rates[rate] for kind, rate in (("bytes_moved", "copy"), ("bytes_read", "read")) if cost.get(kind)
    )
    if memory:
        bounds.append(Bound(memory, "memory"))
    needed = [kind for kind in ARITHMETIC if cost.get(kind + "s")]
    if not all(rates.get(kind) for kind in needed):
        # Part of the arithmetic has no measured rate: a bound from the rest would flatter.
        return None
    arithmetic = sum(cost[kind + "s"] / rates[kind] for kind in needed)
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


def capability() -> str:
    """The SIMD level in use; "none" without the compiled library."""
    from ssmkit import native

    return "none" if native.why_not() else str(native.library().cpu_capability())


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
