"""linear_step on the CPU: a thin call into csrc/cpu/linear_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library, pointer


def step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (batch, out_features) in the dtype of x. The op layer has checked everything."""
    (batch, in_features), out_features = x.shape, weight.shape[0]
    y = torch.empty((batch, out_features), dtype=x.dtype)
    library().linear_step(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        (batch, in_features, out_features, x.stride(0), weight.stride(0)),
        (x.data_ptr(), weight.data_ptr(), pointer(bias), y.data_ptr()),
    )
    return y
