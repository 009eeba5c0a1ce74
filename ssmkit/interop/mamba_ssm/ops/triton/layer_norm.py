"""Norms with the residual add before them: what official blocks call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.ops import rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(dropout(rowscale * x) + residual) * weight + bias, by `ssmkit.ops.rms_norm` or torch's layer_norm in fp32.

    Args:
        x: Input                                   (..., dim)
        weight, bias: (dim,)
        residual: Added to x                       (..., dim)
        x1, weight1, bias1, return_dropout_mask: Parallel norms and masks are not here; refused.
        eps: Added to the variance or the mean square.
        dropout_p: Probability that an element of x is dropped before the add.
        rowscale: Factor of each row of x          (...)
        prenorm: Return (y, sum), the sum in the dtype of residual; without a residual in that of x, or in fp32 with
            residual_in_fp32.
        is_rms_norm: RMSNorm, not LayerNorm.
    """
    for name, value in (("x1", x1), ("weight1", weight1), ("bias1", bias1)):
        if value is not None:
            raise ValueError(f"{name} must be None: parallel norms are not offered; norm each branch by itself")
    if return_dropout_mask:
        raise ValueError("return_dropout_mask must be False: drop with torch.nn.functional.dropout before the call")
    if rowscale is not None:
        x = x * rowscale[..., None]
    if dropout_p:
        x = F.dropout(x, dropout_p)
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        kept = residual.dtype
    else:
        kept = wide if residual_in_fp32 else x.dtype
    if is_rms_norm and residual is not None and kept in (x.dtype, wide):
        y, total = rms_norm(x, weight, bias=bias, residual=residual, eps=eps)
    else:
        sum_ = x if residual is None else x.to(wide) + residual.to(wide)
        total = sum_.to(kept)
        if is_rms_norm:
            y = rms_norm(sum_, weight, bias=bias, eps=eps).to(x.dtype)  # type: ignore[union-attr]
        else:
            shift = None if bias is None else bias.to(wide)
            y = F.layer_norm(sum_.to(wide), (x.shape[-1],), weight.to(wide), shift, eps).to(x.dtype)
    return (y, total) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with is_rms_norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        True, return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """`rms_norm_fn` as a layer; its weight starts at one and there is no bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, **place))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x (..., hidden_size), added to the residual if given."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
