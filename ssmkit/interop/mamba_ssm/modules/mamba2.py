"""`ssmkit.nn.Mamba2` by its official path and argument names; states lie as that layer keeps them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkit import nn

__all__ = ["Mamba2"]


class Mamba2(nn.Mamba2):
    """`ssmkit.nn.Mamba2`, whose input is called u."""

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        **options: Any,
    ) -> Tensor:
        """Mix the tokens u (batch, seqlen, d_model), or (batch * seqlen, d_model) with seqlen given.

        The other arguments, options too, are those of `ssmkit.nn.Mamba2.forward`. A row may go on after the last offset
        of cu_seqlens, if seq_idx is negative there: what follows is padding, and its output is zero.
        """
        if cu_seqlens is not None and seq_idx is not None and seqlen is None and u.ndim == 3:
            length = int(cu_seqlens[-1]) if cu_seqlens.numel() else 0
            if length < u.shape[1] and bool((seq_idx[:, length:] < 0).all()):
                out = super().forward(u[:, :length], None, None, cu_seqlens, inference_params, **options)
                return F.pad(out, (0, 0, 0, u.shape[1] - length))
        return super().forward(u, seqlen, seq_idx, cu_seqlens, inference_params, **options)
