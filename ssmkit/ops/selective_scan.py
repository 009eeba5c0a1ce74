"""Selective scan, the recurrence of Mamba-1.

    h_l = exp(dt_l A) * h_{l-1} + dt_l B_l x_l          (2a) with (4), first order in dt for B
    y_l = C_l . h_l + D x_l                             (2b), then y_l * silu(z_l) if gated

Numbers follow Gu & Dao 2023, "Mamba", arXiv:2312.00752. With A complex the states come in conjugate pairs of which one
is kept, and y_l = 2 Re(C_l . h_l) + D x_l.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import (
    COMPLEXES,
    FLOATS,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_flag,
    check_ndim,
    check_shape,
    check_sizes,
    parameter_dtypes,
)
from ssmkit.ops._define import COMPLEX_OF, REAL_OF, absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._walk import ScanOutput, checkpoint_slots, flags_of, step_sizes, walks, with_restarts
from ssmkit.paths import ScanPath

CHECKPOINT_EVERY = 64  # tokens between the states that backward starts from


def complex_states(*, complex_A: bool = False, **_: object) -> str | None:
    """Why a backend with real states only cannot take the call."""
    return "A is complex, which the reference and the cpu backend take" if complex_A else None


BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.selective_scan_cuda", rejects=complex_states),
    Backend("triton", device="cuda", module="ssmkit.kernels.selective_scan", rejects=complex_states),
    Backend("cpu", device="cpu", module="ssmkit.native.selective_scan"),
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    path: ScanPath | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | ScanOutput:
    """Selective state-space scan over the token axis.

        dt_l <- softplus(dt_l + dt_bias)                    where asked
        h_l = exp(dt_l A) * h_{l-1} + dt_l B_l x_l          (2a) with (4), first order in dt for B
        y_l = (C_l . h_l + D x_l) * silu(z_l)               (2b)

    Numbers follow Gu & Dao 2023, "Mamba", arXiv:2312.00752. In older code x is `u`, dt is `delta`, and tensors lie as
    (batch, dim, seqlen).

    Args:
        x: Input                                  (batch, seqlen, dim)      fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, seqlen, dim)      as x
        A: Decay rates, real part negative        (dim, dstate)             fp32 (fp64 with x); complex for pairs
        B, C: Input and output weights, per token (batch, seqlen, dstate) or (batch, seqlen, ngroups, dstate), as x
            (complex with A), channel d reading group d // (dim // ngroups); or constant (dim, dstate), as A.
        D: Skip weights                           (dim,)                    float
        z: Gate logits                            (batch, seqlen, dim)      as x
        dt_bias: Added to dt before softplus      (dim,)                    float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        initial_state: State before the walk      (nseq, dim, dstate)       as A; nseq is batch, or with cu_seqlens
            the number of packed sequences
        resets: Tokens that drop the state before them        (batch, seqlen)  bool
        mask: True at real tokens; a pad leaves the state untouched, its y is 0 and it gets no gradient.
                                                  (batch, seqlen)           bool
        cu_seqlens: Offsets of sequences packed into one row of batch 1      (nseq + 1,)  int32 or int64
        reverse: Walk from the last token to the first.
        path: Order in which the tokens are visited; `reverse` walks it backwards. Its restarts act like `resets`.
        return_final_state: Return (y, final_state) instead of y.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x; final_state (nseq, dim, dstate) in fp32 (fp64 for fp64 inputs; complex with A),
        differentiable. The state is kept in that dtype throughout.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(x, dt, A, B, C, D, z, dt_bias, initial_state, resets, mask, cu_seqlens, path)
    acc = acc_dtype(x.dtype)
    A = A.to(COMPLEX_OF[acc] if A.is_complex() else acc)
    B, C = (_weights(weight, x, A) for weight in (B, C))
    D, dt_bias = (None if vector is None else vector.to(acc) for vector in (D, dt_bias))
    initial_state = None if initial_state is None else initial_state.to(A.dtype)
    if path is not None:
        reverse, resets = reverse != path.reversed, with_restarts(resets, path, x)
    order = None if path is None else path.order(x.device)

    chosen = choose("selective_scan", BACKENDS, backend, x, complex_A=A.is_complex())
    if chosen == "reference":
        y, final_state = selective_scan_ref(
            x, dt, A, B, C, D, z, dt_bias, initial_state, resets, mask, cu_seqlens, order, dt_softplus, reverse
        )
    else:
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        flags = flags_of(resets, mask)
        y, final_state, _ = selective_scan_fwd(*tensors, order, flags, cu_seqlens, dt_softplus, reverse, save, chosen)
    return ScanOutput(y, final_state) if return_final_state else y


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    path: ScanPath | None,
) -> None:
    """Refuse what no backend may see."""
    check_ndim("x", x, "batch, seqlen, dim")
    check_dtype("x", x, FLOATS)
    check_sizes(x)
    batch, seqlen, dim = x.shape
    check_ndim("A", A, "dim, dstate")
    dstate = A.shape[1]
    check_shape("A", A, (dim, dstate), "dim, dstate")
    acc = acc_dtype(x.dtype)
    narrow, wider = parameter_dtypes(x)
    check_dtype("A", A, (*narrow, COMPLEX_OF[acc], torch.complex64), wider)
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None:
            check_shape(name, tensor, x.shape, "batch, seqlen, dim")
            check_dtype(name, tensor, (x.dtype,), "like x")
    for name, weight in (("B", B), ("C", C)):
        _check_weights(name, weight, x, A)
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_shape(name, vector, (dim,), "dim")
            check_dtype(name, vector, narrow, wider)
    check_flag("resets", resets, batch, seqlen)
    check_flag("mask", mask, batch, seqlen)
    check_device(
        x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
        initial_state=initial_state, resets=resets, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    nseq = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seqlen)
        nseq = cu_seqlens.shape[0] - 1
        if path is not None:
            raise ValueError("path orders the tokens of whole rows: give either path or cu_seqlens, not both")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (nseq, dim, dstate), "nseq, dim, dstate")
        kinds = (*narrow, COMPLEX_OF[acc], torch.complex64) if A.is_complex() else narrow
        check_dtype("initial_state", initial_state, kinds, "like A")
    if path is not None and path.length != seqlen:
        raise ValueError(f"path must visit {seqlen} tokens like x, got {path.length}")


