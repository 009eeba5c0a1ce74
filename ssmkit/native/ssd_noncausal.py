"""ssd_noncausal on the CPU: thin calls into csrc/cpu/ssd_noncausal.cpp. The op layer has checked everything."""

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
    dt_bias: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the state of each sequence (nseq, nheads, headdim, dstate)."""
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, state = torch.empty(x.shape, dtype=x.dtype), A.new_empty(nseq, *x.shape[2:], B.shape[3])
    inputs = (x, dt, A, B, C, D, dt_bias, flags, cu_seqlens)
    library().ssd_noncausal_forward(
        *_described(inputs, nseq, dt_softplus, interleaved), (y.data_ptr(), state.data_ptr())
    )
    return y, state


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    interleaved: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, ddt_bias), None where the input is None."""
    inputs = (x, dt, A, B, C, D, dt_bias, flags, cu_seqlens)
    gradients = tuple(None if given is None else torch.empty(given.shape, dtype=given.dtype) for given in inputs[:7])
    library().ssd_noncausal_backward(
        *_described(inputs, len(state), dt_softplus, interleaved),
        (dy.data_ptr(), pointer(dstate), state.data_ptr()),
        row_stride(dy),
        tuple(map(pointer, gradients)),
    )
    return gradients


def _described(
    inputs: tuple[Tensor | None, ...], nseq: int, dt_softplus: bool, interleaved: bool
) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes, addresses and row strides in the order of csrc/bindings/ssd_noncausal.cpp."""
    x, dt, _, B, C, *_ = inputs
    assert x is not None and dt is not None and B is not None and C is not None
    modes = (DTYPES[x.dtype], dt_softplus, interleaved, torch.get_num_threads())
    strides = tuple(row_stride(t) for t in (x, dt, B, C))
    return modes, (*x.shape, *B.shape[2:], nseq), tuple(map(pointer, inputs)), strides
