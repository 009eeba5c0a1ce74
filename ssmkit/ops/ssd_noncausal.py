"""Non-causal state-space duality: one weighted state for a whole image, which every token reads.

    w_l = -dt_l A                            how much of token l the state takes, per head
    S = sum_l w_l x_l B_l^T                  (P, N) per head and sequence; no decay, no order
    y_l = S C_l + D x_l

Section 3 of Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", arXiv:2407.18559, as its code
computes it: the causal recurrence divided through by its decays and run both ways, without the token counted twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import check_cu_seqlens, check_device, check_flag, check_heads, check_sizes
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._walk import flags_of, step_sizes, walks

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.ssd_noncausal_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.ssd_noncausal"),
    Backend("cpu", device="cpu", module="ssmkit.native.ssd_noncausal"),
)


class NoncausalOutput(NamedTuple):
    """y, and the state that all its tokens read."""

    y: Tensor
    state: Tensor


def ssd_noncausal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved_groups: bool = False,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | NoncausalOutput:
    """State-space duality without an order: every token reads the sum over all tokens.

        dt_l <- softplus(dt_l + dt_bias)              where asked
        w_l = -dt_l A
        S = sum_l w_l x_l B_l^T                       one (headdim, dstate) state per head
        y_l = S C_l + D x_l

    Shi et al. 2024, "VSSD", arXiv:2407.18559, section 3. There is no exponential and no normaliser: S grows with the
    number of tokens. Its code takes w = dt |A| ("ssd_positve_dA"), which is this with A = -exp(A_log); give A the other
    sign for its opposite.

    Args:
        x: Input                                  (batch, seqlen, nheads, headdim)   fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, seqlen, nheads)            as x
        A: Rates, negative as in `ssd`            (nheads,)                          float
        B, C: Input and output weights per token  (batch, seqlen, ngroups, dstate)   as x; head h reads group
            h // (nheads // ngroups), as in `ssd`
        D: Skip weights                           (nheads,) or (nheads, headdim)     float
        dt_bias: Added to dt before softplus      (nheads,)                          float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        mask: True at real tokens; a pad is left out of the state, its y is 0 and it gets no gradient.
                                                  (batch, seqlen)                    bool
        cu_seqlens: Offsets of images packed into one row of batch 1, each with a state of its own
                                                  (nseq + 1,)                        int32 or int64
        interleaved_groups: Head h reads group h % ngroups instead, as in VSSD's code; with one group they are the same.
        return_state: Return (y, state) instead of y.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x; state (nseq, nheads, headdim, dstate) in fp32 (fp64 for fp64 inputs),
        differentiable; nseq is batch, or with cu_seqlens the number of packed images.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    _check(x, dt, A, B, C, D, dt_bias, mask, cu_seqlens)
    acc = acc_dtype(x.dtype)
    A, dt_bias = A.to(acc), None if dt_bias is None else dt_bias.to(acc)
    D = None if D is None else (D if D.ndim == 2 else D[:, None]).to(acc).expand(*x.shape[2:])
    chosen = choose("ssd_noncausal", BACKENDS, backend, x)
    if chosen == "reference":
        y, state = ssd_noncausal_ref(x, dt, A, B, C, D, dt_bias, mask, cu_seqlens, dt_softplus, interleaved_groups)
    else:
        y, state = ssd_noncausal_fwd(
            x, dt, A, B, C, D, dt_bias, flags_of(None, mask), cu_seqlens, dt_softplus, interleaved_groups, chosen
        )
    return NoncausalOutput(y, state) if return_state else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_heads(x, dt, A, B, C, D, None, dt_bias, "batch, seqlen")
    check_sizes(x)
    batch, seqlen = x.shape[:2]
    check_flag("mask", mask, batch, seqlen)
    check_device(x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seqlen)


