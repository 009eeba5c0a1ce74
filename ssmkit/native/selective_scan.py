"""selective_scan on the CPU: thin calls into csrc/cpu/selective_scan*.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride

CHUNK = 64  # tokens between checkpoints, kChunk of csrc/cpu/walk.h


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before every 64th position (none of them unless `save`)."""
    batch, seqlen, dim = x.shape
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = batch * -(-seqlen // CHUNK) if cu_seqlens is None else seqlen // CHUNK + nseq
    y = torch.empty(x.shape, dtype=x.dtype)
    final_state = A.new_empty(nseq, dim, A.shape[1])
    checkpoints = A.new_empty(slots if save else 0, A.shape[1], dim)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens)
    library().selective_scan_forward(
        *_described(inputs, nseq, dt_softplus, reverse),
        (y.data_ptr(), final_state.data_ptr(), pointer(checkpoints if save else None)),
    )
    return y, final_state, checkpoints


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state), None where the input is None."""
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens)
    gradients = tuple(
        None if given is None else torch.empty(given.shape, dtype=given.dtype)
        for given in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    )
    library().selective_scan_backward(
        *_described(inputs, nseq, dt_softplus, reverse),
        (checkpoints.data_ptr(), dy.data_ptr(), pointer(dfinal_state)),
        row_stride(dy),
        tuple(map(pointer, gradients)),
    )
    return gradients


def _described(
    inputs: tuple[Tensor | None, ...], nseq: int, dt_softplus: bool, reverse: bool
) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes, addresses and row strides in the order of csrc/bindings/selective_scan.cpp."""
    x, dt, A, B, C, _, z, *_ = inputs
    assert x is not None and dt is not None and A is not None and B is not None and C is not None
    groups = tuple(weight.shape[2] if weight.ndim == 4 else 0 for weight in (B, C))
    strides = tuple(0 if t is None or t.ndim == 2 else row_stride(t) for t in (x, dt, z, B, C))
    modes = (DTYPES[x.dtype], A.is_complex(), dt_softplus, reverse, torch.get_num_threads())
    return modes, (*x.shape, A.shape[1], nseq, *groups), tuple(map(pointer, inputs)), strides
