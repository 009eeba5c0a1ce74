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
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if rowscale is not None:
        x = x.to(wide) * rowscale.to(wide)[..., None]
    if dropout_p:
        x = F.dropout(x.to(wide), dropout_p)
    if residual is not None:
        kept = residual.dtype
    else:
        kept = wide if residual_in_fp32 else dtype
    if is_rms_norm and residual is not None and x.dtype == dtype and kept in (dtype, wide):
        y, total = rms_norm(x, weight, bias=bias, residual=residual, eps=eps)
    else:
        sum_ = x if residual is None else x.to(wide) + residual.to(wide)
        total = sum_.to(kept)
        if is_rms_norm:
            y = rms_norm(sum_, weight, bias=bias, eps=eps).to(dtype)  # type: ignore[union-attr]
        else:
            shift = None if bias is None else bias.to(wide)
            y = F.layer_norm(sum_.to(wide), (x.shape[-1],), weight.to(wide), shift, eps).to(dtype)
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


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` and a linear layer after it, in the dtype of x; linear_weight (out_features, dim)."""
    y, total = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    out = F.linear(y, linear_weight.to(y.dtype), None if linear_bias is None else linear_bias.to(y.dtype))
    return (out, total) if prenorm else out


def layer_norm_ref(
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
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The same in plain torch and float64, with both branches of a parallel norm.

    total = drop(rowscale x) + drop(x1) + residual;   y = norm(total) weight + bias, y1 = norm(total) weight1 + bias1

    Args:
        dropout_mask, dropout_mask1: True where x and x1 are kept; without a mask it is drawn.
        upcast: Return the total in fp32, not in the dtype of x.
    Returns:
        y; (y, y1) with weight1; and the total last with prenorm.
    """
    return _norm_ref(False, **locals())


def rms_norm_ref(
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
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_ref` with the root mean square in place of mean and deviation."""
    return _norm_ref(True, **locals())


def _norm_ref(rms: bool, **given: Any) -> Tensor | tuple[Tensor, ...]:
    x, dropout_p = given["x"], given["dropout_p"]
    if given["x1"] is not None and given["rowscale"] is not None:
        raise ValueError("rowscale must be None with x1, got both; scale x before the call")

    def dropped(branch: Tensor, mask: Tensor | None) -> Tensor:
        if not dropout_p:
            return branch
        return F.dropout(branch, dropout_p) if mask is None else torch.where(mask, branch, 0.0) / (1 - dropout_p)

    scaled = x.double() if given["rowscale"] is None else x.double() * given["rowscale"].double()[..., None]
    total = dropped(scaled, given["dropout_mask"])
    if given["x1"] is not None:
        total = total + dropped(given["x1"].double(), given["dropout_mask1"])
    if given["residual"] is not None:
        total = total + given["residual"].double()
    normed = (F.rms_norm if rms else F.layer_norm)(total, (x.shape[-1],), eps=given["eps"])
    out = []
    for weight, bias in ((given["weight"], given["bias"]), (given["weight1"], given["bias1"])):
        if weight is not None:
            y = normed * weight.double()
            out.append((y if bias is None else y + bias.double()).to(x.dtype))
    if given["prenorm"]:
        out.append(total.to(torch.promote_types(x.dtype, torch.float32) if given["upcast"] else x.dtype))
    return out[0] if len(out) == 1 else tuple(out)


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

    def reset_parameters(self) -> None:
        """The weight is one again."""
        nn.init.ones_(self.weight)

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
