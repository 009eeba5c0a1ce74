"""Which tokens of a call follow each other: sequences packed or numbered, resets and pads."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops._check import check_dtype, check_shape


def walk_of(
    seq_idx: Tensor, hidden_states: Tensor, resets: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Resets where the number of the sequence changes and a mask that hides negative numbers, joined with those given."""
    check_shape("seq_idx", seq_idx, hidden_states.shape[:2], "batch, seqlen")
    check_dtype("seq_idx", seq_idx, (torch.int32, torch.int64))
    real = seq_idx >= 0
    # A pad has the number of the real token before it, so that it changes nothing.
    latest = torch.where(real, torch.arange(seq_idx.shape[1], device=seq_idx.device), 0).cummax(1).values
    number = seq_idx.gather(1, latest)
    changes = F.pad((number[:, 1:] != number[:, :-1]) & (number[:, :-1] >= 0), (1, 0))[:, : seq_idx.shape[1]]
    return changes if resets is None else changes | resets, real if mask is None else real & mask


class Walk(NamedTuple):
    """Who follows whom: indices of tokens run over (batch * seqlen), pads are skipped, a reset begins a new piece."""

    cut: bool  # whether a row may have several pieces
    sequence: Tensor  # (tokens,) of each token
    origin: Tensor  # (tokens,) first token of its piece
    inherits: Tensor  # (tokens,) whether its piece carries on the state from before the call
    after: Tensor  # (tokens,) the next real token, where linked
    linked: Tensor  # (tokens,) whether that is of the same piece
    first: Tensor  # (nseq,) first real token, where begun
    begun: Tensor  # (nseq,) whether there is one
    last: Tensor  # (nseq,) last token, pads too, where there is any
    last_real: Tensor  # (nseq,) last real token, where taken
    taken: Tensor  # (nseq,) whether what a token leaves is that of last_real
    kept: Tensor  # (nseq,) whether it stays as it was
    empty: Tensor  # (nseq,) whether there is no token at all

    def latest(self, values: Tensor, before: Tensor | None) -> Tensor:
        """Of values (batch, seqlen, ...) those of each sequence's last real token; `before` where it stays, (nseq, ...)."""
        taken, kept = (flag.view(-1, *[1] * (values.ndim - 2)) for flag in (self.taken, self.kept))
        left = 0.0 if before is None else torch.where(kept, before, 0.0)
        return torch.where(taken, values.flatten(0, 1)[self.last_real], left)


def walk_over(
    batch: int,
    seqlen: int,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Walk:
    """The walk over batch * seqlen tokens, of which there is at least one."""
    tokens = batch * seqlen
    index = torch.arange(tokens, device=device)
    offsets = torch.arange(batch + 1, device=device) * seqlen if cu_seqlens is None else cu_seqlens.long()
    start, end = offsets[:-1], offsets[1:]
    real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.reshape(-1)
    drops = torch.zeros_like(real) if resets is None else resets.reshape(-1)

    sequence = torch.searchsorted(end.contiguous(), index, right=True)
    begins = drops | (index == start[sequence])
    piece, origin = begins.cumsum(0), torch.where(begins, index, 0).cummax(0).values
    inherits = (origin == start[sequence]) & ~drops[origin]

    # The first real token from each on; one past the end there is none.
    on = torch.where(F.pad(real, (0, 1)), torch.arange(tokens + 1, device=device), tokens)
    on = on.flip(0).cummin(0).values.flip(0)
    after, first = on[1:], on[start]
    linked = real & (F.pad(piece, (0, 1), value=-1)[after] == piece)
    last = (end - 1).clamp(min=0)
    last_real = torch.where(real, index, -1).cummax(0).values[last]
    some = (end > start) & (last_real >= start)
    last_real = last_real.clamp(min=0)
    return Walk(
        cut=resets is not None or cu_seqlens is not None,
        sequence=sequence,
        origin=origin,
        inherits=inherits,
        after=after.clamp(max=tokens - 1),
        linked=linked,
        first=first.clamp(max=tokens - 1),
        begun=first < end,
        last=last,
        last_real=last_real,
        taken=some & (piece[last] == piece[last_real]),
        kept=~some & ((end == start) | inherits[last]),
        empty=end == start,
    )
