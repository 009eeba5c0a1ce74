"""cross_selective_scan on the CPU: thin calls into csrc/cpu/cross_selective_scan.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride
from ssmkit.native.selective_scan import CHUNK

Walks = list[tuple[Tensor | None, Tensor | None, bool]]  # per path: order, flags, reverse


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    walks: Walks,
    dt_softplus: bool,
    merged: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the states before every 64th position of each path (none of them unless `save`)."""
    (batch, seqlen, dim), (npaths, _, dstate) = x.shape, A.shape
    y = x.new_empty(x.shape if merged else (batch, seqlen, npaths, dim))
    checkpoints = A.new_empty(npaths, batch * -(-seqlen // CHUNK) if save else 0, dstate, dim)
    library().cross_selective_scan_forward(
        *_described((x, dt, A, B, C, D, z, dt_bias, dt_weight), walks, dt_softplus, merged),
        (y.data_ptr(), pointer(checkpoints if save else None)),
    )
    return y, checkpoints


def backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    walks: Walks,
    checkpoints: Tensor,
    dt_softplus: bool,
    merged: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, ddt_weight), None where the input is None."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_weight)
    gradients = tuple(None if given is None else torch.empty(given.shape, dtype=given.dtype) for given in inputs)
    library().cross_selective_scan_backward(
        *_described(inputs, walks, dt_softplus, merged),
        (checkpoints.data_ptr(), dy.data_ptr()),
        (row_stride(dy), 0 if merged else dy.stride(2)),
        tuple(map(pointer, gradients)),
    )
    return gradients


def _described(
    inputs: tuple[Tensor | None, ...], walks: Walks, dt_softplus: bool, merged: bool
) -> tuple[tuple[object, ...] | list[object], ...]:
    """Modes, sizes, addresses, strides and paths in the order of csrc/bindings/cross_selective_scan.cpp."""
    x, dt, A, B, C, _, z, _, dt_weight = inputs
    assert x is not None and dt is not None and A is not None and B is not None and C is not None
    npaths, _, dstate = A.shape
    modes = (DTYPES[x.dtype], dt_softplus, merged, torch.get_num_threads())
    rows = tuple(0 if t is None else row_stride(t) for t in (x, dt, z, B, C))
    paths = tuple(t.stride(2) for t in (dt, B, C))
    tables: list[object] = [(pointer(order), pointer(flags), reverse) for order, flags, reverse in walks]
    sizes = (*x.shape, dstate, npaths, B.shape[3], C.shape[3], 0 if dt_weight is None else dt_weight.shape[2])
    return modes, sizes, tuple(map(pointer, inputs)), (*rows, *paths), tables
