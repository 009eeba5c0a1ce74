"""mamba_chunk_scan_combined and what is built around it."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.interop.layout import activation_of, common_dtype, early_end, walk_of_seq_idx, widen
from ssmkit.ops import causal_conv1d, rms_norm, selective_scan, ssd
from ssmkit.ops._check import check_ndim, check_shape

Limits = tuple[float, float]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """`ssmkit.ops.ssd` under its official name; shapes agree, so the tensors pass through.

    Inputs of several dtypes are widened to the widest; out is as x, states are in fp32. Any chunk, length, headdim and
    state size is taken, and every state returned has a gradient.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit: As in `ssd`.
        chunk_size: `chunk` of `ssd`; changes speed, not the result beyond rounding.
        initial_states: State before the first token    (batch, nheads, headdim, dstate); seen by sequence 0 of each row
        seq_idx: Number of each token's sequence, from 0; a change cuts, a negative number is a pad  (batch, seqlen) int
        cu_seqlens: Offsets of the sequences packed into one row; needed for, and read only with, varlen states. With
            seq_idx they may end before the row does; what follows leaves no state behind.
        return_final_states: Also return the state after each row.
        return_varlen_states: Also return the state after each sequence  (nseq, nheads, headdim, dstate)
        state_dtype: What states between chunks are kept in there; here always fp32 (fp64 for fp64), so a narrower dtype
            is taken and a wider one refused.
        backend: Handed to the op.
    Returns:
        out; or (out, final_states), (out, varlen_states), (out, final_states, varlen_states).
    """
    check_ndim("x", x, "batch, seqlen, nheads, headdim")
    if state_dtype is not None and torch.promote_types(state_dtype, _acc(x)) != _acc(x):
        raise ValueError(f"state_dtype must be no wider than {_acc(x)}, in which states are kept, got {state_dtype}")
    dtype = x.dtype
    x, dt, B, C, z = widen(common_dtype(x, dt, B, C, z), x, dt, B, C, z)  # type: ignore[assignment]
    resets, mask = walk_of_seq_idx(seq_idx, x)
    initial = initial_states
    if return_varlen_states:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens must be given with return_varlen_states=True")
        nseq = cu_seqlens.shape[0] - 1
        unread = torch.compiler.is_compiling() and seq_idx is not None
        if unread or early_end(cu_seqlens, seq_idx, x.shape[1]) is not None:
            cu_seqlens = F.pad(cu_seqlens, (0, 1), value=x.shape[1])
        if initial is not None and nseq:
            # only the first sequence sees it
            initial = torch.cat([initial, initial.new_zeros(len(cu_seqlens) - 2, *initial.shape[1:])])
    out, states = ssd(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=bool(dt_softplus),
        dt_limit=dt_limit,
        initial_state=initial,
        resets=resets,
        mask=mask,
        cu_seqlens=cu_seqlens if return_varlen_states else None,
        chunk=chunk_size,
        return_final_state=True,
        backend=backend,
    )
    out = out.to(dtype)
    if not return_varlen_states:
        return (out, states) if return_final_states else out
    states = states[:nseq]
    return (out, states[-1:], states) if return_final_states else (out, states)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """`mamba_chunk_scan_combined` without states."""
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus, backend=backend
    )


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, math.inf),
    *,
    backend: str = "auto",
) -> Tensor:
    """The same map by the recurrence of Mamba-1, `ssmkit.ops.selective_scan`.

    Args:
        x, z: (batch, seqlen, nheads, headdim)
        dt: (batch, seqlen, nheads) or (batch, seqlen, nheads, headdim)
        A: (nheads,) or (nheads * headdim, dstate)
        B, C: (batch, seqlen, ngroups, dstate)
        D, dt_bias: (nheads,) or (nheads, headdim)
    """
    check_ndim("x", x, "batch, seqlen, nheads, headdim")
    dtype, headdim = x.dtype, x.shape[-1]
    x, dt, B, C, z = widen(common_dtype(x, dt, B, C, z), x, dt, B, C, z)  # type: ignore[assignment]

    def per_channel(tensor: Tensor, axes: int) -> Tensor:
        """Heads repeated over their channels where there is no channel axis yet, and the two merged."""
        wide = tensor[..., None].expand(*tensor.shape, headdim) if tensor.ndim == axes else tensor
        return wide.flatten(-2)

    dt = per_channel(dt, 3)
    bias = None if dt_bias is None else per_channel(dt_bias, 1)
    if tuple(dt_limit) != (0.0, math.inf):
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        bias, dt_softplus = None, False
    out: Any = selective_scan(
        x.flatten(-2),
        dt,
        per_channel(A, 1)[:, None].expand(-1, B.shape[-1]) if A.ndim == 1 else A,
        B,
        C,
        D=None if D is None else per_channel(D, 1),
        z=None if z is None else z.flatten(-2),
        dt_bias=bias,
        dt_softplus=bool(dt_softplus),
        backend=backend,
    )
    return out.view(x.shape).to(dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: Limits = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """Everything of a Mamba-2 layer after in_proj: convolution, scan, gated norm, out_proj.

    Args:
        zxbcdt: in_proj(hidden): z0, x0, z, xBC, dt, of which z0 and x0 may be empty
            (batch, seqlen, 2 d_nonssm + 2 dim + 2 ngroups dstate + nheads)
        conv1d_weight, conv1d_bias: (dim + 2 ngroups dstate, width), (dim + 2 ngroups dstate,)
        dt_bias, A: (nheads,)
        D: (nheads,), then headdim must be given, or (nheads, headdim)
        activation: Of the convolution.
        rmsnorm_weight: Norm with a gate, in groups of dim / ngroups channels; without it the scan is gated.  (dim,)
        outproj_weight, outproj_bias: (d_model, d_nonssm + dim), (d_model,)
        norm_before_gate: norm(y) * silu(z), not norm(y * silu(z)).
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states, state_dtype: As in
            `mamba_chunk_scan_combined`; the convolution is cut where the scan is, and starts from zero.
        backend: Handed to the ops.
    Returns:
        out (batch, seqlen, d_model), or (out, final_states)
    """
    check_ndim("zxbcdt", zxbcdt, "batch, seqlen, channels")
    headdim = headdim if D.ndim == 1 else D.shape[1]
    if headdim is None:
        raise ValueError("headdim must be given where D has shape (nheads,)")
    nheads = D.shape[0]
    dim = nheads * headdim
    dstate = (conv1d_weight.shape[0] - dim) // ngroups // 2
    d_nonssm = (zxbcdt.shape[-1] - 2 * dim - 2 * ngroups * dstate - nheads) // 2
    sizes = (d_nonssm, d_nonssm, dim, dim + 2 * ngroups * dstate, nheads)
    if min(sizes) < 0 or sum(sizes) != zxbcdt.shape[-1]:
        raise ValueError(
            f"zxbcdt must have 2 d_nonssm + 2 * {dim} + 2 * {ngroups} * {dstate} + {nheads} channels, "
            f"got {zxbcdt.shape[-1]}"
        )
    check_shape("conv1d_weight", conv1d_weight, (sizes[3], conv1d_weight.shape[-1]), "dim + 2 ngroups dstate, width")
    z0, x0, z, xBC, dt = zxbcdt.split(sizes, dim=-1)
    resets, mask = walk_of_seq_idx(seq_idx, zxbcdt)
    xBC = causal_conv1d(  # type: ignore[assignment]
        xBC,
        conv1d_weight,
        conv1d_bias,
        activation=activation_of(activation),
        resets=resets,
        mask=mask,
        backend=backend,
    )
    x, B, C = xBC.split((dim, ngroups * dstate, ngroups * dstate), dim=-1)  # type: ignore[union-attr]
    y, final_states = mamba_chunk_scan_combined(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, dstate)),
        C.unflatten(-1, (ngroups, dstate)),
        chunk_size,
        D,
        z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
        backend=backend,
    )
    out = y.flatten(-2)
    if rmsnorm_weight is not None:
        out = rms_norm(
            out,
            rmsnorm_weight,
            z=z,
            eps=rmsnorm_eps,
            group_size=dim // ngroups,
            norm_before_gate=norm_before_gate,
            backend=backend,
        )
    if d_nonssm:
        out = torch.cat([F.silu(z0) * x0, out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, final_states) if return_final_states else out


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, math.inf),
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolution and scan without norm, by the references.

    Args:
        xBC: (batch, seqlen, dim + 2 ngroups dstate)
        dt: (batch, seqlen, nheads)
        z: Gate logits  (batch, seqlen, dim)
        headdim: Needed where neither z nor a D of shape (nheads, headdim) tells it.
    """
    nheads = dt.shape[2]
    if z is not None:
        headdim = z.shape[-1] // nheads
    elif D is not None and D.ndim == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim must be given where neither z nor D of shape (nheads, headdim) is")
    dim = nheads * headdim
    xBC = causal_conv1d(  # type: ignore[assignment]
        xBC, conv1d_weight, conv1d_bias, activation=activation_of(activation), backend="reference"
    )
    width = (xBC.shape[-1] - dim) // 2
    x, B, C = xBC.split((dim, width, width), dim=-1)
    out = ssd_selective_scan(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        D,
        None if z is None else z.unflatten(-1, (nheads, headdim)),
        dt_bias,
        dt_softplus,
        dt_limit,
        backend="reference",
    )
    return out.flatten(-2)


ssd_chunk_scan_combined_ref = partial(mamba_chunk_scan, backend="reference")


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: Limits = (0.0, math.inf),
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` without states and sequences, by the references."""
    return mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        dt_limit=dt_limit,
        activation=activation,
        rmsnorm_weight=rmsnorm_weight,
        rmsnorm_eps=rmsnorm_eps,
        outproj_weight=outproj_weight,
        outproj_bias=outproj_bias,
        headdim=headdim,
        ngroups=ngroups,
        norm_before_gate=norm_before_gate,
        backend="reference",
    )
