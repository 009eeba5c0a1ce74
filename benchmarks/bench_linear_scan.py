"""linear_scan: memory-bound, a and b once in and h once out."""

import torch
from torch import Tensor

from ssmkit.ops import linear_scan
from ssmkit.testing import linear_scan_inputs

from . import Bench, register


def torch_loop(a: Tensor, b: Tensor) -> Tensor:
    """One token at a time."""
    h, states = torch.zeros_like(b[:, 0]), []
    for a_BD, b_BD in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_BD * h + b_BD
        states.append(h)
    return torch.stack(states, dim=1)


def inputs(batch: int, seqlen: int, dim: int, **options: object) -> dict[str, Tensor]:
    """The tests' inputs: a per token and b."""
    drawn = linear_scan_inputs(batch, seqlen, dim, **options)
    return {name: drawn[name] for name in ("a", "b")}


def bytes_moved(batch: int, seqlen: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """a, b and h; backward reads dh, a and h and writes da and db."""
    return batch * seqlen * dim * dtype.itemsize * (3 if mode == "fwd" else 8)


register(
    Bench(
        op=linear_scan,
        inputs=inputs,
        shapes={
            "1 x 4096 tokens, 1536 channels": {"batch": 1, "seqlen": 4096, "dim": 1536},
            "64 x 1024 tokens, 256 channels": {"batch": 64, "seqlen": 1024, "dim": 256},
        },
        bytes_moved=bytes_moved,
        rivals={"torch loop": torch_loop},
    )
)
