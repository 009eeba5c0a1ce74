"""Second stage of the chunked scan: states handed from chunk to chunk.

    state after chunk c = exp(sum of dt A over c) * state before it + what c adds

Dao & Gu 2024, arXiv:2405.21060, section 6. Plain torch: `ssmkit.ops.ssd` keeps this stage inside one kernel.
"""

import torch
from torch import Tensor

from ssmkit.ops._check import check_shape


def _state_passing_fwd(
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`state_passing`; with seq_idx (batch, seqlen) a chunk that ends in another sequence drops the state before it.

    `out` is in out_dtype, by default the dtype of states.
    """
    batch, nchunks, nheads, dim = states.shape
    check_shape("dA_chunk_cumsum", dA_chunk_cumsum, (batch, nheads, nchunks), "batch, nheads, nchunks")
    wide = torch.promote_types(states.dtype, torch.float32)
    decay = dA_chunk_cumsum.to(wide).exp()
    if seq_idx is not None:
        if chunk_size is None:
            raise ValueError("chunk_size must be given with seq_idx, got None")
        ends = torch.arange(1, nchunks + 1, device=states.device).mul(chunk_size).clamp(max=seq_idx.shape[1]) - 1
        number = seq_idx[:, ends]
        # before the first chunk there is sequence 0
        before = torch.cat([torch.zeros_like(number[:, :1]), number[:, :-1]], dim=1)
        decay = torch.where((number == before)[:, None], decay, 0.0)
    state = states.new_zeros(batch, nheads, dim, dtype=wide) if initial_states is None else initial_states.to(wide)
    passed = []
    for chunk in range(nchunks):
        passed.append(state)
        state = decay[:, :, chunk, None] * state + states[:, chunk].to(wide)
    out = torch.stack(passed, dim=1) if passed else states.to(wide)
    return out.to(out_dtype or states.dtype), state


def state_passing(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and that after the last.

    Args:
        states: What each chunk adds                        (batch, nchunks, nheads, dim)
        dA_chunk_cumsum: Sum of dt A over each chunk         (batch, nheads, nchunks)
        initial_states: State before the first, else zero    (batch, nheads, dim)
    Returns:
        out (batch, nchunks, nheads, dim) in the dtype of states, and the final states (batch, nheads, dim) in fp32.
    """
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


def state_passing_ref(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`state_passing` in float64, both results rounded to the dtype of states."""
    initial = None if initial_states is None else initial_states.double()
    out, final = state_passing(states.double(), dA_chunk_cumsum.double(), initial)
    return out.to(states.dtype), final.to(states.dtype)
