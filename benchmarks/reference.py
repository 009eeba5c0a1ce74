"""A float64 reference over more tokens than memory holds: a chunk at a time, recomputed where gradients need it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def carried(
    scan: Callable[[slice, Tensor | None], tuple[Tensor, Tensor]], seqlen: int, chunk: int, state: Tensor | None = None
) -> Tensor:
    """y (batch, seqlen, ...) of scan(tokens, state) -> (y, state), called for each `chunk` of tokens in turn."""
    y = []
    for begin in range(0, seqlen, chunk):
        y_chunk, state = checkpoint(scan, slice(begin, begin + chunk), state, use_reentrant=False)
        y.append(y_chunk)
    return torch.cat(y, dim=1)
