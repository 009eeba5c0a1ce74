"""rms_norm with the residual add before it: memory-bound, so what counts is that every tensor is touched once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import rms_norm
from ssmkit.testing import rms_norm_inputs

from . import Bench, register


def torch_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then PyTorch's own norm."""
    total = x + residual
    return F.rms_norm(total, x.shape[-1:], weight, 1e-5), total


def bytes_moved(rows: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """x, residual, y and their sum; backward reads the sum and both gradients and writes two more."""
    return rows * dim * dtype.itemsize * (4 if mode == "fwd" else 9)


def inputs(rows: int, dim: int, **options: object) -> dict[str, Tensor]:
    """The tests' inputs, with a residual and nothing else."""
    return rms_norm_inputs(rows, dim, optional=("residual",), **options)


register(
    Bench(
        op=rms_norm,
        inputs=inputs,
        shapes={
            "Mamba-130M, 1024 tokens": {"rows": 1024, "dim": 768},
            "Mamba-2.8B, 1024 tokens": {"rows": 1024, "dim": 2560},
            "Decision Mamba, 64 x 60 tokens": {"rows": 3840, "dim": 128},
        },
        parameters=("weight", "bias"),
        bytes_moved=bytes_moved,
        rivals={"torch add + rms_norm": torch_rms_norm},
    )
)
