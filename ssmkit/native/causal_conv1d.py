"""causal_conv1d on the CPU: thin calls into csrc/cpu/causal_conv1d.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer, row_stride


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final_state)."""
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype)
    final_state = x.new_empty(nseq, weight.shape[1] - 1, x.shape[2])
    if x.numel() == 0:
        return y, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    inputs = (x, weight, bias, initial_state, order, flags, cu_seqlens)
    library().causal_conv1d_forward(*_described(inputs, nseq, reverse, silu), (y.data_ptr(), final_state.data_ptr()))
    return y, final_state


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_state), None where the input is None."""
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.numel() == 0:
        dinitial_state = initial_state if initial_state is None or dfinal_state is None else dfinal_state.clone()
        if dinitial_state is initial_state and initial_state is not None:
            dinitial_state = torch.zeros_like(initial_state)
        dbias = None if bias is None else torch.zeros_like(bias)
        return torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(weight), dbias, dinitial_state
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    inputs = (x, weight, bias, initial_state, order, flags, cu_seqlens)
    library().causal_conv1d_backward(
        *_described(inputs, nseq, reverse, silu),
        (dy.data_ptr(), pointer(dfinal_state)),
        row_stride(dy),
        tuple(map(pointer, (dx, dweight, dbias, dinitial_state))),
    )
    return dx, dweight, dbias, dinitial_state


def _described(inputs: tuple[Tensor | None, ...], nseq: int, reverse: bool, silu: bool) -> tuple[tuple[int, ...], ...]:
    """Modes, sizes and addresses in the order of csrc/bindings/causal_conv1d.cpp."""
    x, weight = inputs[0], inputs[1]
    assert x is not None and weight is not None
    modes = (DTYPES[x.dtype], silu, reverse, torch.get_num_threads())
    return modes, (*x.shape, weight.shape[1], nseq, row_stride(x)), tuple(map(pointer, inputs))
