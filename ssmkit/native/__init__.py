"""The compiled library `_native` (csrc/): loaded once; where it cannot be, the reason is kept and said."""

from __future__ import annotations

import importlib
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch  # before _native, so that both share torch's OpenMP runtime

# numbers of csrc/common/dtype.h
DTYPES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 4,
    torch.complex128: 5,
}

_REBUILD = "reinstall with a C++17 compiler at hand (`pip install -e .` in a checkout)"


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why not, with the remedy."""
    here = Path(__file__).parent
    built = sorted(path.name for path in here.glob("_native.*") if path.suffix in (".so", ".pyd"))
    usable = [name for name in built if name.removeprefix("_native") in EXTENSION_SUFFIXES]
    if not built:
        return None, f"the compiled library was not built (SSMKIT_NATIVE=0, or a source tree as it stands); {_REBUILD}"
    if not usable:
        return None, f"the compiled library was built for another Python or platform ({', '.join(built)}); {_REBUILD}"
    try:
        library = importlib.import_module("ssmkit.native._native")
    except ImportError as error:
        return None, f"the compiled library does not load ({error}); {_REBUILD}"
    wanted = os.environ.get("SSMKIT_CPU_CAPABILITY", "") or "auto"
    try:
        library.set_cpu_capability(wanted)
    except ValueError as error:
        known = ", ".join(library.cpu_capabilities())
        return None, f"SSMKIT_CPU_CAPABILITY={wanted!r} is refused: {error}; usable here: auto, {known}"
    return library, ""


_library, _reason = _load()


def why_not() -> str:
    """Why the compiled library cannot be used here, with the remedy; empty if it can."""
    return _reason


def library() -> ModuleType:
    """The compiled module; RuntimeError with the reason where there is none."""
    if _library is None:
        raise RuntimeError(f"ssmkit.native: {_reason}")
    return _library


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def row_stride(tensor: torch.Tensor) -> int:
    """Elements from one token row to the next, for a tensor of flat rows (batch, seqlen, ...)."""
    return tensor.stride(1 if tensor.shape[1] > 1 else 0)
