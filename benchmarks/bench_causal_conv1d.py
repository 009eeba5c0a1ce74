"""causal_conv1d with SiLU: memory-bound, x once in and y once out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import causal_conv1d
from ssmkit.testing import causal_conv1d_inputs

from . import Bench, register


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """PyTorch's depthwise convolution, which wants the channels first."""
    width = weight.shape[1]
    v = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=x.shape[2])
    return F.silu(v[..., : x.shape[1]]).transpose(1, 2)


def inputs(batch: int, seqlen: int, dim: int, width: int, **options: object) -> dict[str, object]:
    """The tests' inputs with a bias and no initial state, and SiLU."""
    drawn = causal_conv1d_inputs(batch, seqlen, dim, width, **options)
    return {name: drawn[name] for name in ("x", "weight", "bias")} | {"activation": "silu"}


def bytes_moved(batch: int, seqlen: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """x and y; backward reads x and dy and writes dx."""
    return batch * seqlen * dim * dtype.itemsize * (2 if mode == "fwd" else 5)


register(
    Bench(
        op=causal_conv1d,
        inputs=inputs,
        shapes={
            "Mamba-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "dim": 1536, "width": 4},
            "Mamba-130M, 4096 tokens": {"batch": 1, "seqlen": 4096, "dim": 1536, "width": 4},
            "Decision Mamba, 64 x 60 tokens": {"batch": 64, "seqlen": 60, "dim": 256, "width": 4},
        },
        bytes_moved=bytes_moved,
        rivals={"torch conv1d": torch_conv1d},
    )
)
