"""State-space duality, the recurrence of Mamba-2: one decay per head, so that a chunk of tokens is a matrix product.

    h_l = exp(dt_l A) h_{l-1} + dt_l x_l B_l^T          (P, N) per head; section 2 with a scalar times the identity
    y_l = h_l C_l + D x_l                               then y_l * silu(z_l) if gated
    Y   = (L o C B^T) (dt X),  L_ts = exp(sum_{s<k<=t} dt_k A) for s <= t, else 0      the same map, (3) and (16)

Numbers follow Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import (
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_flag,
    check_heads,
    check_limits,
    check_shape,
    check_sizes,
    parameter_dtypes,
)
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._ssd_reference import ssd_ref
from ssmkit.ops._walk import ScanOutput, checkpoint_slots, flags_of

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.ssd_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.ssd"),
    Backend("cpu", device="cpu", module="ssmkit.native.ssd"),
)
AUTO_CHUNK = 64
# Longest chunks: of Triton's tiles that fit the registers, by the bytes of an element; the CPU's scratch grows with chunk^2.
TRITON_LONGEST = {2: 64, 4: 32, 8: 16}
CPU_LONGEST = 256


def ssd(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    bidirectional: bool = False,
    chunk: int | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | ScanOutput:
    """State-space duality over the token axis, chunk by chunk.

        dt_l <- clamp(softplus(dt_l + dt_bias), *dt_limit)            softplus where asked
        h_l = exp(dt_l A) h_{l-1} + dt_l x_l B_l^T                    one (headdim, dstate) state per head
        y_l = (h_l C_l + D x_l) * silu(z_l)

    Numbers follow Dao & Gu 2024, arXiv:2405.21060, where x, B, C are also called V, K, Q.

    With `bidirectional` two walks, forward h and reverse g, run over the same inputs and
    y_l = (h_l C_l + g_l C_l + D x_l) * silu(z_l): each walk includes the token itself, so the diagonal term
    dt_l (B_l . C_l) x_l counts twice, D x_l and the gate once. The states then carry a leading axis of two,
    0 for the forward walk and 1 for the reverse one, each where its own walk begins or ends.

    Args:
        x: Input                                  (batch, seqlen, nheads, headdim)   fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, seqlen, nheads)            as x
        A: Decay rates, negative                  (nheads,)                          fp32 (fp64 with x)
        B, C: Input and output weights per token  (batch, seqlen, ngroups, dstate)   as x; head h reads group
            h // (nheads // ngroups)
        D: Skip weights                           (nheads,) or (nheads, headdim)     float
        z: Gate logits                            (batch, seqlen, nheads, headdim)   as x
        dt_bias: Added to dt before softplus      (nheads,)                          float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        dt_limit: dt is clamped into it, after softplus; outside dt gets no gradient.
        initial_state: State before the walk      (nseq, nheads, headdim, dstate)    float; nseq is batch, or with
            cu_seqlens the number of packed sequences; (2, nseq, ...) with bidirectional
        resets: Tokens at which a walk drops the state that it carries               (batch, seqlen)  bool
        mask: True at real tokens; a pad leaves the state untouched, its y is 0 and it gets no gradient.
                                                  (batch, seqlen)                    bool
        cu_seqlens: Offsets of sequences packed into one row of batch 1              (nseq + 1,)  int32 or int64
        reverse: Walk from the last token to the first.
        bidirectional: Walk both ways and add; not together with reverse.
        chunk: Tokens per chunk; changes speed and memory, not the result beyond rounding. A backend takes the nearest
            size that it has.
        return_final_state: Return (y, final_state) instead of y.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x; final_state (nseq, nheads, headdim, dstate), or (2, nseq, ...), in fp32 (fp64 for
        fp64 inputs), differentiable. The state is kept in that dtype throughout.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(
        x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, resets, mask, cu_seqlens, reverse, bidirectional, chunk
    )
    acc = acc_dtype(x.dtype)
    A, (dt_bias, initial_state) = A.to(acc), (None if t is None else t.to(acc) for t in (dt_bias, initial_state))
    D = None if D is None else (D if D.ndim == 2 else D[:, None]).to(acc).expand(*x.shape[2:])
    dt_min, dt_max = map(float, dt_limit)

    chosen = choose("ssd", BACKENDS, backend, x)
    if chosen == "reference":
        y, final_state = ssd_ref(
            x, dt, A, B, C, D, z, dt_bias, initial_state, resets, mask, cu_seqlens,
            dt_softplus, dt_min, dt_max, reverse, bidirectional,
        )  # fmt: skip
    else:
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, final_state, _, _ = ssd_fwd(
            *tensors, flags_of(resets, mask), cu_seqlens, dt_softplus, dt_min, dt_max, reverse, bidirectional,
            chunk_for(chosen, x.dtype, chunk), save, chosen,
        )  # fmt: skip
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
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    bidirectional: bool,
    chunk: int | None,
) -> None:
    """Refuse what no backend may see."""
    check_heads(x, dt, A, B, C, D, z, dt_bias, "batch, seqlen")
    check_sizes(x)
    batch, seqlen, nheads, headdim = x.shape
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
    if initial_state is not None:
        shape: tuple[int, ...] = (nseq, nheads, headdim, B.shape[3])
        axes = "nseq, nheads, headdim, dstate"
        if bidirectional:
            shape, axes = (2, *shape), f"walks, {axes}"
        check_shape("initial_state", initial_state, shape, axes)
        check_dtype("initial_state", initial_state, *parameter_dtypes(x))
    check_limits(dt_limit)
    if bidirectional and reverse:
        raise ValueError("bidirectional walks both ways already: give either reverse or bidirectional, not both")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")


