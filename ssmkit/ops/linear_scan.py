"""Linear scan: a first-order recurrence per channel.

    h_l = a_l h_{l-1} + b_l                               (1)

The diagonal recurrence of S5 (Smith et al. 2022, arXiv:2208.04933) and of gated linear RNNs, real or complex. A reset
sets a_l to zero there, which is the operator with resets of Lu et al. 2023 (arXiv:2303.03982).
"""

from typing import Any, NamedTuple

import torch
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
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._walk import flags_of

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.linear_scan_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.linear_scan"),
    Backend("cpu", device="cpu", module="ssmkit.native.linear_scan"),
)


class LinearScanOutput(NamedTuple):
    """What `linear_scan` returns when the final state is asked for."""

    h: Tensor
    final_state: Tensor


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | LinearScanOutput:
    """Linear recurrence over the token axis, for each channel by itself.

        h_l = a_l h_{l-1} + b_l                           (1)

    The diagonal recurrence of S5, arXiv:2208.04933; with `resets` that of arXiv:2303.03982. Gradients of complex
    numbers follow PyTorch (dL/dRe + i dL/dIm).

    Args:
        a: Decays, per token                     (batch, seqlen, dim)  as b
            or the same for all tokens           (dim,)                fp32 (fp64 with b); complex with b
        b: Inputs                                (batch, seqlen, dim)  fp32, bf16, fp16, fp64, complex64 or complex128
        initial_state: State before the walk     (nseq, dim)           fp32 (fp64 with b); complex with b; nseq is batch,
            or with cu_seqlens the number of packed sequences
        resets: Tokens that drop the state before them      (batch, seqlen)  bool
        mask: True at real tokens; a pad leaves the state untouched, h there is the state carried past it, and its a
            and b get no gradient.               (batch, seqlen)       bool
        cu_seqlens: Offsets of sequences packed into one row of batch 1      (nseq + 1,)  int32 or int64
        reverse: Walk from the last token to the first.
        return_final_state: Return (h, final_state) instead of h.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        h of the shape and dtype of b; final_state (nseq, dim) in fp32 (fp64, complex64 or complex128 with b),
        differentiable. The state is kept in that dtype throughout.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(a, b, initial_state, resets, mask, cu_seqlens)
    acc = acc_dtype(b.dtype)
    a = a.to(acc) if a.ndim == 1 else a
    initial_state = None if initial_state is None else initial_state.to(acc)

    chosen = choose("linear_scan", BACKENDS, backend, b)
    if chosen == "reference":
        h, final_state = linear_scan_ref(a, b, initial_state, resets, mask, cu_seqlens, reverse)
    else:
        tensors = (a, b, initial_state)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        h, final_state, _ = linear_scan_fwd(*tensors, flags_of(resets, mask), cu_seqlens, reverse, save, chosen)
    return LinearScanOutput(h, final_state) if return_final_state else h


def check(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse what no backend may see."""
    check_ndim("b", b, "batch, seqlen, dim")
    check_dtype("b", b, (*FLOATS, *COMPLEXES))
    check_sizes(b, "b")
    batch, seqlen, dim = b.shape
    if a.ndim == 1:
        check_shape("a", a, (dim,), "dim")
        check_dtype("a", a, *parameter_dtypes(b, "b"))
    else:
        if a.ndim != 3:
            raise ValueError(f"a must have shape (batch, seqlen, dim) or (dim,), got {tuple(a.shape)}")
        check_shape("a", a, b.shape, "batch, seqlen, dim")
        check_dtype("a", a, (b.dtype,), "like b")
    check_flag("resets", resets, batch, seqlen)
    check_flag("mask", mask, batch, seqlen)
    check_device(b, "b", a=a, initial_state=initial_state, resets=resets, mask=mask, cu_seqlens=cu_seqlens)
    nseq = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seqlen, "b")
        nseq = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_shape("initial_state", initial_state, (nseq, dim), "nseq, dim")
        check_dtype("initial_state", initial_state, *parameter_dtypes(b, "b"))


