"""First stages of the chunked scan: decays summed within chunks, and the state that each chunk adds.

    dA_cumsum_t = sum_{s <= t} dt_s A                                       over the tokens of the chunk
    state_c = sum_{t in c} exp(dA_cumsum_last - dA_cumsum_t) dt_t x_t B_t^T

Dao & Gu 2024, arXiv:2405.21060, section 6. Plain torch: `ssmkit.ops.ssd` keeps these stages inside one kernel, and code
that calls them one by one pays for the tensors in between.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops._check import check_shape


def _chunk_cumsum_fwd(
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """dA_cumsum and the step sizes used, both (batch, nheads, nchunks, chunk_size), of dt (batch, seqlen, nheads).

    Tokens that are missing from the last chunk have a step of zero.
    """
    dt = _wide(dt)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    steps = into_chunks(dt, math.ceil(dt.shape[1] / chunk_size), chunk_size).permute(0, 3, 1, 2)
    return (steps * A.to(dt.dtype)[:, None, None]).cumsum(-1), steps


def _chunk_state_fwd(
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    seq_idx: Tensor | None = None,
    states: Tensor | None = None,
    states_in_fp32: bool = True,
) -> Tensor:
    """`chunk_state`, of the tokens of each chunk's last sequence only, if seq_idx (batch, seqlen) is given.

    With `states`, the result is also written there.
    """
    nheads = x.shape[2]
    nchunks, chunk_size = dt.shape[2:]
    check_shape("dt", dt, (x.shape[0], nheads, nchunks, chunk_size), "batch, nheads, nchunks, chunk_size")
    check_shape("dA_cumsum", dA_cumsum, dt.shape, "batch, nheads, nchunks, chunk_size")
    if x.shape[1] > nchunks * chunk_size:
        raise ValueError(f"x must have at most {nchunks} * {chunk_size} tokens, as dt has, got {x.shape[1]}")
    left = (dA_cumsum[..., -1:] - dA_cumsum).exp() * dt
    if seq_idx is not None:
        numbers = F.pad(seq_idx, (0, nchunks * chunk_size - x.shape[1]), mode="constant", value=-1)
        last = torch.arange(1, nchunks + 1, device=x.device).mul(chunk_size).clamp(max=x.shape[1]) - 1
        same = numbers.unflatten(1, (nchunks, chunk_size)) == seq_idx[:, last, None]
        left = torch.where(same[:, None], left, 0.0)
    x_BCLHP, B_BCLHN = (into_chunks(_wide(t), nchunks, chunk_size) for t in (x, per_head(B, nheads)))
    added = B_BCLHN * left.permute(0, 2, 3, 1)[..., None].to(B_BCLHN.dtype)
    out = torch.einsum("bclhn,bclhp->bchpn", added, x_BCLHP)
    out = out if states_in_fp32 else out.to(B.dtype)
    return out if states is None else states.copy_(out)


def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """The state that each chunk adds.

    Args:
        B: Input weights            (batch, seqlen, ngroups, dstate)
        x: Input                    (batch, seqlen, nheads, headdim)
        dt, dA_cumsum: Step sizes and the sums above  (batch, nheads, nchunks, chunk_size)
        states_in_fp32: Return fp32 (fp64 for fp64), not the dtype of B.
    Returns:
        (batch, nchunks, nheads, headdim, dstate)
    """
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor) -> Tensor:
    """`chunk_state` in float64, rounded to the dtype of x."""
    return chunk_state(B.double(), x.double(), dt.double(), dA_cumsum.double()).to(x.dtype)


def chunk_state_varlen(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor
) -> Tensor:
    """The state after each of several sequences packed into one row.

    Args:
        B, x: As in `chunk_state`, without a batch axis.
        dt, dA_cumsum: (nheads, nchunks, chunk_size)
        cu_seqlens: Offsets of the sequences     (nseq + 1,) int
        chunk_states: State before each chunk, of the sequence that runs on into it  (nchunks, nheads, headdim, dstate)
    Returns:
        (nseq, nheads, headdim, dstate) in the dtype of chunk_states; zero for a sequence without tokens.
    """
    nheads, chunk_size = x.shape[1], dt.shape[2]
    states, offsets = [], cu_seqlens.tolist()
    for start, end in pairwise(offsets):
        if start == end:
            states.append(torch.zeros_like(chunk_states[0]))
            continue
        chunk = (end - 1) // chunk_size
        begin = chunk * chunk_size
        tokens = slice(max(start, begin), end)
        here = slice(tokens.start - begin, end - begin)
        decay = dA_cumsum[:, chunk]
        left = (decay[:, here.stop - 1 :][:, :1] - decay[:, here]).exp() * dt[:, chunk, here]
        weights = per_head(_wide(B[tokens]), nheads) * left.T[..., None].to(_wide(B[:0]).dtype)
        state = torch.einsum("lhn,lhp->hpn", weights, _wide(x[tokens]))
        if start < begin:
            state = state + decay[:, here.stop - 1].exp()[:, None, None] * chunk_states[chunk]
        states.append(state.to(chunk_states.dtype))
    return torch.stack(states) if states else chunk_states.new_zeros(0, *chunk_states.shape[1:])


def per_head(weight: Tensor, nheads: int) -> Tensor:
    """(..., ngroups, dstate) as (..., nheads, dstate)."""
    ngroups = weight.shape[-2]
    if nheads % ngroups:
        raise ValueError(f"B and C must have groups that divide the {nheads} heads, got {ngroups}")
    return weight.repeat_interleave(nheads // ngroups, dim=-2)


def into_chunks(tensor: Tensor, nchunks: int, chunk_size: int) -> Tensor:
    """(batch, seqlen, ...) as (batch, nchunks, chunk_size, ...), zeros after the last token."""
    more = nchunks * chunk_size - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, more)).unflatten(1, (nchunks, chunk_size))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
