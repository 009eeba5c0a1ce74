"""causal_conv1d_step: one token. A few rows are read and written, so calls are what costs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import causal_conv1d_step
from ssmkit.testing import causal_conv1d_step_inputs

from . import Bench, register


def torch_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """In plain torch, as models without a kernel write it: shift the window, multiply, sum."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)
    state.copy_(window[:, 1:])
    return F.silu((window * weight.mT).sum(1) + bias)


def bytes_moved(batch: int, dim: int, width: int, dtype: torch.dtype) -> int:
    """The state in and out, x in, y out; taps and bias once in fp32."""
    return batch * dim * dtype.itemsize * 2 * width + 4 * dim * (width + 1)


register(
    Bench(
        op=causal_conv1d_step,
        inputs=causal_conv1d_step_inputs,
        shapes={
            "Mamba-130M, one sequence": {"batch": 1, "dim": 1536, "width": 4},
            "Mamba-2.8B, one sequence": {"batch": 1, "dim": 5120, "width": 4},
            "trajectories, 64 environments": {"batch": 64, "dim": 256, "width": 4},
        },
        bytes_moved=bytes_moved,
        modes=("fwd",),
        rivals={"torch": torch_step},
    )
)
