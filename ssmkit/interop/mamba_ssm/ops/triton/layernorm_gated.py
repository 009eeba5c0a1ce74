"""Norms with a gate and groups of channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmkit.nn
from ssmkit.ops import rms_norm


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """`ssmkit.ops.rms_norm`: norm(x) * silu(z), or norm(x * silu(z)) with norm_before_gate=False."""
    return rms_norm(  # type: ignore[return-value]
        x,
        weight,
        bias=bias,
        z=None if z is None else z.to(x.dtype),
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        backend=backend,
    )


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """The same with LayerNorm (in plain torch, fp32 inside) unless is_rms_norm."""
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    dim, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    size = dim if group_size is None else group_size
    if size < 1 or dim % size:
        raise ValueError(f"group_size must be at least 1 and divide dim {dim}, got {group_size}")
    gate = None if z is None else F.silu(z.to(wide))
    v = x.to(wide) if gate is None or norm_before_gate else x.to(wide) * gate
    y = F.layer_norm(v.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return (y if gate is None or not norm_before_gate else y * gate).to(x.dtype)


class RMSNorm(ssmkit.nn.RMSNorm):
    """`ssmkit.nn.RMSNorm` with the official arguments."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, eps, group_size=group_size, norm_before_gate=norm_before_gate, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """The weight is one again."""
        nn.init.ones_(self.weight)


class LayerNorm(nn.Module):
    """`layernorm_fn` as a layer; arguments as of `RMSNorm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, **place))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **place))

    def reset_parameters(self) -> None:
        """The weight is one again, the bias zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(..., hidden_size), gated by z if given."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` by the float64 reference; upcast, which chose fp32 there, is not read."""
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, backend="reference")
