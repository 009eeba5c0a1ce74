"""linear_scan on the CPU: thin calls into csrc/cpu/linear_scan.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, final_state, states). `states` is h unrounded where backward needs it so and `save` is set, else empty."""
    nseq = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = _state_dtype(b.dtype)
    kept = save and a.ndim == 1 and b.dtype != acc
    h = torch.empty(b.shape, dtype=b.dtype)
    states = torch.empty(b.shape if kept else (0,), dtype=acc)
    final_state = torch.empty(nseq, b.shape[2], dtype=acc)
    library().linear_scan_forward(
        *_described(a, b, initial_state, flags, cu_seqlens, nseq, reverse),
        b.data_ptr(),
        (h.data_ptr(), pointer(states if kept else None), final_state.data_ptr()),
    )
    return h, final_state, states


def backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    a: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(da, db, dinitial_state); `states` is the output h, or what forward kept in its place."""
    nseq = dh.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    da, db = torch.empty(a.shape, dtype=a.dtype), torch.empty(dh.shape, dtype=dh.dtype)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    library().linear_scan_backward(
        *_described(a, dh, initial_state, flags, cu_seqlens, nseq, reverse),
        (dh.data_ptr(), pointer(dfinal_state), states.data_ptr()),
        (da.data_ptr(), db.data_ptr(), pointer(dinitial_state)),
    )
    return da, db, dinitial_state


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _described(
    a: Tensor,
    rows: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    nseq: int,
    reverse: bool,
) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes, addresses and row strides in the order of csrc/bindings/linear_scan.cpp."""
    modes = (DTYPES[rows.dtype], a.ndim == 1, reverse, torch.get_num_threads())
    strides = (0 if a.ndim == 1 else row_stride(a), row_stride(rows))
    return modes, (*rows.shape, nseq), tuple(map(pointer, (a, initial_state, flags, cu_seqlens))), strides