def chunk_for(backend: str, dtype: torch.dtype, chunk: int | None) -> int:
    """Tokens per chunk that `backend` takes where `chunk` are asked for; on Triton a power of two, 16 or more."""
    wanted = AUTO_CHUNK if chunk is None else chunk
    if backend == "triton":
        return min(max(16, 1 << (wanted - 1).bit_length()), TRITON_LONGEST[dtype.itemsize])
    return min(wanted, CPU_LONGEST)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, bidirectional: bool, chunk: int, save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        return _forward_empty(
            x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens,
            dt_softplus, dt_min, dt_max, reverse, bidirectional, chunk, save, backend,
        )  # fmt: skip
    kernels, options = load(BACKENDS, backend), (dt_softplus, dt_min, dt_max)
    x, dt, A, B, C, D, z, dt_bias, initial_state, *walk = _for_kernels(
        x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens
    )
    if not bidirectional:
        y, final_state, checkpoints, ungated = kernels.forward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, *walk, None, *options, reverse, chunk, save, False
        )
    else:
        # The reverse walk leaves its y unrounded, without skip and gate; the forward walk adds it to its own.
        first, second = (None, None) if initial_state is None else initial_state.unbind(0)
        back = kernels.forward(
            x, dt, A, B, C, None, None, dt_bias, second, *walk, None, *options, True, chunk, save, True
        )
        ahead = kernels.forward(
            x, dt, A, B, C, D, z, dt_bias, first, *walk, back[0], *options, False, chunk, save, False
        )
        y, ungated = ahead[0], ahead[3]
        final_state, checkpoints = torch.stack([ahead[1], back[1]]), torch.stack([ahead[2], back[2]])
    return y, final_state, checkpoints, absent(A) if ungated is None else ungated


def _forward_empty(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No token of any head: the final state is the initial one."""
    y, final_state, checkpoints, ungated = _forward_fake(*args)
    initial_state = args[8]
    final_state = final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    return y, final_state, checkpoints.zero_(), ungated


def _for_kernels(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The layout that kernels rely on: per-token tensors in flat rows, parameters and tables dense."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens = tensors
    rows = [None if t is None else flat_rows(t) for t in (x, dt, B, C, z)]
    dense = [None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state, flags)]
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    return (rows[0], rows[1], dense[0], rows[2], rows[3], dense[1], rows[4], *dense[2:], offsets)


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, bidirectional: bool, chunk: int, save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, seqlen, nheads, headdim = x.shape
    dstate, ways = B.shape[3], (2,) if bidirectional else ()
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = checkpoint_slots(batch, seqlen, nseq, chunk, packed=cu_seqlens is not None) if save else 0
    return (
        x.new_empty(x.shape),
        A.new_empty(*ways, nseq, nheads, headdim, dstate),
        A.new_empty(*ways, slots, nheads, dstate, headdim),
        A.new_empty(x.shape if save and z is not None else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, dt_min, dt_max, reverse, bidirectional, chunk, save, backend = inputs
    options = (dt_softplus, dt_min, dt_max, reverse, bidirectional, chunk)
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = ssd_fwd(*tensors, *options, True, backend)
    ctx.save_for_backward(*tensors, output[2], output[3])
    ctx.options = (*options, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *tensors, checkpoints, ungated = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = ssd_bwd(dy, dfinal_state, *tensors, checkpoints, ungated, *ctx.options)
    return (*gradients(grads, tensors[:9]), *[None] * 10)


def _backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor, ungated: Tensor, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, bidirectional: bool, chunk: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    like, inputs = x, (x, dt, A, B, C, D, z, dt_bias)
    if x.numel() == 0:
        dinitial = None
        if initial_state is not None:
            dinitial = torch.zeros_like(initial_state) if dfinal_state is None else dfinal_state.clone()
        return present([*(None if t is None else torch.zeros_like(t) for t in inputs), dinitial], like)
    kernels, options = load(BACKENDS, backend), (dt_softplus, dt_min, dt_max)
    x, dt, A, B, C, D, z, dt_bias, initial_state, *walk = _for_kernels(
        x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens
    )
    dy = flat_rows(dy)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    kept = None if z is None else ungated
    if not bidirectional:
        outputs = kernels.backward(
            dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, initial_state, *walk, checkpoints, kept,
            *options, reverse, chunk, False,
        )  # fmt: skip
        return present(outputs, like)

    # Both walks give their gradients unrounded; skip and gate belong to the forward one.
    first, second = (None, None) if initial_state is None else initial_state.unbind(0)
    dfirst, dsecond = (None, None) if dfinal_state is None else dfinal_state.unbind(0)
    ahead = kernels.backward(
        dy, dfirst, x, dt, A, B, C, D, z, dt_bias, first, *walk, checkpoints[0], kept, *options, False, chunk, True
    )
    back = kernels.backward(
        dy, dsecond, x, dt, A, B, C, None, z, dt_bias, second, *walk, checkpoints[1], None, *options, True, chunk, True
    )
    sums = [
        None if tensor is None else (f if r is None else f + r).to(tensor.dtype)
        for tensor, f, r in zip(inputs, ahead, back, strict=False)
    ]
    return present([*sums, None if initial_state is None else torch.stack([ahead[8], back[8]])], like)


def _backward_fake(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor, ungated: Tensor, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, bidirectional: bool, chunk: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in inputs)


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? flags, Tensor? cu_seqlens"
)
_OPTIONS = "bool dt_softplus, float dt_min, float dt_max, bool reverse, bool bidirectional, int chunk"
ssd_bwd = define(
    f"ssd_bwd(Tensor dy, Tensor? dfinal_state, {_INPUTS}, Tensor checkpoints, Tensor ungated, {_OPTIONS}, str backend)"
    f" -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
ssd_fwd = define(
    f"ssd_fwd({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
