"""What all walks over tokens share: their order, flags and step sizes, and where states are kept along them."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.paths import ScanPath

SOFTPLUS_THRESHOLD = 20.0
RESTART, PAD = 1, 2  # bits of `flags`


class ScanOutput(NamedTuple):
    """What a scan returns when the final state is asked for."""

    y: Tensor
    final_state: Tensor


def walks(batch: int, seqlen: int, cu_seqlens: Tensor | None, order: Tensor | None, reverse: bool) -> list[list[int]]:
    """For each sequence the rows (b * seqlen + l) it visits, in order."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        visited = [list(range(start, end)) for start, end in pairwise(offsets)]
    else:
        tokens = range(seqlen) if order is None else order.tolist()
        visited = [[b * seqlen + token for token in tokens] for b in range(batch)]
    return [rows[::-1] for rows in visited] if reverse else visited


def with_restarts(resets: Tensor | None, path: ScanPath, x: Tensor) -> Tensor | None:
    """`resets` and the restarts of `path` over the tokens of x; None where there are neither."""
    restarts = path.restarts(x.device)
    if restarts is None:
        return resets
    return restarts.expand(x.shape[:2]) if resets is None else resets | restarts


def flags_of(resets: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One byte per token for the kernels: bit 0 restarts the state, bit 1 marks a pad."""
    if mask is None:
        return None if resets is None else resets.to(torch.uint8) * RESTART
    pads = (~mask).to(torch.uint8) * PAD
    return pads if resets is None else pads | (resets.to(torch.uint8) * RESTART)


def checkpoint_slots(batch: int, seqlen: int, nseq: int, chunk: int, *, packed: bool) -> int:
    """Number of states kept for backward: the one before every `chunk`-th position of each walk."""
    if packed:
        return seqlen // chunk + nseq
    return batch * ((seqlen + chunk - 1) // chunk)


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, limits: tuple[float, float] | None = None
) -> Tensor:
    """dt in float64 after its bias and softplus, clamped into `limits`."""
    dt = dt.double()
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = F.softplus(dt, threshold=SOFTPLUS_THRESHOLD)
    return dt if limits is None else dt.clamp(*limits)
