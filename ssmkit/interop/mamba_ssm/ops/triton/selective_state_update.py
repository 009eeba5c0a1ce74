"""selective_state_update: one token of Mamba-1 or Mamba-2, the state updated in place."""

from functools import partial
from typing import Any

from torch import Tensor

from ssmkit.interop.layout import common_dtype, widen
from ssmkit.ops import selective_state_step, ssd_step
from ssmkit.ops._check import check_ndim, check_shape


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`ssmkit.ops.ssd_step` where A, dt and dt_bias are expanded over the channels of a head, else `selective_state_step`.

    Inputs of several dtypes are widened to the widest; the output is as x, the state keeps its own dtype. Unlike there
    D and dt_bias may be missing.

    Args:
        state: (slots, dim, dstate) or (slots, nheads, dim, dstate), updated in place
        x, dt, z: (batch, dim) or (batch, nheads, dim)
        A: (dim, dstate) or (nheads, dim, dstate)
        B, C: (batch, dstate) or (batch, ngroups, dstate)
        D, dt_bias: (dim,) or (nheads, dim)
        dt_softplus: Apply softplus to dt.
        state_batch_indices: Slot of each row, negative for none, whose output is 0    (batch,) int
        backend: Handed to the op.
    """
    if state.ndim not in (3, 4):
        raise ValueError(
            f"state must have shape (slots, dim, dstate) or (slots, nheads, dim, dstate), got {tuple(state.shape)}"
        )
    axes = "batch, nheads, dim" if state.ndim == 4 else "batch, dim"
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        if tensor is not None:
            check_ndim(name, tensor, axes)
            check_shape(name, tensor, x.shape, axes)
    heads = state.shape[1:-1]
    check_shape("A", A, state.shape[1:], "[nheads,] dim, dstate, as state")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_shape(name, vector, heads, "[nheads,] dim, as state")

    dtype = x.dtype
    x, dt, B, C, z = widen(common_dtype(x, dt, B, C, z), x, dt, B, C, z)  # type: ignore[assignment]
    held = state if state.is_contiguous() else state.contiguous()
    options: dict[str, Any] = {"dt_softplus": dt_softplus, "state_indices": state_batch_indices, "backend": backend}
    if state.ndim == 4 and _tied(dt, 1) and _tied(A, 2) and (dt_bias is None or _tied(dt_bias, 1)):
        bias = None if dt_bias is None else dt_bias[:, 0]
        y = ssd_step(held, x, dt[..., 0], A[:, 0, 0], B, C, D=D, z=z, dt_bias=bias, **options)
    else:
        y = selective_state_step(
            held.flatten(1, -2),
            _flat(x),
            _flat(dt),
            A.flatten(0, -2),
            B,
            C,
            D=None if D is None else D.flatten(),
            z=None if z is None else _flat(z),
            dt_bias=None if dt_bias is None else dt_bias.flatten(),
            **options,
        ).view(x.shape)
    if held is not state:
        state.copy_(held)
    return y.to(dtype)


def _tied(tensor: Tensor, axes: int) -> bool:
    """Whether the last axes repeat one number: expanded, or of size one."""
    sizes, strides = tensor.shape[-axes:], tensor.stride()[-axes:]
    return all(stride == 0 or size == 1 for size, stride in zip(sizes, strides, strict=True))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


selective_state_update_ref = partial(selective_state_update, backend="reference")
