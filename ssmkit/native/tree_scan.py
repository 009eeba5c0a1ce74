"""tree_scan on the CPU: thin calls into csrc/cpu/tree_scan.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride


def forward(a: Tensor, b: Tensor, order: Tensor, parent: Tensor, both: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(h, xi). `xi` is the first sweep by position in the tree, for backward, where `save` is set, else empty."""
    h = torch.empty(b.shape, dtype=b.dtype)
    xi = torch.empty(b.shape if save else (0,), dtype=_state_dtype(b.dtype))
    library().tree_scan_forward(
        *_described(a, b, order, parent, both), b.data_ptr(), (h.data_ptr(), pointer(xi if save else None))
    )
    return h, xi


def backward(dh: Tensor, a: Tensor, xi: Tensor, order: Tensor, parent: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """(da, db)"""
    da, db = torch.empty(a.shape, dtype=a.dtype), torch.empty(dh.shape, dtype=dh.dtype)
    library().tree_scan_backward(
        *_described(a, dh, order, parent, both), (dh.data_ptr(), xi.data_ptr()), (da.data_ptr(), db.data_ptr())
    )
    return da, db


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _described(a: Tensor, rows: Tensor, order: Tensor, parent: Tensor, both: bool) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes, addresses and row strides in the order of csrc/bindings/tree_scan.cpp."""
    modes = (DTYPES[rows.dtype], both, torch.get_num_threads())
    # one tree for all of the batch, or one for each
    tree_stride = 0 if order.shape[0] == 1 else order.shape[1]
    return (
        modes,
        tuple(rows.shape),
        tuple(map(pointer, (a, order, parent))),
        (row_stride(a), row_stride(rows), tree_stride),
    )
