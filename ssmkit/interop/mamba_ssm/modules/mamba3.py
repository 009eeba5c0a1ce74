"""`ssmkit.nn.Mamba3` by its official path and argument names; states lie as that layer keeps them."""

from typing import Any

import torch
from torch import Tensor

from ssmkit import nn
from ssmkit.interop.layout import mix_packed
from ssmkit.nn.mamba3 import Mamba3State
from ssmkit.nn.mamba3 import decay_rate as heavy_tail_activation

__all__ = ["Mamba3", "heavy_tail_activation"]


class Mamba3(nn.Mamba3):
    """`ssmkit.nn.Mamba3`, whose input is called u and whose step takes tokens without an axis for them."""

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        **options: Any,
    ) -> Tensor:
        """Mix the tokens u (batch, seqlen, d_model); the other arguments are those of `ssmkit.nn.Mamba3.forward`.

        With seq_idx besides, cu_seqlens may end before the row does: padding and other sequences follow then, which leave
        no state behind.
        """
        return mix_packed(super().forward, u, seq_idx, cu_seqlens, inference_params, options)

    def step(  # type: ignore[override]
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One token, u (batch, d_model) or (batch, 1, d_model). Returns the output, shaped as u, and the states.

        The states are updated in place. Other keywords are not read, as in the official layer.
        """
        out, *states = super().step(u if u.ndim == 3 else u.unsqueeze(1), angle_state, ssm_state, k_state, v_state)
        return out if u.ndim == 3 else out.squeeze(1), *states  # type: ignore[return-value]

    def allocate_inference_cache(  # type: ignore[override]
        self,
        batch_size: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace_state: Any = None,
        **_: Any,
    ) -> Mamba3State:
        """(angle, ssm, k, v) before any token, on `device`; `dtype` is that of v. inplace_state is not read."""
        states = super().allocate_inference_cache(batch_size, max_seqlen, dtype)
        return states if device is None else Mamba3State(*(state.to(device) for state in states))
