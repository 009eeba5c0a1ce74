"""linear_step: one token through the projections and the head of Mamba-130M; what it costs is reading the weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import linear_step
from ssmkit.testing import linear_step_inputs

from . import Bench, Prepared, Rival, compiled_anew, register


def torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    """What nn.Linear calls."""
    return F.linear(x, weight)


def torch_compiled(inputs: dict[str, Any]) -> Prepared:
    """The same through torch.compile."""
    compiled = compiled_anew(F.linear)
    return Prepared(lambda: compiled(inputs["x"], inputs["weight"]))


def torch_mv(x: Tensor, weight: Tensor) -> Tensor:
    """As a matrix times a vector."""
    return torch.mv(weight, x.squeeze(0)).unsqueeze(0)


def several_rows(batch: int) -> str | None:
    return None if batch == 1 else "takes one row"


def bytes_read(in_features: int, out_features: int, dtype: torch.dtype) -> int:
    """The weight."""
    return in_features * out_features * dtype.itemsize


def bytes_moved(batch: int, in_features: int, out_features: int, dtype: torch.dtype) -> int:
    """x and y."""
    return batch * (in_features + out_features) * dtype.itemsize


def inputs(batch: int, in_features: int, out_features: int, **options: Any) -> dict[str, Any]:
    """The tests' inputs, without a bias, as in the models."""
    return linear_step_inputs(batch, in_features, out_features, optional=(), **options)


register(
    Bench(
        op=linear_step,
        inputs=inputs,
        shapes={
            "Mamba-130M, in_proj": {"batch": 1, "in_features": 768, "out_features": 3072},
            "Mamba-130M, x_proj": {"batch": 1, "in_features": 1536, "out_features": 80},
            "Mamba-130M, dt_proj": {"batch": 1, "in_features": 48, "out_features": 1536},
            "Mamba-130M, out_proj": {"batch": 1, "in_features": 1536, "out_features": 768},
            "Mamba-130M, head": {"batch": 1, "in_features": 768, "out_features": 50280},
            "Mamba-130M, head, 8 rows": {"batch": 8, "in_features": 768, "out_features": 50280},
        },
        modes=("fwd",),
        bytes_read=bytes_read,
        bytes_moved=bytes_moved,
        fmas=lambda batch, in_features, out_features: batch * in_features * out_features,
        rivals={
            "torch linear": torch_linear,
            "torch linear, compiled": Rival(prepare=torch_compiled),
            "torch mv": Rival(call=torch_mv, declines=several_rows),
        },
    )
)
