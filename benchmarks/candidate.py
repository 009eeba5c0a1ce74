"""One implementation at one shape: made ready, checked against the float64 reference, timed, its memory measured."""

import ctypes
import gc
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmkit.testing import CANCELLATION, assert_close, to_double

from .registry import Bench, Prepared, Rival, find, sizes_of

OURS = "ssmkit"
REFERENCE = "reference"
# A rival need not meet our bounds, only compute the same thing: RMS error relative to the expected RMS, in units of
# the result's eps (1e-4 in float32, a few eps in 16 bits). What it reaches is reported.
RIVAL_EPS = {torch.float64: 1e6, torch.float32: 840.0, torch.bfloat16: 4.0, torch.float16: 4.0}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to be made ready; plain values, so that it travels to a worker process as JSON."""

    module: str
    bench: str
    candidate: str = OURS
    sizes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    mode: str = "fwd"
    threads: int = 1
    backend: str = "auto"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be the name of a torch dtype, got {self.dtype!r}")
        return dtype


class Wrong(Exception):
    """An implementation that does not match the reference."""


class Declined(Exception):
    """A rival that is not run at this shape or in this mode, and why."""


class Candidate:
    """A spec made ready in this process."""

    def __init__(self, spec: Spec) -> None:
        importlib.import_module(spec.module)
        self.spec = spec
        self.bench: Bench = find(spec.bench)
        torch.set_num_threads(spec.threads)
        self.inputs = self.bench.make(spec.sizes, spec.torch_dtype, spec.device)
        if spec.candidate == REFERENCE:
            self.inputs = to_double(self.inputs)
        self.names = self._differentiated() if spec.mode == "fwdbwd" else ()
        for name in self.names:
            self.inputs[name].requires_grad_()
        self.prepared = self._adapter().ready(self.inputs)
        leaves = self.prepared.leaves or self.inputs
        self.leaves = [leaves[name] for name in self.names]
        self.dy: Tensor | None = None
        self.notes = [self.prepared.note] if self.prepared.note else []

    def _differentiated(self) -> tuple[str, ...]:
        if self.bench.gradients is not None:
            return tuple(name for name in self.bench.gradients if name in self.inputs)
        tensors = {name: value for name, value in self.inputs.items() if isinstance(value, Tensor)}
        return tuple(name for name, value in tensors.items() if value.is_floating_point() or value.is_complex())

    def _adapter(self) -> Rival:
        bench, spec = self.bench, self.spec
        if spec.candidate not in (OURS, REFERENCE):
            rival = bench.rival(spec.candidate)
            if spec.mode not in rival.modes:
                raise Declined(f"has no {spec.mode}")
            facts = {**bench.fixed, **spec.sizes, "dtype": spec.torch_dtype, "mode": spec.mode}
            reason = sizes_of(rival.declines, facts) if rival.declines is not None else None
            if reason is not None:
                raise Declined(reason)
            return rival
        if spec.candidate == REFERENCE and bench.reference is not None:
            return Rival(call=bench.reference)
        if isinstance(bench.op, Rival):
            return bench.op
        op = bench.op
        backend = REFERENCE if spec.candidate == REFERENCE else spec.backend
        options = {} if backend == "auto" else {"backend": backend}
        return Rival(prepare=lambda inputs: Prepared(lambda: op(**inputs, **options)))

    def _output(self) -> Tensor:
        out = self.prepared.call()
        return out[0] if isinstance(out, tuple) else out

    def call(self) -> tuple[Tensor, ...]:
        """One call of the mode: the output, then in "fwdbwd" the gradients."""
        if self.spec.mode == "fwd":
            with torch.no_grad():
                return (self._output(),)
        y = self._output()
        if self.dy is None:
            generator = torch.Generator().manual_seed(1)
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(self.spec.torch_dtype)
            self.dy = dy.to(y)
        return (y.detach(), *torch.autograd.grad(y, self.leaves, self.dy))

    def results(self) -> dict[str, Tensor]:
        """One call's results by name; warnings given on the way become notes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = self.call()
        if self.spec.candidate == OURS:
            self.notes += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        named = dict(zip(["y", *(f"d{name}" for name in self.names)], results, strict=True))
        return named if self.prepared.finish is None else self.prepared.finish(named)

    def save_expected(self, path: Path) -> None:
        """Write the reference's results for the candidates to be checked against."""
        torch.save({name: value.detach().cpu() for name, value in self.results().items()}, path)

    def check(self, path: Path) -> dict[str, float]:
        """Relative RMS error of each result; raises `Wrong` where one is too large. Nothing for a contrast."""
        if self.spec.candidate not in (OURS, REFERENCE) and self.bench.rival(self.spec.candidate).contrast:
            return {}
        expected = torch.load(path)
        errors = {}
        for name, actual in self.results().items():
            if self.bench.rounds_operands:
                actual = actual.to(self.spec.torch_dtype)
            if self.spec.candidate == OURS:
                summed = name in {f"d{parameter}" for parameter in self.bench.parameters}
                slack = self.bench.slack * (CANCELLATION if summed else 1.0)
                try:
                    assert_close(name, actual, expected[name], slack=slack)
                except AssertionError as wrong:
                    raise Wrong(str(wrong)) from None
            errors[name] = error = rms_error(actual, expected[name])
            allowed = RIVAL_EPS[actual.dtype] * torch.finfo(actual.dtype).eps
            if not error <= allowed:
                raise Wrong(f"{name}: relative RMS error {error:.2g}, allowed {allowed:.2g}")
        return errors

    def window(self, calls: int, alone: bool = False) -> dict[str, float]:
        """Time `calls` calls in a row; `alone` keeps other programs off the CPUs in use."""

        def run() -> None:
            for _ in range(calls):
                self.call()
            self.synchronize()

        self.synchronize()
        with exclusive(alone):
            return spent_by(run)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.spec.device == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> dict[str, int]:
        """Bytes one call adds at its highest, over what the process held; and the bytes of inputs and results."""
        given = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        results = self.call()
        tensors = sum(t.numel() * t.element_size() for t in (*given, *results))
        held = sum(t.numel() * t.element_size() for t in given) + self.prepared.held
        if self.dy is not None:
            tensors += self.dy.numel() * self.dy.element_size()
            held += self.dy.numel() * self.dy.element_size()
        del results
        return {"added": peak_of(self.call, self.spec.device), "held": held, "tensors": tensors}


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    if actual.shape != expected.shape:
        raise Wrong(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    wide = expected.dtype
    error = (actual.detach().cpu().to(wide) - expected).abs().square().mean().sqrt()
    return float(error / expected.abs().square().mean().sqrt().clamp_min(1e-300))


def spent_by(work: Callable[[], None]) -> dict[str, float]:
    """Seconds that `work` took by the clock, of this process's CPU time, waiting for a CPU, and of all programs' CPU time."""
    busy, cpu, waited, start = busy_seconds(), time.process_time(), time_waited(), time.perf_counter()
    work()
    wall = time.perf_counter() - start
    cpu, waited, busy = time.process_time() - cpu, time_waited() - waited, busy_seconds() - busy
    return {"wall": wall, "cpu": cpu, "waited": waited, "busy": busy}


def busy_seconds() -> float:
    """CPU time all programs have used since boot, interrupts and time stolen by the host included."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def exclusive(wanted: bool) -> Iterator[None]:
    """Run every thread of this process under the real-time scheduler: other programs get the CPUs it leaves idle."""
    if not wanted:
        yield
        return
    _schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setscheduler(int(task), policy, os.sched_param(priority))
        except ProcessLookupError:
            # The thread has just ended.
            continue
        except PermissionError:
            raise RuntimeError("exclusive windows take the privilege to schedule in real time (root)") from None


def time_waited() -> float:
    """Seconds that threads of this process were ready to run but had no CPU; 0 where the kernel does not say."""
    total = 0
    for task in Path("/proc/self/task").glob("*"):
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):
            # The thread ended while we looked, or the kernel keeps no such account.
            continue
    return total / 1e9


def release_memory() -> None:
    """Free what is unreachable, and hand free pages back to the system."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def peak_of(call: Callable[[], object], device: str) -> int:
    """Highest memory, in bytes, that `call` adds to what the process holds."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Free pages that malloc keeps would hide what the call needs: hand them back, then reset the high-water mark.
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status of process {os.getpid()} has no {entry}")