def linear_scan_ref(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Equation (1), one token at a time, in float64 (complex128). Returns h and the final state."""
    batch, seqlen, dim = b.shape
    wide = torch.complex128 if b.is_complex() else torch.float64
    a_BLD, b_BLD = a.to(wide).expand(b.shape), b.to(wide)
    if mask is not None:
        # A pad's numbers do not enter at all, so they may be anything.
        a_BLD, b_BLD = torch.where(mask[..., None], a_BLD, 1.0), torch.where(mask[..., None], b_BLD, 0.0)
    if resets is not None:
        a_BLD = torch.where(resets[..., None], 0.0, a_BLD)

    # All rows of the batch walk together; packed sequences walk one after another.
    if cu_seqlens is None:
        walks = [(slice(0, batch), range(seqlen))]
    else:
        offsets = cu_seqlens.tolist()
        walks = [(slice(s, s + 1), range(*offsets[s : s + 2])) for s in range(len(offsets) - 1)]
    nseq = batch if cu_seqlens is None else len(walks)
    state_BD = b_BLD.new_zeros(nseq, dim) if initial_state is None else initial_state.to(wide)

    h, final = [b_BLD.new_zeros(batch, dim)] * seqlen, []
    for sequences, tokens in walks:
        h_BD = state_BD[sequences]
        for token in reversed(tokens) if reverse else tokens:
            h_BD = a_BLD[:, token] * h_BD + b_BLD[:, token]  # (1)
            h[token] = h_BD
        final.append(h_BD)
    h_BLD = torch.stack(h, dim=1) if h else b_BLD
    return h_BLD.to(b.dtype), (torch.cat(final) if final else state_BD).to(acc_dtype(b.dtype))


def _for_kernels(a: Tensor, b: Tensor, *tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """The layout that kernels rely on: per-token tensors in flat rows, states and flags dense, offsets in int64."""
    initial_state, flags, cu_seqlens = (None if t is None else t.contiguous() for t in tables)
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    dense_a = _settled(a).contiguous() if a.ndim == 1 else flat_rows(_settled(a))
    return dense_a, flat_rows(_settled(b)), None if initial_state is None else _settled(initial_state), flags, offsets


def _settled(x: Tensor) -> Tensor:
    """`x` with a lazy conjugation or negation carried out: kernels see memory."""
    return x.resolve_conj().resolve_neg()


def _forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = _for_kernels(a, b, initial_state, flags, cu_seqlens)
    return load(BACKENDS, backend).forward(*tensors, reverse, save)


def _forward_fake(
    a: Tensor, b: Tensor, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(b.dtype)
    nseq = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = b.shape if save and keeps_states(a, b) else (0,)
    return b.new_empty(b.shape), b.new_empty(nseq, b.shape[2], dtype=acc), b.new_empty(states, dtype=acc)


def keeps_states(a: Tensor, b: Tensor) -> bool:
    """Whether backward needs the states unrounded: a constant's gradient is a sum over tokens, in full precision."""
    return a.ndim == 1 and b.dtype != acc_dtype(b.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, initial_state, flags, cu_seqlens, reverse, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = linear_scan_fwd(*inputs[:6], True, backend)
    h, _, states = output
    ctx.save_for_backward(a, states if keeps_states(a, b) else h, initial_state, flags, cu_seqlens)
    ctx.options = (reverse, backend)
    ctx.dtype = b.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    a, states, initial_state, flags, cu_seqlens = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(states, dtype=ctx.dtype)
    grads = linear_scan_bwd(dh, dfinal_state, a, states, initial_state, flags, cu_seqlens, *ctx.options)
    return (*gradients(grads, (a, dh, initial_state)), *[None] * 5)


def _backward(
    dh: Tensor, dfinal_state: Tensor | None, a: Tensor, states: Tensor, initial_state: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    a_rows, dh_rows, *tables = _for_kernels(a, dh, initial_state, flags, cu_seqlens)
    dfinal_state = None if dfinal_state is None else _settled(dfinal_state).contiguous()
    outputs = load(BACKENDS, backend).backward(dh_rows, dfinal_state, a_rows, states.contiguous(), *tables, reverse)
    return present(outputs, dh)


def _backward_fake(
    dh: Tensor, dfinal_state: Tensor | None, a: Tensor, states: Tensor, initial_state: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(absent(dh) if t is None else t.new_empty(t.shape) for t in (a, dh, initial_state))


linear_scan_bwd = define(
    "linear_scan_bwd(Tensor dh, Tensor? dfinal_state, Tensor a, Tensor states, Tensor? initial_state, Tensor? flags, "
    "Tensor? cu_seqlens, bool reverse, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
linear_scan_fwd = define(
    "linear_scan_fwd(Tensor a, Tensor b, Tensor? initial_state, Tensor? flags, Tensor? cu_seqlens, bool reverse, "
    "bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