def ssd_noncausal_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    interleaved_groups: bool,
) -> tuple[Tensor, Tensor]:
    """The equations in float64, one sequence after another: y and the states."""
    batch, seqlen, nheads, headdim = x.shape
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device) if mask is None else mask
    # A pad's numbers do not enter at all, so they may be anything.
    x_BLHP, B_BLGN, C_BLGN = (torch.where(real[..., None, None], t.double(), 0.0) for t in (x, B, C))
    dt_BLH = step_sizes(torch.where(real[..., None], dt, 0.0), dt_bias, dt_softplus)
    w_BLH = torch.where(real[..., None], -dt_BLH * A.double(), 0.0)
    head = torch.arange(nheads, device=x.device)
    group = head % B.shape[2] if interleaved_groups else head // (nheads // B.shape[2])
    rows = [t.flatten(0, 1) for t in (w_BLH, x_BLHP, B_BLGN[:, :, group], C_BLGN[:, :, group])]

    y, states = torch.zeros_like(rows[1]), []
    for tokens in walks(batch, seqlen, cu_seqlens, None, False):
        at = torch.tensor(tokens, dtype=torch.long, device=x.device)
        w_LH, x_LHP, B_LHN, C_LHN = (t.index_select(0, at) for t in rows)
        states.append(torch.einsum("lh,lhp,lhn->hpn", w_LH, x_LHP, B_LHN))
        y = y.index_add(0, at, torch.einsum("hpn,lhn->lhp", states[-1], C_LHN))
    y = y.view_as(x)
    if D is not None:
        y = y + D.double() * x_BLHP
    y = torch.where(real[..., None, None], y, 0.0)
    state = torch.stack(states) if states else x_BLHP.new_zeros(0, nheads, headdim, B.shape[3])
    return y.to(x.dtype), state.to(acc_dtype(x.dtype))


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, interleaved_groups: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        y, state = _forward_fake(
            x, dt, A, B, C, D, dt_bias, flags, cu_seqlens, dt_softplus, interleaved_groups, backend
        )
        return y, state.zero_()
    inputs = _for_kernels(x, dt, A, B, C, D, dt_bias, flags, cu_seqlens)
    y, state = load(BACKENDS, backend).forward(*inputs, dt_softplus, interleaved_groups)
    return y, state


def _for_kernels(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The layout that kernels rely on: per-token tensors in flat rows, parameters and tables dense."""
    x, dt, A, B, C, D, dt_bias, flags, cu_seqlens = tensors
    x, dt, B, C = (None if t is None else flat_rows(t) for t in (x, dt, B, C))
    A, D, dt_bias, flags = (None if t is None else t.contiguous() for t in (A, D, dt_bias, flags))
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    return x, dt, A, B, C, D, dt_bias, flags, offsets


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, interleaved_groups: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), A.new_empty(nseq, *x.shape[2:], B.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    *tensors, state = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = ssd_noncausal_bwd(dy, dstate, *tensors, state, *ctx.options)
    return (*gradients(grads, tensors[:7]), *[None] * 5)


def _backward(
    dy: Tensor, dstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None, state: Tensor, dt_softplus: bool,
    interleaved_groups: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.numel() == 0:
        return present([None if t is None else torch.zeros_like(t) for t in (x, dt, A, B, C, D, dt_bias)], x)
    inputs = _for_kernels(x, dt, A, B, C, D, dt_bias, flags, cu_seqlens)
    dstate = None if dstate is None else dstate.contiguous()
    outputs = load(BACKENDS, backend).backward(
        flat_rows(dy), dstate, *inputs, state.contiguous(), dt_softplus, interleaved_groups
    )
    return present(outputs, x)


def _backward_fake(
    dy: Tensor, dstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None, state: Tensor, dt_softplus: bool,
    interleaved_groups: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias))


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? flags, Tensor? cu_seqlens"
)
_OPTIONS = "bool dt_softplus, bool interleaved_groups, str backend"
ssd_noncausal_bwd = define(
    f"ssd_noncausal_bwd(Tensor dy, Tensor? dstate, {_INPUTS}, Tensor state, {_OPTIONS})"
    f" -> ({', '.join(['Tensor'] * 7)})",
    _backward,
    _backward_fake,
)
ssd_noncausal_fwd = define(
    f"ssd_noncausal_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
