"""The state that each packed sequence leaves behind, for decoding after a packed prefill."""

import torch
from torch import Tensor

from ssmkit.ops._check import check_cu_seqlens, check_ndim


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each sequence, oldest first; what lies before its first token is zero.

    Args:
        x: Inputs of all sequences                 (total_tokens, dim)
        cu_seqlens: Their offsets                  (batch + 1,) int
        state_len: Entries of a state.
    Returns:
        (batch, dim, state_len), channels last in memory.
    """
    check_ndim("x", x, "total_tokens, dim")
    check_cu_seqlens(cu_seqlens, 1, len(x))
    if state_len < 1:
        raise ValueError(f"state_len must be at least 1, got {state_len}")
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    row = ends - state_len + torch.arange(state_len, device=x.device)
    states = x.new_zeros(*row.shape, x.shape[1])
    real = row >= starts
    states[real] = x[row[real]]
    return states.transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
