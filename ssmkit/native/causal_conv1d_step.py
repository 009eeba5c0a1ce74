"""causal_conv1d_step on the CPU: a thin call into csrc/cpu/causal_conv1d_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
    silu: bool,
) -> Tensor:
    """y like x; `state` is updated in place. The op layer has checked everything."""
    seen, slots = (None if t is None else t.long() for t in (cache_seqlens, state_indices))
    y = torch.empty(x.shape, dtype=x.dtype)
    seqlen = x.shape[1] if x.ndim == 3 else 1
    library().causal_conv1d_step(
        (
            DTYPES[x.dtype],
            DTYPES[state.dtype],
            DTYPES[weight.dtype],
            0 if bias is None else DTYPES[bias.dtype],
            silu,
            torch.get_num_threads(),
        ),
        (x.shape[0], seqlen, *weight.shape, state.shape[1], x.stride(0), x.stride(1) if x.ndim == 3 else 0),
        tuple(map(pointer, (x, state, weight, bias, seen, slots, y))),
    )
    return y
