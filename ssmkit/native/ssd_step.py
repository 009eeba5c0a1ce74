"""ssd_step on the CPU: a thin call into csrc/cpu/ssd_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_indices: Tensor | None,
) -> Tensor:
    """y (batch, nheads, headdim); `state` is updated in place. The op layer has checked everything."""
    slots = None if state_indices is None else state_indices.long()
    y = torch.empty(x.shape, dtype=x.dtype)
    library().ssd_step(
        (DTYPES[x.dtype], DTYPES[state.dtype], dt_softplus, torch.get_num_threads()),
        (dt_min, dt_max),
        (*x.shape, *B.shape[1:]),
        tuple(map(pointer, (state, x, dt, z, B, C, A, D, dt_bias, slots, y))),
        tuple(0 if rows is None else rows.stride(0) for rows in (x, dt, z, B, C, D)),
        D is not None and D.stride(1) == 1,
    )
    return y
