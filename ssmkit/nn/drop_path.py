"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, zero a residual branch for a share of the samples, and scale the rest by 1 / (1 - drop_prob).

    Huang et al. 2016, "Deep networks with stochastic depth", arXiv:1603.09382.

    Args:
        drop_prob: Share of the samples, in 0..1; 1 drops all.
    Shapes:
        x and output (batch, ...)
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must lie in 0..1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < keep
        return x * kept.to(x.dtype) / max(keep, torch.finfo(x.dtype).tiny)

    def extra_repr(self) -> str:
        """Rate, for print()."""
        return f"drop_prob={self.drop_prob:g}"
