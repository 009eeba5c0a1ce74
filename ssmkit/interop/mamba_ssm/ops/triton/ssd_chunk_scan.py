"""Last stage of the chunked scan: the output, from the tokens of the same chunk and the state before it.

    y_t = sum_{s <= t in c} (C_t . B_s) exp(dA_cumsum_t - dA_cumsum_s) dt_s x_s + exp(dA_cumsum_t) state_c C_t + D x_t

Dao & Gu 2024, arXiv:2405.21060, section 6. Plain torch: `ssmkit.ops.ssd` keeps this stage inside one kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.interop.mamba_ssm.ops.triton.ssd_chunk_state import into_chunks, per_head
from ssmkit.ops._check import check_shape


def chunk_scan(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """The output of the chunked scan, times silu(z) if z is given; fp32 inside.

    Args:
        B, C: Input and output weights   (batch, seqlen, ngroups, dstate)
        x, z: Input and gate             (batch, seqlen, nheads, headdim)
        dt, dA_cumsum: Step sizes and their sums with A, as of `ssd_chunk_state`  (batch, nheads, nchunks, chunk_size)
        prev_states: State before each chunk, as of `ssd_state_passing`
            (batch, nchunks, nheads, headdim, dstate)
        D: Skip weights                  (nheads,) or (nheads, headdim)
    Returns:
        as x
    """
    batch, seqlen, nheads, headdim = x.shape
    nchunks, chunk_size = dt.shape[2:]
    if seqlen != nchunks * chunk_size:
        raise ValueError(f"x must have {nchunks} * {chunk_size} tokens, as dt has, got {seqlen}; pad with dt of zero")
    states = (batch, nchunks, nheads, headdim, B.shape[-1])
    check_shape("prev_states", prev_states, states, "batch, nchunks, nheads, headdim, dstate")
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = (per_head(B, nheads), per_head(C, nheads), x)
    B_BCLHN, C_BCLHN, x_BCLHP = (into_chunks(part.to(wide), nchunks, chunk_size) for part in parts)
    decay_BCHL = dA_cumsum.to(wide).transpose(1, 2)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    # masked before exp: what lies ahead would overflow, and its gradient with it
    gap = (decay_BCHL[..., :, None] - decay_BCHL[..., None, :]).masked_fill(later, -torch.inf)
    scores = (
        torch.einsum("bclhn,bcshn->bchls", C_BCLHN, B_BCLHN) * gap.exp() * dt.to(wide).transpose(1, 2)[..., None, :]
    )
    y = torch.einsum("bchls,bcshp->bclhp", scores, x_BCLHP)
    carried = torch.einsum("bclhn,bchpn->bclhp", C_BCLHN, prev_states.to(wide))
    y = (y + carried * decay_BCHL.exp().transpose(2, 3)[..., None]).flatten(1, 2)
    if D is not None:
        y = y + x.to(wide) * (D if D.ndim == 2 else D[:, None]).to(wide)
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)


def chunk_scan_ref(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """`chunk_scan` in float64, rounded to the dtype of x."""
    inputs = (B, C, x, dt, dA_cumsum, prev_states, D, z)
    return chunk_scan(*(None if t is None else t.double() for t in inputs)).to(x.dtype)  # type: ignore[arg-type]
