"""grid_scan on the CPU: thin calls into csrc/cpu/grid_scan*.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride

# x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left
Inputs = tuple[Tensor | None, ...]


def forward(
    inputs: Inputs, size: tuple[int, int], dt_softplus: bool, from_bottom: bool, from_right: bool, slots: int
) -> tuple[Tensor, Tensor]:
    """y, and the states along the borders of tiles in `slots` slots (0: they are not kept).

    The inputs are per-token tensors (batch, height * width, ...) in flat rows, and dense parameters.
    """
    x, A = inputs[0], inputs[3]
    assert x is not None and A is not None
    y = torch.empty(x.shape, dtype=x.dtype)
    checkpoints = A.new_empty(slots, A.shape[1], x.shape[2])
    library().grid_scan_forward(
        *_described(inputs, size, dt_softplus, from_bottom, from_right),
        (y.data_ptr(), pointer(checkpoints if slots else None)),
    )
    return y, checkpoints


def backward(
    dy: Tensor,
    inputs: Inputs,
    checkpoints: Tensor,
    size: tuple[int, int],
    dt_softplus: bool,
    from_bottom: bool,
    from_right: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, None where the input is None."""
    gradients = tuple(None if given is None else torch.empty(given.shape, dtype=given.dtype) for given in inputs)
    library().grid_scan_backward(
        *_described(inputs, size, dt_softplus, from_bottom, from_right),
        (checkpoints.data_ptr(), dy.data_ptr()),
        row_stride(dy),
        tuple(map(pointer, gradients)),
    )
    return gradients


def _described(
    inputs: Inputs, size: tuple[int, int], dt_softplus: bool, from_bottom: bool, from_right: bool
) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes, addresses and row strides in the order of csrc/bindings/grid_scan.cpp."""
    x, dt_top, dt_left, A, _, B_top, B_left, C, _, z, *_ = inputs
    assert x is not None and A is not None
    strides = tuple(0 if t is None else row_stride(t) for t in (x, dt_top, dt_left, B_top, B_left, C, z))
    modes = (DTYPES[x.dtype], dt_softplus, from_bottom, from_right, torch.get_num_threads())
    return modes, (x.shape[0], *size, x.shape[2], A.shape[1]), tuple(map(pointer, inputs)), strides
