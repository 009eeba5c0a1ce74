"""ssd on the CPU: thin calls into csrc/cpu/ssd*.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride


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
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    addend: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    chunk: int,
    save: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y (in the dtype of states if `wide`), the final state, and for backward the states before each chunk and y before
    the gate (none of them unless `save`)."""
    batch, seqlen, nheads, headdim = x.shape
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = batch * -(-seqlen // chunk) if cu_seqlens is None else seqlen // chunk + nseq
    y = torch.empty(x.shape, dtype=A.dtype if wide else x.dtype)
    final_state = A.new_empty(nseq, nheads, headdim, B.shape[3])
    checkpoints = A.new_empty(slots if save else 0, nheads, B.shape[3], headdim)
    ungated = A.new_empty(x.shape) if save and z is not None else None
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens)
    library().ssd_forward(
        *_described(inputs, nseq, dt_softplus, (dt_min, dt_max), reverse, chunk, wide),
        (
            pointer(addend),
            y.data_ptr(),
            final_state.data_ptr(),
            pointer(checkpoints if save else None),
            pointer(ungated),
        ),
    )
    return y, final_state, checkpoints, ungated


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
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    ungated: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    chunk: int,
    wide: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state), None where the input is None.

    With `wide` those per token are in the dtype of states. dz is None without `ungated`, y before the gate.
    """
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens)
    gradients = tuple(
        None if given is None else torch.empty(given.shape, dtype=A.dtype if wide else given.dtype)
        for given in (x, dt, A, B, C, D, None if ungated is None else z, dt_bias, initial_state)
    )
    library().ssd_backward(
        *_described(inputs, nseq, dt_softplus, (dt_min, dt_max), reverse, chunk, wide),
        (dy.data_ptr(), pointer(dfinal_state), checkpoints.data_ptr(), pointer(ungated)),
        row_stride(dy),
        tuple(map(pointer, gradients)),
    )
    return gradients


def _described(
    inputs: tuple[Tensor | None, ...],
    nseq: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    reverse: bool,
    chunk: int,
    wide: bool,
) -> tuple[tuple[float, ...], ...]:
    """Modes, dt_limit, sizes, addresses and row strides in the order of csrc/bindings/ssd.cpp."""
    x, dt, _, B, C, _, z, *_ = inputs
    assert x is not None and dt is not None and B is not None and C is not None
    modes = (DTYPES[x.dtype], dt_softplus, reverse, wide, torch.get_num_threads(), chunk)
    strides = tuple(0 if t is None else row_stride(t) for t in (x, dt, B, C, z))
    return modes, dt_limit, (*x.shape, *B.shape[2:], nseq), tuple(map(pointer, inputs)), strides
