"""linear_step: one token through the projections and the head of Mamba-130M; what it costs is reading the weight.

Every call takes another copy of the weight, so that it comes from memory, as in a model whose weights no cache holds.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import linear_step
from ssmkit.testing import linear_step_inputs

from . import Bench, Prepared, Rival, compiled_anew, register

COLD_BYTES = 2**28  # of copies in turn: several times the caches of a server


def cold(make: Callable[[], Callable[[Tensor, Tensor], Tensor]], **options: Any) -> Rival:
    """The function that `make` returns, called as (x, weight), the weight a copy not touched for long."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        x, weight, function = inputs["x"], inputs["weight"], make()
        copies = [weight, *(weight.clone() for _ in range(COLD_BYTES // weight.nbytes))]
        weights = cycle(copies)
        return Prepared(lambda: function(x, next(weights)), held=sum(copy.nbytes for copy in copies[1:]))

    return Rival(prepare=prepare, **options)


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
        name="linear_step",
        op=cold(lambda: linear_step),
        reference=partial(linear_step, backend="reference"),
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
            "torch linear": cold(lambda: F.linear),
            "torch linear, compiled": cold(lambda: compiled_anew(F.linear)),
            "torch mv": cold(lambda: torch_mv, declines=several_rows),
        },
    )
)
