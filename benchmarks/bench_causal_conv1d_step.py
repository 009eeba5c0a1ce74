"""causal_conv1d_step: one token; small, so calls are what costs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import causal_conv1d_step
from ssmkit.testing import causal_conv1d_step_inputs

from . import Bench, register


def torch_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Shift the window, one weighted sum."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)
    state.copy_(window[:, 1:])
    return F.silu((window * weight.T).sum(1) + bias)


def inputs(batch: int, dim: int, width: int, **options: object) -> dict[str, object]:
    """The tests' inputs with a bias, and SiLU."""
    drawn = causal_conv1d_step_inputs(batch, dim, width, **options)
    return {name: drawn[name] for name in ("x", "state", "weight", "bias")} | {"activation": "silu"}


def bytes_moved(batch: int, dim: int, width: int, dtype: torch.dtype) -> int:
    """The state twice, x and y once."""
    return batch * dim * dtype.itemsize * (2 * (width - 1) + 2)


register(
    Bench(
        op=causal_conv1d_step,
        inputs=inputs,
        shapes={
            "Mamba-130M, one sequence": {"batch": 1, "dim": 1536, "width": 4},
            "trajectories, 64 environments": {"batch": 64, "dim": 256, "width": 4},
        },
        bytes_moved=bytes_moved,
        modes=("fwd",),
        rivals={"torch": torch_step},
    )
)
