"""Gated activations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) * y of xy = [x, y], in plain torch, fp32 inside.

    Args:
        xy: (..., 2 * dim)
    Returns:
        (..., dim) in the dtype of xy.
    """
    if xy.shape[-1] % 2:
        raise ValueError(f"xy must have an even last axis, x and y side by side, got shape {tuple(xy.shape)}")
    x, y = xy.to(torch.promote_types(xy.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(x) * y).to(xy.dtype)
