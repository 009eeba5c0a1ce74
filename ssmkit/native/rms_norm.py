"""rms_norm on the CPU: thin calls into csrc/cpu/rms_norm.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, x + residual or None, rstd); x, residual and z are (rows, dim), rstd (rows, ngroups)."""
    rows, dim = x.shape
    y = torch.empty(rows, dim, dtype=x.dtype)
    total = None if residual is None else torch.empty(rows, dim, dtype=total_dtype)
    rstd = torch.empty(rows, dim // group_size, dtype=weight.dtype)
    library().rms_norm_forward(
        _modes(x.dtype, x.dtype if total is None else total.dtype, norm_before_gate),
        (rows, dim, group_size),
        tuple(map(pointer, (weight, bias, z))),
        (_stride(z), _stride(x), _stride(residual)),
        eps,
        DTYPES[x.dtype if residual is None else residual.dtype],
        (x.data_ptr(), pointer(residual)),
        (y.data_ptr(), pointer(total), rstd.data_ptr()),
    )
    return y, total, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    rest: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    rstd: Tensor,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx in the dtype of total, dweight, dbias, dz), None where the input is None; total + rest was normalised."""
    dx = torch.empty(total.shape, dtype=total.dtype)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype)
    library().rms_norm_backward(
        _modes(dy.dtype, total.dtype, norm_before_gate),
        (*total.shape, group_size),
        tuple(map(pointer, (weight, bias, z))),
        tuple(map(_stride, (z, dy, dtotal, total, rest))),
        (dy.data_ptr(), pointer(dtotal), total.data_ptr(), pointer(rest), rstd.data_ptr()),
        tuple(map(pointer, (dx, dweight, dbias, dz))),
    )
    return dx, dweight, dbias, dz


def _modes(dtype: torch.dtype, total_dtype: torch.dtype, norm_before_gate: bool) -> tuple[int, ...]:
    return DTYPES[dtype], DTYPES[total_dtype], int(norm_before_gate), torch.get_num_threads()


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
