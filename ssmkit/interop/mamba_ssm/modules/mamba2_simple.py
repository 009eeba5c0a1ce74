"""`ssmkit.nn.Mamba2Simple` by its official path and argument names; states lie as that layer keeps them."""

from typing import Any

from torch import Tensor

from ssmkit import nn

__all__ = ["Mamba2Simple"]


class Mamba2Simple(nn.Mamba2Simple):
    """`ssmkit.nn.Mamba2Simple`, whose input is called u."""

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        """Mix the tokens u (batch, seqlen, d_model); the other arguments are those of `ssmkit.nn.Mamba2.forward`."""
        return super().forward(u, seq_idx, **options)
