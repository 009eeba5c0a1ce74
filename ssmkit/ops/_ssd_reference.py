"""ssd in float64, in plain torch: as the recurrence and in its dual form, a masked product.

Names and equations are those of `ssd`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ssmkit.ops._define import acc_dtype
from ssmkit.ops._walk import step_sizes, walks


def _recurrence(
    x_LHP: Tensor, dt_LH: Tensor, A_H: Tensor, B_LHN: Tensor, C_LHN: Tensor, keep_L: Tensor, h_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence, one token at a time."""
    y = []
    for x_HP, dt_H, B_HN, C_HN, keep in zip(*(t.unbind(0) for t in (x_LHP, dt_LH, B_LHN, C_LHN, keep_L)), strict=True):
        Abar_HPN = torch.exp(dt_H * A_H)[:, None, None]
        Bbar_HPN = dt_H[:, None, None] * x_HP[:, :, None] * B_HN[:, None, :]
        h_HPN = Abar_HPN * torch.where(keep, h_HPN, 0.0) + Bbar_HPN
        y.append((h_HPN * C_HN[:, None, :]).sum(-1))
    return (torch.stack(y) if y else x_LHP), h_HPN


def _quadratic(
    x_LHP: Tensor, dt_LH: Tensor, A_H: Tensor, B_LHN: Tensor, C_LHN: Tensor, keep_L: Tensor, h_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence as a masked product; the state before it enters as a token -1, the last row gives the final state."""
    seqlen = len(x_LHP)
    a_LH = F.pad(dt_LH * A_H, (0, 0, 1, 0))
    # Summed after masking: a difference of two long sums would lose digits.
    token = torch.arange(seqlen + 1, device=x_LHP.device)
    after, from_past = token[:, None] > token, token[:, None] >= token
    segsum_TSH = torch.where(after[..., None], a_LH[:, None], 0.0).cumsum(0)
    part_L = F.pad((~keep_L).long(), (1, 0)).cumsum(0)
    together = from_past & (part_L[:, None] == part_L)
    L_TSH = torch.where(together[..., None], segsum_TSH, -math.inf).exp()

    y = torch.einsum("thn,shn,tsh,shp->thp", C_LHN, B_LHN, L_TSH[1:, 1:], dt_LH[..., None] * x_LHP)
    y = y + torch.einsum("thn,th,hpn->thp", C_LHN, L_TSH[1:, 0], h_HPN)
    final = torch.einsum("sh,shp,shn->hpn", L_TSH[-1, 1:], dt_LH[..., None] * x_LHP, B_LHN)
    return y, final + L_TSH[-1, 0, :, None, None] * h_HPN


def ssd_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    bidirectional: bool,
    form: Callable[..., tuple[Tensor, Tensor]] = _recurrence,
) -> tuple[Tensor, Tensor]:
    """The op in float64, in either form: y and the final state."""
    batch, seqlen, nheads, headdim = x.shape
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device) if mask is None else mask
    # A pad's numbers do not enter at all, so they may be anything.
    x_BLHP, B_BLGN, C_BLGN = (torch.where(real[..., None, None], t.double(), 0.0) for t in (x, B, C))
    dt_BLH = step_sizes(torch.where(real[..., None], dt, 0.0), dt_bias, dt_softplus, (dt_min, dt_max))
    dt_BLH = torch.where(real[..., None], dt_BLH, 0.0)
    B_BLHN, C_BLHN = (repeat(t, "b l g n -> b l (g r) n", r=nheads // t.shape[2]) for t in (B_BLGN, C_BLGN))
    keep = torch.ones_like(real) if resets is None else ~resets

    rows = [t.flatten(0, 1) for t in (x_BLHP, dt_BLH, B_BLHN, C_BLHN, keep)]
    initial = initial_state if bidirectional or initial_state is None else initial_state[None]
    y, finals = torch.zeros_like(rows[0]), []
    for way, backwards in enumerate((False, True) if bidirectional else (reverse,)):
        final = []
        for sequence, walk in enumerate(walks(batch, seqlen, cu_seqlens, None, backwards)):
            at = torch.tensor(walk, dtype=torch.long, device=x.device)
            h_HPN = x_BLHP.new_zeros(nheads, headdim, B.shape[3])
            if initial is not None:
                h_HPN = initial[way, sequence].double()
            x_LHP, dt_LH, B_LHN, C_LHN, keep_L = (t.index_select(0, at) for t in rows)
            y_LHP, h_HPN = form(x_LHP, dt_LH, A.double(), B_LHN, C_LHN, keep_L, h_HPN)
            y = y.index_add(0, at, y_LHP)
            final.append(h_HPN)
        finals.append(torch.stack(final) if final else x_BLHP.new_zeros(0, nheads, headdim, B.shape[3]))
    y = y.view_as(x)
    if D is not None:
        y = y + D.double() * x_BLHP
    if z is not None:
        y = y * F.silu(torch.where(real[..., None, None], z.double(), 0.0))
    y = torch.where(real[..., None, None], y, 0.0)
    final_state = torch.stack(finals) if bidirectional else finals[0]
    return y.to(x.dtype), final_state.to(acc_dtype(x.dtype))


# The op in its dual form: memory and time grow with the square of the length.
ssd_quadratic = partial(ssd_ref, form=_quadratic)