def _check_weights(name: str, weight: Tensor, x: Tensor, A: Tensor) -> None:
    batch, seqlen, dim = x.shape
    if weight.ndim == 2:
        check_shape(name, weight, A.shape, "dim, dstate")
        kinds = (A.dtype, REAL_OF[A.dtype]) if A.is_complex() else (A.dtype,)
        check_dtype(name, weight, kinds, "like A, being constant")
        return
    if weight.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape (batch, seqlen, dstate), (batch, seqlen, ngroups, dstate) or (dim, dstate), "
            f"got {tuple(weight.shape)}"
        )
    ngroups = weight.shape[2] if weight.ndim == 4 else 1
    middle = (ngroups,) if weight.ndim == 4 else ()
    check_shape(name, weight, (batch, seqlen, *middle, A.shape[1]), "batch, seqlen, [ngroups,] dstate")
    if ngroups < 1 or dim % ngroups:
        raise ValueError(f"{name} has {ngroups} groups, which must divide dim {dim}")
    wide = acc_dtype(x.dtype) == torch.float64
    per_token = (x.dtype, *(COMPLEXES if wide else COMPLEXES[:1])) if A.is_complex() else (x.dtype,)
    check_dtype(name, weight, per_token, "like x" + (", or complex like A" if A.is_complex() else ""))


def _weights(weight: Tensor, x: Tensor, A: Tensor) -> Tensor:
    """B or C as the kernels take it: (batch, seqlen, ngroups, dstate), or (dim, dstate) in the dtype of A."""
    if weight.ndim == 3:
        weight = weight.unsqueeze(2)
    return weight.to(A.dtype) if A.is_complex() or weight.ndim == 2 else weight


