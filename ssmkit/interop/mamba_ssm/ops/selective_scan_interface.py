"""selective_scan_fn, mamba_inner_fn and their references, with tensors as (batch, dim, seqlen)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.interop.layout import channels_last, common_dtype, widen
from ssmkit.ops import causal_conv1d, rms_norm, selective_scan
from ssmkit.ops._check import check_ndim


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssmkit.ops.selective_scan` on (batch, dim, seqlen); there u is x and delta is dt.

    Channels-last tensors (transposed (batch, seqlen, dim)) are read in place, others are copied once. Inputs of several
    dtypes are widened to the widest, as official kernels widen each. Unlike there the last state has a gradient.

    Args:
        u, delta, z: Input, step sizes, gate logits    (batch, dim, seqlen)
        A: Decay rates                                 (dim, dstate), real or complex
        B, C: Constant (dim, dstate), or per token (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen); with
            complex A real and imaginary parts alternate along the last axis, of length 2 seqlen
        D, delta_bias: Skip weights, added to delta    (dim,)
        delta_softplus: Apply softplus to delta.
        return_last_state: Return (out, last_state), last_state (batch, dim, dstate) in fp32 or complex64.
        backend: Handed to the op.
    Returns:
        out (batch, dim, seqlen) in the dtype of u, channels last in memory.
    """
    check_ndim("u", u, "batch, dim, seqlen")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            check_ndim(name, tensor, "batch, dim, seqlen")
    per_token = [weight if weight.ndim > 2 else None for weight in (B, C)]
    dtype = common_dtype(u, delta, z, *per_token)
    x, dt, gate = (channels_last(t) for t in widen(dtype, u, delta, z))
    B, C = (_weights(name, weight, A, dtype) for name, weight in (("B", B), ("C", C)))
    assert x is not None and dt is not None
    y, last_state = selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=gate,
        dt_bias=delta_bias,
        dt_softplus=bool(delta_softplus),
        return_final_state=True,
        backend=backend,
    )
    out = y.transpose(1, 2).to(u.dtype)
    return (out, last_state) if return_last_state else out


def _weights(name: str, weight: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """B or C with the tokens before the states; pairs of numbers become complex ones."""
    if weight.ndim == 2:
        return weight.to(A.dtype)
    if weight.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape (dim, dstate), (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen), "
            f"got {tuple(weight.shape)}"
        )
    if A.is_complex() and not weight.is_complex():
        if weight.shape[-1] % 2:
            raise ValueError(
                f"{name} must hold real and imaginary parts in turn along its last axis, since A is complex; "
                f"got an odd length {weight.shape[-1]}"
            )
        real = torch.float64 if A.dtype == torch.complex128 else torch.float32
        weight = torch.view_as_complex(weight.to(real).unflatten(-1, (-1, 2)).contiguous())
    elif not weight.is_complex():
        weight = weight.to(dtype)
    return weight.movedim(-1, 1)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolution, projections, scan and output projection of a Mamba-1 layer, from xz = in_proj(hidden).

    Unlike there every weight, those of the norms and out_proj_bias included, has its right gradient.

    Args:
        xz: Input and gate                              (batch, 2 dim, seqlen)
        conv1d_weight, conv1d_bias: Of the convolution  (dim, 1, width), (dim,)
        x_proj_weight: To step sizes, B and C           (dt_rank + 2 dstate, dim)
        delta_proj_weight: Step sizes to channels       (dim, dt_rank)
        out_proj_weight, out_proj_bias: (d_model, dim), (d_model,)
        A, D, delta_bias: As in `selective_scan_fn`.
        B, C: Given, they replace those of x_proj, in the layouts of `selective_scan_fn`.
        B_proj_bias, C_proj_bias: Added to those of x_proj  (dstate,)
        checkpoint_lvl: Accepted for compatibility: the scan keeps its own checkpoints.
        b_rms_weight, c_rms_weight: RMSNorm of B and C  (dstate,)
        dt_rms_weight: RMSNorm of the step sizes, after their projection if of shape (dim,), before it if (dt_rank,)
        b_c_dt_rms_eps: Of these norms.
        backend: Handed to the ops.
    Returns:
        (batch, seqlen, d_model)
    """
    check_ndim("xz", xz, "batch, 2 * dim, seqlen")
    check_ndim("conv1d_weight", conv1d_weight, "dim, 1, width")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    x: Any
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    norm: Any = partial(rms_norm, eps=b_c_dt_rms_eps, backend=backend)
    dt_rank, dstate = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    x = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu", backend=backend)
    projected = F.linear(x, x_proj_weight)
    dt = projected[..., :dt_rank]
    after = dt_rms_weight is None or dt_rms_weight.shape[0] == delta_proj_weight.shape[0]
    if not after:
        dt = norm(dt, dt_rms_weight)
    dt = F.linear(dt, delta_proj_weight)
    if after and dt_rms_weight is not None:
        dt = norm(dt, dt_rms_weight)
    weights = []
    for given, bias, scale, columns in (
        (B, B_proj_bias, b_rms_weight, projected[..., dt_rank : dt_rank + dstate]),
        (C, C_proj_bias, c_rms_weight, projected[..., -dstate:]),
    ):
        if given is not None:
            weights.append(given)
            continue
        weight = columns if bias is None else columns + bias.to(columns.dtype)
        weight = weight if scale is None else norm(weight, scale)
        # official order: the tokens last, pairs of numbers along them
        pairs = weight.unflatten(-1, (-1, 2)) if A.is_complex() else weight[..., None]
        weights.append(pairs.transpose(1, 2).flatten(-2))
    y = selective_scan_fn(
        x.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        weights[0],
        weights[1],
        D=D,
        z=z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


selective_scan_ref = partial(selective_scan_fn, backend="reference")
mamba_inner_ref = partial(mamba_inner_fn, backend="reference")
