"""minimum_spanning_tree on the CPU: a thin call into csrc/cpu/minimum_spanning_tree.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library


def forward(weights: Tensor, edges: Tensor, seqlen: int, root: int) -> tuple[int, Tensor, Tensor]:
    """(parts, order, parent); the tables mean something where the number of parts is 1 at most."""
    batch, nedges = weights.shape
    order, parent = (torch.empty(batch, seqlen, dtype=torch.int32) for _ in range(2))
    parts = library().minimum_spanning_tree(
        (DTYPES[weights.dtype], torch.get_num_threads()),
        (batch, nedges, seqlen, root),
        (weights.data_ptr(), edges.data_ptr()),
        (order.data_ptr(), parent.data_ptr()),
    )
    return parts, order, parent
