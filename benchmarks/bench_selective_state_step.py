"""selective_state_step: one token. The state is read and written once; the rest is small, so calls are what costs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import selective_state_step
from ssmkit.testing import selective_state_step_inputs

from . import Bench, register


def torch_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    **_: bool,
) -> Tensor:
    """The equations in plain torch, as models without a kernel write them."""
    dt = F.softplus(dt + dt_bias)
    h = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B.mT
    state.copy_(h)
    return ((h * C.mT).sum(-1) + D * x) * F.silu(z)


def bytes_moved(batch: int, dim: int, dstate: int, dtype: torch.dtype) -> int:
    """The state twice in fp32, A once, x, dt, z and y once."""
    return 4 * dim * dstate * (2 * batch + 1) + 4 * batch * dim * dtype.itemsize


register(
    Bench(
        op=selective_state_step,
        inputs=selective_state_step_inputs,
        shapes={
            "Mamba-130M, one sequence": {"batch": 1, "dim": 1536, "dstate": 16},
            "Mamba-2.8B, one sequence": {"batch": 1, "dim": 5120, "dstate": 16},
            "trajectories, 64 environments": {"batch": 64, "dim": 256, "dstate": 16},
        },
        bytes_moved=bytes_moved,
        modes=("fwd",),
        rivals={"torch": torch_step},
    )
)
