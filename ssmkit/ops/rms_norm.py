"""RMSNorm with the residual add before it and the gate around it.

    s = x + residual                                          where a residual is given
    v = s * silu(z)                                           gated before the norm
    y = v / sqrt(mean(v^2) + eps) * weight + bias             the mean over each group of channels
    y <- y * silu(z)                                          gated after the norm

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467; the gate and the groups are Mamba-2's
(Dao & Gu 2024, arXiv:2405.21060), the fused add is that of pre-norm residual stacks.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_shape, parameter_dtypes
from ssmkit.ops._define import absent, acc_dtype, define, gradients, present

MAX_GROUPS = 65535  # programs along the second axis of a grid


def many_groups(*, ngroups: int, **_: object) -> str | None:
    """Why the Triton kernel cannot take so many groups."""
    return f"more than {MAX_GROUPS} groups, got {ngroups}" if ngroups > MAX_GROUPS else None


BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.rms_norm_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.rms_norm", rejects=many_groups),
    Backend("cpu", device="cpu", module="ssmkit.native.rms_norm"),
)


class NormOutput(NamedTuple):
    """What the op returns when a residual is given."""

    y: Tensor
    residual: Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    residual_in_fp32: bool = False,
    backend: str = "auto",
) -> Tensor | NormOutput:
    """Root-mean-square norm over the last axis, with an optional residual add before it and a gate.

        s = x + residual
        v = s                    or s * silu(z) with norm_before_gate=False
        y = v / sqrt(mean(v^2) + eps) * weight + bias,       then y * silu(z) with norm_before_gate=True

    Zhang & Sennrich 2019, arXiv:1910.07467; gate and groups as in Dao & Gu 2024, arXiv:2405.21060.

    Args:
        x: Input                                          (..., dim)   fp32, bf16, fp16 or fp64
        weight: Scale of each channel                     (dim,)       float
        bias: Shift of each channel                       (dim,)       float
        residual: Added to x first                        (..., dim)   as x, or fp32 (fp64 with x)
        z: Gate logits                                    (..., dim)   as x
        eps: Added to the mean square.
        group_size: Channels that share one mean; it divides dim. By default all of them.
        norm_before_gate: Gate the normalised values, not those to be normalised.
        residual_in_fp32: Return the sum in fp32 whatever x is; otherwise in the dtype of residual.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x; with a residual (y, residual), the second being the sum x + residual.
    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    _check(x, weight, bias, residual, z, group_size)
    acc = acc_dtype(x.dtype)
    weight, bias = weight.to(acc), None if bias is None else bias.to(acc)
    size = max(1, x.shape[-1]) if group_size is None else group_size
    total_dtype = acc if residual_in_fp32 or residual is None else residual.dtype
    chosen = choose("rms_norm", BACKENDS, backend, x, ngroups=x.shape[-1] // size)
    if chosen == "reference":
        y, total = rms_norm_ref(x, weight, bias, residual, z, eps, size, norm_before_gate, total_dtype)
    else:
        wide = total_dtype == acc
        y, total, _ = rms_norm_fwd(x, weight, bias, residual, z, eps, size, norm_before_gate, wide, chosen)
    return y if residual is None else NormOutput(y, total)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None, group_size: int | None
) -> None:
    if x.ndim < 1:
        raise ValueError(f"x must have shape (..., dim), got {tuple(x.shape)}")
    check_dtype("x", x, FLOATS)
    dim, acc = x.shape[-1], acc_dtype(x.dtype)
    narrow, why = parameter_dtypes(x)
    for label, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(label, vector, (dim,), "dim")
            check_dtype(label, vector, narrow, why)
    if residual is not None:
        check_shape("residual", residual, x.shape, "like x")
        check_dtype("residual", residual, (x.dtype, acc), why)
    if z is not None:
        check_shape("z", z, x.shape, "like x")
        check_dtype("z", z, (x.dtype,), "like x")
    check_device(x, weight=weight, bias=bias, residual=residual, z=z)
    if group_size is not None and (group_size < 1 or dim % group_size):
        raise ValueError(f"group_size must be at least 1 and divide dim {dim}, got {group_size}")


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The equations in float64. Returns y and the sum."""
    total = x.double() if residual is None else x.double() + residual.double()
    gate = None if z is None else F.silu(z.double())
    v = total if gate is None or norm_before_gate else total * gate
    grouped = v.unflatten(-1, (-1, group_size)) if v.shape[-1] else v[..., None]
    normalised = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = normalised.flatten(-2) * weight.double()
    if bias is not None:
        y = y + bias.double()
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype), total.to(total_dtype)


def _rows(x: Tensor | None) -> Tensor | None:
    """(rows, dim) with dense rows: a view where one row stride serves all of x, else a copy."""
    if x is None:
        return None
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None, eps: float,
    group_size: int, norm_before_gate: bool, wide: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total_dtype = None if residual is None else acc_dtype(x.dtype) if wide else residual.dtype
    y, total, rstd = load(BACKENDS, backend).forward(
        _rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), _rows(residual), _rows(z),
        eps, group_size, norm_before_gate, total_dtype,
    )  # fmt: skip
    return y.view(x.shape), absent(x) if total is None else total.view(x.shape), rstd


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None, eps: float,
    group_size: int, norm_before_gate: bool, wide: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    y = x.new_empty(x.shape)
    total = absent(x) if residual is None else x.new_empty(x.shape, dtype=acc if wide else residual.dtype)
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return y, total, x.new_empty(rows, x.shape[-1] // group_size, dtype=acc)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, z, _, group_size, norm_before_gate, _, backend = inputs
    # The sum itself where it was kept unrounded, otherwise its two summands.
    whole = residual is not None and output[1].dtype == acc_dtype(x.dtype)
    kept = (output[1], None) if whole else (x, residual)
    ctx.save_for_backward(*kept, weight, bias, z, output[2])
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    ctx.options = (group_size, norm_before_gate, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    total, rest, weight, bias, z, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if dy is None:
        dy = torch.zeros_like(total, dtype=x_dtype)
    dx, dweight, dbias, dz = gradients(
        rms_norm_bwd(dy, dtotal, total, rest, weight, bias, z, rstd, *ctx.options), (total, weight, bias, z)
    )
    assert dx is not None
    dresidual = None if residual_dtype is None else dx.to(residual_dtype)
    return dx.to(x_dtype), dweight, dbias, dresidual, dz, None, None, None, None, None


def _backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None,
    z: Tensor | None, rstd: Tensor, group_size: int, norm_before_gate: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx, dweight, dbias, dz = load(BACKENDS, backend).backward(
        _rows(dy), _rows(dtotal), _rows(total), _rows(rest), weight.contiguous(), None if bias is None else bias.contiguous(),
        _rows(z), rstd, group_size, norm_before_gate,
    )  # fmt: skip
    return present((dx.view(total.shape), dweight, dbias, None if dz is None else dz.view(total.shape)), total)


def _backward_fake(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None,
    z: Tensor | None, rstd: Tensor, group_size: int, norm_before_gate: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (total, weight, bias, z)
    return tuple(absent(total) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs)


_OPTIONS = "int group_size, bool norm_before_gate"
rms_norm_bwd = define(
    "rms_norm_bwd(Tensor dy, Tensor? dtotal, Tensor total, Tensor? rest, Tensor weight, Tensor? bias, Tensor? z, "
    f"Tensor rstd, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
rms_norm_fwd = define(
    "rms_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? z, float eps, "
    f"{_OPTIONS}, bool wide, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
