"""What can run an op here, and why the rest cannot.

Every op lists its backends in order of preference as `Backend` rows. `choose` takes the first row that accepts the
call; a backend asked for by name runs or raises, it never falls back. When no row accepts an "auto" call the plain
torch reference runs and says so once.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One row of an op's table: its name, the device it serves, the module with its kernels, and what it refuses.

    `rejects` gets the keyword facts that the op passes to `choose` and returns the reason for refusing, or None.
    """

    name: str
    device: str
    module: str
    rejects: Callable[..., str | None] | None = None


class BackendError(NotImplementedError):
    """No backend takes the call; the message lists each with its reason."""


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run on the CPU through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def unusable(name: str, module: str) -> str | None:
    """Why backend `name` cannot run on this machine whatever the call, with the remedy; None if it can."""
    return _unusable(name, module)


@cache
def _unusable(name: str, module: str) -> str | None:
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; pip install triton"
        if not interpreting() and not torch.cuda.is_available():
            return "no GPU is visible to torch; TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU"
    if name == "cpu":
        from ssmkit import native

        return native.why_not() or None
    missing = f"its module {module} is not part of this installation"
    if "." not in module:
        missing = f"the package {module} is not installed"
    if name == "cuda":
        missing = "no hand-written CUDA kernel of this op is built; triton serves on a GPU"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found and "." not in module and _is_ours(found):
        return f"{missing}; `ssmkit.interop` answers to its name"
    return None if found else missing


def _is_ours(spec: ModuleSpec) -> bool:
    """Whether a package that was found is one of `ssmkit.interop` under another name, before or after its import."""
    return any(name.startswith("ssmkit.") for name in (spec.name, type(spec.loader).__module__))


def runs_on(row: Backend, device: str) -> bool:
    """Whether the row serves tensors of this device type; interpreted Triton also serves the CPU."""
    return row.device == device or (row.name == "triton" and device == "cpu" and interpreting())


def refusal(row: Backend, device: str, facts: dict[str, object]) -> str | None:
    """Why `row` cannot take a call on `device`; None if it can."""
    if not runs_on(row, device):
        return f"needs a {row.device} tensor, got {device}"
    reason = unusable(row.name, row.module)
    if reason is None and row.rejects is not None:
        reason = row.rejects(**facts)
    return reason


def choose(op: str, rows: Sequence[Backend], asked: str, x: Tensor, **facts: object) -> str:
    """Name of the backend that runs the call: `asked`, or for "auto" the first row that accepts it.

    Raises:
        ValueError: `asked` is not a backend of this op.
        BackendError: the backend asked for by name cannot take the call.
    """
    if asked == "reference":
        return asked
    known = [row.name for row in rows]
    if asked != "auto" and asked not in known:
        raise ValueError(f"{op}: backend must be one of auto, reference, {', '.join(known)}; got {asked!r}")
    device = x.device.type
    reasons = []
    for row in rows:
        if asked not in ("auto", row.name) or (asked == "auto" and row.device != device):
            continue
        reason = refusal(row, device, facts)
        if reason is None:
            return row.name
        reasons.append(f"{row.name}: {reason}")
    if asked != "auto":
        raise BackendError(
            f"{op}: no backend takes this call (asked for {asked!r}, known: {', '.join(known)}). {'; '.join(reasons)}"
        )
    if not torch.compiler.is_compiling():
        _say_reference(op, device, "; ".join(reasons) or f"no backend for {device} tensors")
    return "reference"


@cache
def _say_reference(op: str, device: str, reasons: str) -> None:
    warnings.warn(
        f"{op}: running the plain torch reference, which is slow, on {device} ({reasons}). "
        "`ssmkit doctor` lists the backends; backend='reference' silences this.",
        stacklevel=4,
    )


@cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


def load(rows: Sequence[Backend], name: str) -> ModuleType:
    """The kernel module of backend `name`, imported at its first use."""
    return _load(next(row.module for row in rows if row.name == name))