def selective_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    order: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Equations (2a), (2b), (4), one token at a time, in float64. Returns y and the final state."""
    batch, seqlen, dim = x.shape
    wide = torch.complex128 if A.is_complex() else torch.float64
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device) if mask is None else mask
    # A pad's numbers do not enter at all, so they may be anything.
    x_BLD = torch.where(real[..., None], x.double(), 0.0)
    dt_BLD = step_sizes(torch.where(real[..., None], dt, 0.0), dt_bias, dt_softplus)
    A_DN = A.to(wide)
    B_BLDN, C_BLDN = (_per_channel(weight, real, dim).to(wide) for weight in (B, C))
    dt_BLD = torch.where(real[..., None], dt_BLD, 0.0)
    keep = torch.ones_like(real) if resets is None else ~resets
    zero = A_DN.new_zeros(dim, A.shape[1])

    # One view per token: indexing in the loop would give every token a gradient of the whole tensor.
    tokens = [tensor.flatten(0, 1).unbind(0) for tensor in (x_BLD, dt_BLD, B_BLDN, C_BLDN, keep)]
    y_BLD = [torch.empty(0)] * (batch * seqlen)
    final = []
    for sequence, rows in enumerate(walks(batch, seqlen, cu_seqlens, order, reverse)):
        h_DN = zero if initial_state is None else initial_state[sequence].to(wide)
        for row in rows:
            x_D, dt_D, B_DN, C_DN, kept = (tensor[row] for tensor in tokens)
            Abar_DN = torch.exp(dt_D[:, None] * A_DN)  # (4)
            Bbar_DN = dt_D[:, None] * B_DN  # (4), first order in dt
            h_DN = Abar_DN * torch.where(kept, h_DN, zero) + Bbar_DN * x_D[:, None]  # (2a)
            y_D = (C_DN * h_DN).sum(-1)  # (2b)
            y_BLD[row] = 2 * y_D.real if A.is_complex() else y_D
        final.append(h_DN)
    y = torch.stack(y_BLD).view(batch, seqlen, dim) if y_BLD else x_BLD
    if D is not None:
        y = y + D.double() * x_BLD
    if z is not None:
        y = y * F.silu(torch.where(real[..., None], z.double(), 0.0))
    y = torch.where(real[..., None], y, 0.0)
    final_state = torch.stack(final) if final else A_DN.new_zeros(0, dim, A.shape[1])
    return y.to(x.dtype), final_state.to(A.dtype)


def _per_channel(weight: Tensor, real: Tensor, dim: int) -> Tensor:
    """B or C as (batch, seqlen, dim, dstate), zero at pads."""
    if weight.ndim == 2:
        return weight.expand(*real.shape, *weight.shape)
    weight = torch.where(real[..., None, None], weight, 0.0)
    return repeat(weight, "b l g n -> b l (g r) n", r=dim // weight.shape[2])


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, dt_softplus: bool, reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = _for_kernels(x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens)
    return load(BACKENDS, backend).forward(*tensors, dt_softplus, reverse, save)


def _for_kernels(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The layout that kernels rely on: per-token tensors in flat rows, parameters and tables dense."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens = tensors
    rows = [None if t is None else flat_rows(t) if t.ndim > 2 else t.contiguous() for t in (x, dt, B, C, z)]
    dense = [None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state, order, flags)]
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    return (rows[0], rows[1], dense[0], rows[2], rows[3], dense[1], rows[4], *dense[2:], offsets)


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, dt_softplus: bool, reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, seqlen, dim), dstate = x.shape, A.shape[1]
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = checkpoint_slots(batch, seqlen, nseq, CHECKPOINT_EVERY, packed=cu_seqlens is not None) if save else 0
    return x.new_empty(x.shape), A.new_empty(nseq, dim, dstate), A.new_empty(slots, dstate, dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, reverse, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = selective_scan_fwd(*tensors, dt_softplus, reverse, True, backend)
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = (dt_softplus, reverse, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = selective_scan_bwd(dy, dfinal_state, *tensors, checkpoints, *ctx.options)
    return (*gradients(grads, tensors[:9]), *[None] * 7)


def _backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, checkpoints: Tensor, dt_softplus: bool, reverse: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = _for_kernels(x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    outputs = load(BACKENDS, backend).backward(flat_rows(dy), dfinal_state, *tensors, checkpoints, dt_softplus, reverse)
    return present(outputs, x)


def _backward_fake(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, checkpoints: Tensor, dt_softplus: bool, reverse: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in inputs)


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? order, Tensor? flags, Tensor? cu_seqlens"
)
selective_scan_bwd = define(
    f"selective_scan_bwd(Tensor dy, Tensor? dfinal_state, {_INPUTS}, Tensor checkpoints, bool dt_softplus, "
    f"bool reverse, str backend) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
selective_scan_fwd = define(
    f"selective_scan_fwd({_INPUTS}, bool dt_softplus, bool reverse, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
