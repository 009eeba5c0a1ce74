"""The paper's minimal SSD on discretised inputs, in plain torch: a teaching form, not a kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def segsum(x: Tensor) -> Tensor:
    """out[..., t, s] = x[s+1] + ... + x[t] for s <= t, else minus infinity; (..., T) to (..., T, T)."""
    token = torch.arange(x.shape[-1], device=x.device)
    after = token[:, None] > token
    sums = torch.where(after, x[..., :, None], 0.0).cumsum(-2)
    return sums.masked_fill(token[:, None] < token, -torch.inf)


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_l = exp(A_l) h_{l-1} + X_l B_l^T, y_l = h_l C_l, chunk by chunk: Dao & Gu 2024, arXiv:2405.21060, section 6.

    There X is dt x and A is dt A. Any length is taken.

    Args:
        X: (batch, length, nheads, headdim)
        A: Log-decays, not positive       (batch, length, nheads)
        B, C: (batch, length, nheads, dstate)
        block_len: Tokens per chunk.
        initial_states: (batch, 1, nheads, headdim, dstate), the axis of one standing for the first chunk
    Returns:
        y as X, and the final state (batch, nheads, headdim, dstate).
    """
    batch, length, nheads, headdim = X.shape
    if block_len < 1:
        raise ValueError(f"block_len must be at least 1, got {block_len}")
    # a padded token neither decays nor adds
    more = -length % block_len
    chunks = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, more)).unflatten(1, (-1, block_len)) for t in (X, A, B, C)]
    h_BHPN = X.new_zeros(batch, nheads, headdim, B.shape[-1]) if initial_states is None else initial_states[:, 0]
    y = []
    for X_BLHP, A_BLH, B_BLHN, C_BLHN in zip(*(chunk.unbind(1) for chunk in chunks), strict=True):
        L_BHTS = segsum(A_BLH.transpose(1, 2)).exp()
        decay_BLH = A_BLH.cumsum(1)
        inside = torch.einsum("bthn,bshn,bhts,bshp->bthp", C_BLHN, B_BLHN, L_BHTS, X_BLHP)
        y.append(inside + torch.einsum("bthn,bth,bhpn->bthp", C_BLHN, decay_BLH.exp(), h_BHPN))
        left_BLH = (decay_BLH[:, -1:] - decay_BLH).exp()
        added = torch.einsum("bshn,bsh,bshp->bhpn", B_BLHN, left_BLH, X_BLHP)
        h_BHPN = decay_BLH[:, -1].exp()[..., None, None] * h_BHPN + added
    return torch.cat(y, dim=1)[:, :length] if y else X, h_BHPN
