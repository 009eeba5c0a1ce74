"""`ssmkit.nn.Mamba2` by its official path and argument names; states lie as that layer keeps them."""

from typing import Any

from torch import Tensor

from ssmkit import nn
from ssmkit.interop.layout import mix_packed

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

        The other arguments, options too, are those of `ssmkit.nn.Mamba2.forward`. With seq_idx besides, cu_seqlens may end
        before the row does: padding and other sequences follow then, which leave no state behind.
        """
        if seqlen is None and u.ndim == 3:
            return mix_packed(super().forward, u, seq_idx, cu_seqlens, inference_params, options)
        return super().forward(u, seqlen, seq_idx, cu_seqlens, inference_params, **options)
