"""Checks of arguments: each error names the argument, what was expected, what came, and the way out."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEXES = (torch.complex64, torch.complex128)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], axes: str = "") -> None:
    """`tensor` must have exactly this shape; `axes` names its axes in the message."""
    if tuple(tensor.shape) != tuple(expected):
        legend = f" ({axes})" if axes else ""
        raise ValueError(f"{name} must have shape {tuple(expected)}{legend}, got {tuple(tensor.shape)}")


def check_ndim(name: str, tensor: Tensor, axes: str) -> None:
    """`tensor` must have one dimension per name in `axes`, for example "batch, seqlen, dim"."""
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape ({axes}), got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """`tensor` must have one of the dtypes; `why` says what decides them."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        reason = f" {why}" if why else ""
        raise ValueError(
            f"{name} must be of dtype {names}{reason}, got {str(tensor.dtype).removeprefix('torch.')}; "
            f"cast it with {name}.to(...)"
        )


def parameter_dtypes(x: Tensor, name: str = "x") -> tuple[tuple[torch.dtype, ...], str]:
    """Dtypes of a parameter beside `x`, and why: a lower precision is widened, a wider one would be narrowed."""
    why = f"because {name} is {str(x.dtype).removeprefix('torch.')}"
    if x.is_complex():
        return (COMPLEXES if x.dtype == torch.complex128 else COMPLEXES[:1]), why
    return (FLOATS if x.dtype == torch.float64 else FLOATS[:3]), why


def check_device(like: Tensor, like_name: str = "x", /, **tensors: Tensor | None) -> None:
    """Every tensor given must lie on the device of `like`, which the message calls `like_name`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name} must be on {like.device} like {like_name}, got {tensor.device}; "
                f"move it with {name}.to({str(like.device)!r})"
            )


def check_sizes(like: Tensor, name: str = "x") -> None:
    """Every axis that the kernels walk in 32 bits must fit; the product may be larger."""
    if any(isinstance(size, int) and size >= 2**31 for size in like.shape):
        raise ValueError(f"each axis of {name} must be shorter than 2**31, got {tuple(like.shape)}")


def check_flag(name: str, tensor: Tensor | None, batch: int, seqlen: int) -> None:
    """A per-token flag is a bool tensor (batch, seqlen)."""
    if tensor is None:
        return
    check_shape(name, tensor, (batch, seqlen), "batch, seqlen")
    check_dtype(name, tensor, (torch.bool,))


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, seqlen: int, name: str = "x") -> None:
    """Offsets of packed sequences: start at 0, never descend, end at seqlen; batch is 1.

    Values are not read while compiling; those on a GPU, which have to be waited for, once for each tensor.
    """
    check_ndim("cu_seqlens", cu_seqlens, "nseq + 1")
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs sequences into one row: {name} must have batch 1, got {batch}; flatten the batch"
        )
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have at least one entry, got none")
    if torch.compiler.is_compiling():
        return
    # What happened to a tensor of inference mode since, or to memory shared with NumPy, leaves no trace.
    seen = None if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference() else (cu_seqlens._version, seqlen)
    if seen is not None and getattr(cu_seqlens, "_ssmkit_checked", None) == seen:
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != seqlen:
        raise ValueError(f"cu_seqlens must run from 0 to seqlen {seqlen}, got {offsets[0]} to {offsets[-1]}")
    for place, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise ValueError(f"cu_seqlens must not descend: entry {place + 1} is {end} after {start}")
    if seen is not None:
        cu_seqlens._ssmkit_checked = seen  # type: ignore[attr-defined]


def check_limits(dt_limit: Sequence[float]) -> None:
    """Bounds of the step sizes."""
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with low <= high, got {tuple(dt_limit)}")


def check_heads(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: str,
) -> None:
    """The inputs that all ops over heads share; `rows` names the axes before those of x's heads and their channels."""
    check_ndim("x", x, f"{rows}, nheads, headdim")
    check_dtype("x", x, FLOATS)
    *before, nheads, headdim = x.shape
    check_shape("dt", dt, (*before, nheads), f"{rows}, nheads")
    if z is not None:
        check_shape("z", z, x.shape, f"{rows}, nheads, headdim")
    for name, weight in (("B", B), ("C", C)):
        check_ndim(name, weight, f"{rows}, ngroups, dstate")
        check_shape(name, weight, (*before, *B.shape[-2:]), f"{rows}, ngroups, dstate")
    ngroups = B.shape[-2]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(f"B has {ngroups} groups, which must divide nheads {nheads}")
    for name, tensor in (("dt", dt), ("z", z), ("B", B), ("C", C)):
        if tensor is not None:
            check_dtype(name, tensor, (x.dtype,), "like x")
    if D is not None and D.ndim != 1:
        check_shape("D", D, (nheads, headdim), "nheads, headdim; or nheads alone")
    for name, vector in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            if vector.ndim != 2 or name != "D":
                check_shape(name, vector, (nheads,), "nheads")
            check_dtype(name, vector, *parameter_dtypes(x))


def check_step_state(state: Tensor, sizes: Sequence[int], axes: str, x: Tensor, state_indices: Tensor | None) -> None:
    """A state updated in place: dense, a slot of `sizes` for each row of x or, with state_indices, any number of slots."""
    batch = x.shape[0]
    check_ndim("state", state, axes)
    check_shape("state", state, (batch if state_indices is None else state.shape[0], *sizes), axes)
    narrow, why = parameter_dtypes(x)
    check_dtype("state", state, (x.dtype,) if x.dtype == torch.float64 else narrow, why)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous to be updated in place, got strides {state.stride()}")
    check_row_indices("state_indices", state_indices, batch)


def check_row_indices(name: str, indices: Tensor | None, batch: int) -> None:
    """One integer for each row of the batch."""
    if indices is not None:
        check_shape(name, indices, (batch,), "batch")
        check_dtype(name, indices, (torch.int32, torch.int64))


def check_slots(state_indices: Tensor | None, slots: int) -> None:
    """Indices on the CPU lie below the number of slots. Those on a GPU are not waited for: kernels skip what is beyond."""
    if state_indices is not None and state_indices.device.type == "cpu" and state_indices.numel():
        most = int(state_indices.max())
        if most >= slots:
            raise ValueError(f"state_indices must be below the number of slots {slots}, got {most}")
