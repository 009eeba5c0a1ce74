"""RMSNorm as a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.ops.rms_norm import NormOutput, rms_norm


class RMSNorm(nn.Module):
    """y = v / rms(v) * weight + bias of `ssmkit.ops.rms_norm`, with residual add and gate on call.

    Args:
        dim: Channels.
        eps: Added to the mean square.
        group_size: Channels that share one mean; by default all.
        norm_before_gate: Whether the gate acts on the normalised values.
        bias: Whether there is a shift.
        backend: Handed to the op.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or dim % group_size):
            raise ValueError(f"group_size must be at least 1 and divide dim {dim}, got {group_size}")
        self.eps, self.group_size, self.norm_before_gate, self.backend = eps, group_size, norm_before_gate, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(dim, **place))
        self.bias = nn.Parameter(torch.zeros(dim, **place)) if bias else None

    def forward(
        self, x: Tensor, z: Tensor | None = None, *, residual: Tensor | None = None, residual_in_fp32: bool = False
    ) -> Tensor | NormOutput:
        """Normalise x (..., dim), gated by z if given; with a residual return (y, x + residual)."""
        return rms_norm(
            x,
            self.weight,
            bias=self.bias,
            residual=residual,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
            residual_in_fp32=residual_in_fp32,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}"
