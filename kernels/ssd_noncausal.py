"""Triton kernels of ssd_noncausal: S = sum_l w_l x_l B_l^T with w = -dt A, and y_l = S C_l + D x_l.

The length is cut into spans. One launch leaves a partial state for every span of every head, a second adds them in their
order, a third makes the tokens of every chunk. Backward is the same with dy C^T in place of w x B^T, and two kernels for
the chunks: one gives what belongs to a head (dx, ddt and parts of dA, dD, ddt_bias), one adds dB and dC over the heads
of a group. Sums are fp32 (fp64 for fp64).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, multiprocessors, on_device_of, register_limit, row_stride, sum_parts
from .math import rounded
from .ssd import Plan, dot, load_rows, sequence_at, sequence_of, steps_of, tokens_of
from .ssd_backward import head_splits

# Tokens to a partial state: enough that states are small beside tokens, few enough that short batches fill a device.
SPAN = 256


@triton.jit
def group_of(sizes, head, INTERLEAVED: tl.constexpr):
    """The group whose B and C a head reads."""
    if INTERLEAVED:
        group = head % (sizes.nheads // sizes.heads_per_group)
    else:
        group = head // sizes.heads_per_group
    return group


@triton.jit
def dot_state(a, state, acc, ptr, PRECISION: tl.constexpr):
    """acc + a state, the state in the dtype of `ptr`. A sum over many tokens may leave the range of fp16: there it is
    divided by a power of two."""
    if ptr.dtype.element_ty == tl.float16:
        peak = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0), 1e-30)
        scale = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        out = acc + scale * dot(a, (state / scale).to(tl.float16), acc * 0.0, PRECISION)
    else:
        out = dot(a, rounded(state, ptr), acc, PRECISION)
    return out


@triton.jit
def place_of(walk, slot, Q: tl.constexpr):
    """The sequence of a slot of Q tokens, its first row and length, and the slot's number within it."""
    sequence = sequence_at(walk, slot, Q)
    first, length, first_slot = sequence_of(walk, sequence, Q)
    return sequence.to(tl.int64), first, length, slot - first_slot


@triton.jit(do_not_specialize=["dy_row"])
def ssd_noncausal_state_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, parts_ptr,
    ADJOINT: tl.constexpr, INTERLEAVED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, SPAN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one head's state over one span: sum of w x B^T, with ADJOINT of dy C^T.

    parts (spans, nheads, headdim, dstate)
    """
    ACC: tl.constexpr = steps.A.dtype.element_ty
    slot, head = (tl.program_id(0) // sizes.nheads).to(tl.int64), tl.program_id(0) % sizes.nheads
    _sequence, first, length, index = place_of(walk, slot, SPAN)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_n = p < sizes.headdim, n < sizes.dstate
    column_p, column_n = head * sizes.headdim + p, group_of(sizes, head, INTERLEAVED) * sizes.dstate + n
    rate = tl.load(steps.A + head)

    state_PN = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    left = tl.minimum(tl.maximum(length - index * SPAN, 0), SPAN)
    for i in range(tl.cdiv(left, Q)):
        row, _inside, live, _part_Q = tokens_of(walk, first, length, index * (SPAN // Q) + i, REVERSE, Q)
        if ADJOINT:
            value_QP = load_rows(dy_ptr, row, dy_row, column_p, live, in_p)
            weight_QN = load_rows(tokens.C, row, tokens.C_row, column_n, live, in_n)
        else:
            dt_Q, _slope_Q = steps_of(tokens, steps, row, live, head, SOFTPLUS)
            x_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p)
            value_QP = rounded(x_QP.to(ACC) * (-rate * dt_Q)[:, None], tokens.x)
            weight_QN = load_rows(tokens.B, row, tokens.B_row, column_n, live, in_n)
        state_PN = dot(tl.trans(value_QP), weight_QN, state_PN, PRECISION)
    at = (slot * sizes.nheads + head) * sizes.headdim * sizes.dstate
    tl.store(parts_ptr + at + p[:, None] * sizes.dstate + n[None, :], state_PN, mask=in_p[:, None] & in_n[None, :])


@triton.jit
def ssd_noncausal_sum_kernel(
    parts_ptr, addend_ptr, out_ptr, walk, size, blocks, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (nseq, size) = addend + parts (spans, size), over the spans of each sequence in their order."""
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    _, length, slot = sequence_of(walk, sequence, SPAN)
    total = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    for span in range(tl.cdiv(length, SPAN)):
        total += tl.load(parts_ptr + (slot + span) * size + i, mask=mask, other=0.0)
    if addend_ptr is not None:
        total += tl.load(addend_ptr + sequence * size + i, mask=mask, other=0.0)
    tl.store(out_ptr + sequence * size + i, total, mask=mask)


@triton.jit
def ssd_noncausal_fwd_kernel(
    tokens, steps, walk, sizes, D_ptr, states_ptr, y_ptr,
    INTERLEAVED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens of one chunk, BLOCK_P channels of one head: y = C S^T + D x. states (nseq, nheads, headdim, dstate)"""
    ACC: tl.constexpr = steps.A.dtype.element_ty
    slot, head = (tl.program_id(0) // sizes.nheads).to(tl.int64), tl.program_id(0) % sizes.nheads
    sequence, first, length, index = place_of(walk, slot, Q)
    row, inside, live, _part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p, column_p = p < sizes.headdim, head * sizes.headdim + p
    state = states_ptr + (sequence * sizes.nheads + head) * sizes.headdim * sizes.dstate

    y_QP = tl.zeros((Q, BLOCK_P), ACC)
    for start in range(0, sizes.dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < sizes.dstate
        column_n = group_of(sizes, head, INTERLEAVED) * sizes.dstate + n
        C_QN = load_rows(tokens.C, row, tokens.C_row, column_n, live, in_n)
        state_PN = load_rows(state, p, sizes.dstate, n, in_p, in_n)
        y_QP = dot_state(C_QN, tl.trans(state_PN), y_QP, tokens.C, PRECISION)
    if D_ptr is not None:
        x_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p)
        y_QP += tl.load(D_ptr + column_p, mask=in_p, other=0.0)[None, :] * x_QP.to(ACC)
    at_QP = row[:, None] * (sizes.nheads * sizes.headdim) + column_p[None, :]
    tl.store(y_ptr + at_QP, rounded(y_QP, y_ptr), mask=inside[:, None] & in_p[None, :])


@triton.jit(do_not_specialize=["dy_row"])
def ssd_noncausal_bwd_heads_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, D_ptr, dstates_ptr, dx_ptr, ddt_ptr, dsteps_ptr, dD_ptr,
    INTERLEAVED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dx = w dS B + D dy, and through w = -dt A the rest.

    dsteps (slots, 2, nheads): parts of dA and ddt_bias    dD (slots, nheads, headdim): parts of dD, or None
    """
    ACC: tl.constexpr = steps.A.dtype.element_ty
    slot, head = (tl.program_id(0) // sizes.nheads).to(tl.int64), tl.program_id(0) % sizes.nheads
    sequence, first, length, index = place_of(walk, slot, Q)
    row, inside, live, _part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
    dt_Q, slope_Q = steps_of(tokens, steps, row, live, head, SOFTPLUS)
    rate = tl.load(steps.A + head)
    dstate = dstates_ptr + (sequence * sizes.nheads + head) * sizes.headdim * sizes.dstate

    dw_Q = tl.zeros((Q,), ACC)
    for start in range(0, sizes.headdim, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p, column_p = p < sizes.headdim, head * sizes.headdim + p
        du_QP = tl.zeros((Q, BLOCK_P), ACC)
        for start_n in range(0, sizes.dstate, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            in_n = n < sizes.dstate
            column_n = group_of(sizes, head, INTERLEAVED) * sizes.dstate + n
            B_QN = load_rows(tokens.B, row, tokens.B_row, column_n, live, in_n)
            dstate_PN = load_rows(dstate, p, sizes.dstate, n, in_p, in_n)
            du_QP = dot_state(B_QN, tl.trans(dstate_PN), du_QP, tokens.B, PRECISION)
        x_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p).to(ACC)
        dy_QP = load_rows(dy_ptr, row, dy_row, column_p, live, in_p).to(ACC)
        dw_Q += tl.sum(du_QP * x_QP, 1)
        dx_QP = du_QP * (-rate * dt_Q)[:, None]
        if D_ptr is not None:
            dx_QP += tl.load(D_ptr + column_p, mask=in_p, other=0.0)[None, :] * dy_QP
        if dD_ptr is not None:
            tl.store(dD_ptr + slot * sizes.nheads * sizes.headdim + column_p, tl.sum(dy_QP * x_QP, 0), mask=in_p)
        at_QP = row[:, None] * (sizes.nheads * sizes.headdim) + column_p[None, :]
        tl.store(dx_ptr + at_QP, rounded(dx_QP, dx_ptr), mask=inside[:, None] & in_p[None, :])

    ddt_Q = -rate * dw_Q * slope_Q
    tl.store(ddt_ptr + row * sizes.nheads + head, rounded(ddt_Q, ddt_ptr), mask=inside)
    at = dsteps_ptr + slot * (2 * sizes.nheads) + head
    tl.store(at, -tl.sum(dw_Q * dt_Q, 0))
    tl.store(at + sizes.nheads, tl.sum(ddt_Q, 0))


@triton.jit(do_not_specialize=["dy_row", "rows"])
def ssd_noncausal_bwd_weights_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, states_ptr, dstates_ptr, dB_ptr, dC_ptr, rows, heads,
    INTERLEAVED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk, BLOCK_N states and `heads` heads of one group: dB = sum w x dS, dC = sum dy S.

    dB, dC (parts, rows, ngroups, dstate)
    """
    ACC: tl.constexpr = steps.A.dtype.element_ty
    ngroups = sizes.nheads // sizes.heads_per_group
    slot, group = (tl.program_id(0) // ngroups).to(tl.int64), tl.program_id(0) % ngroups
    sequence, first, length, index = place_of(walk, slot, Q)
    row, inside, live, _part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < sizes.dstate
    begin = tl.program_id(2) * heads

    dB_QN, dC_QN = tl.zeros((Q, BLOCK_N), ACC), tl.zeros((Q, BLOCK_N), ACC)
    for i in range(begin, tl.minimum(begin + heads, sizes.heads_per_group)):
        head = i * ngroups + group if INTERLEAVED else group * sizes.heads_per_group + i
        dt_Q, _slope_Q = steps_of(tokens, steps, row, live, head, SOFTPLUS)
        w_Q = -tl.load(steps.A + head) * dt_Q
        state = (sequence * sizes.nheads + head) * sizes.headdim * sizes.dstate
        for start in range(0, sizes.headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            in_p, column_p = p < sizes.headdim, head * sizes.headdim + p
            x_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p)
            dy_QP = load_rows(dy_ptr, row, dy_row, column_p, live, in_p)
            u_QP = rounded(x_QP.to(ACC) * w_Q[:, None], tokens.x)
            dstate_PN = load_rows(dstates_ptr + state, p, sizes.dstate, n, in_p, in_n)
            dB_QN = dot_state(u_QP, dstate_PN, dB_QN, tokens.x, PRECISION)
            state_PN = load_rows(states_ptr + state, p, sizes.dstate, n, in_p, in_n)
            dC_QN = dot_state(dy_QP, state_PN, dC_QN, tokens.x, PRECISION)

    column = group * sizes.dstate + n
    at_QN = (tl.program_id(2) * rows + row)[:, None] * (ngroups * sizes.dstate) + column[None, :]
    exists_QN = inside[:, None] & in_n[None, :]
    tl.store(dB_ptr + at_QN, rounded(dB_QN, dB_ptr), mask=exists_QN)
    tl.store(dC_ptr + at_QN, rounded(dC_QN, dC_ptr), mask=exists_QN)


def plan_of(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, dt_softplus: bool, interleaved: bool,
) -> Plan:  # fmt: skip
    """As for `ssd`, without limits of dt: sizes, tiles and arguments of one call."""
    chunk = {2: 64, 4: 32, 8: 16}[x.dtype.itemsize]
    limits = (-math.inf, math.inf)
    plan = Plan(x, dt, A, B, C, None, dt_bias, flags, cu_seqlens, dt_softplus, *limits, False, chunk)
    plan.options |= {"INTERLEAVED": interleaved, "num_warps": 4, "num_stages": 2}
    return plan


def states(plan: Plan, A: Tensor, dy: Tensor | None, addend: Tensor | None) -> Tensor:
    """The state of every head and sequence; with dy its gradient, to which `addend` belongs."""
    batch, packed = plan.batch, plan.arguments[2].cu_seqlens is not None
    spans = plan.seqlen // SPAN + plan.nseq if packed else batch * triton.cdiv(plan.seqlen, SPAN)
    shape = (plan.nheads, plan.headdim, plan.dstate)
    parts = A.new_empty(spans, *shape)
    block_p, block_n = plan.narrow_p, plan.block_n
    if parts.numel() > 0:
        grid = (spans * plan.nheads, triton.cdiv(plan.headdim, block_p), triton.cdiv(plan.dstate, block_n))
        ssd_noncausal_state_kernel[grid](
            *plan.arguments, dy, 0 if dy is None else row_stride(dy), parts,
            ADJOINT=dy is not None, **plan.options, SPAN=SPAN, BLOCK_P=block_p, BLOCK_N=block_n,
        )  # fmt: skip
    if spans == plan.nseq and not packed and addend is None:
        return parts
    out = A.new_empty(plan.nseq, *shape)
    if out.numel() > 0:
        size = out[0].numel()
        block = min(1 << 16, triton.next_power_of_2(size)) if interpreted() else 512
        blocks = triton.cdiv(size, block)
        ssd_noncausal_sum_kernel[(plan.nseq * blocks,)](
            parts, addend, out, plan.arguments[2], size, blocks, SPAN=SPAN, BLOCK=block, num_warps=4
        )
    return out


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the state of each sequence (nseq, nheads, headdim, dstate)."""
    plan = plan_of(x, dt, A, B, C, dt_bias, flags, cu_seqlens, dt_softplus, interleaved)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device_of(x):
        state = states(plan, A, None, None)
        ssd_noncausal_fwd_kernel[(plan.slots * plan.nheads, triton.cdiv(plan.headdim, plan.block_p))](
            *plan.arguments, D, state, y,
            **plan.options, BLOCK_P=plan.block_p, BLOCK_N=plan.block_n,
        )  # fmt: skip
    return y, state


def backward(
    dy: Tensor, dstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None, state: Tensor, dt_softplus: bool,
    interleaved: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, ddt_bias), None where the input is None."""
    plan = plan_of(x, dt, A, B, C, dt_bias, flags, cu_seqlens, dt_softplus, interleaved)
    dx, ddt = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt))
    dsteps = A.new_empty(plan.slots, 2, plan.nheads)
    dD = None if D is None else A.new_empty(plan.slots, *D.shape)
    blocks_n = triton.cdiv(plan.dstate, plan.narrow_n)
    heads = triton.cdiv(plan.nheads // plan.ngroups, head_splits(plan, max(1, blocks_n), multiprocessors(x.device)))
    splits = triton.cdiv(plan.nheads // plan.ngroups, heads)
    dB, dC = (B.new_empty(splits, *B.shape, dtype=B.dtype if splits == 1 else plan.acc) for _ in range(2))
    with on_device_of(x):
        dstates = states(plan, A, dy, dstate)
        ssd_noncausal_bwd_heads_kernel[(plan.slots * plan.nheads,)](
            *plan.arguments, dy, row_stride(dy), D, dstates, dx, ddt, dsteps, dD,
            **plan.options, **register_limit(255), BLOCK_P=plan.narrow_p, BLOCK_N=plan.narrow_n,
        )  # fmt: skip
        if dB.numel() > 0:
            ssd_noncausal_bwd_weights_kernel[(plan.slots * plan.ngroups, blocks_n, splits)](
                *plan.arguments, dy, row_stride(dy), state, dstates, dB, dC, plan.batch * plan.seqlen, heads,
                **plan.options, **register_limit(255), BLOCK_P=plan.gated_p, BLOCK_N=plan.narrow_n,
            )  # fmt: skip
    dA, dbias = sum_parts(dsteps, plan.acc).unbind(0)
    return (
        dx, ddt, dA.clone(), sum_parts(dB, B.dtype), sum_parts(dC, C.dtype),
        None if dD is None else sum_parts(dD, plan.acc), None if dt_bias is None else dbias.clone(),
    )  # fmt: skip


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward for each dtype and size of head and state, plain and with everything."""

    def call(dtype: torch.dtype, headdim: int, dstate: int, full: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        batch, seqlen, nheads, ngroups = 1, 512, 8, 1 + full
        acc = acc_dtype(dtype)
        x, dt = tensor(batch, seqlen, nheads, headdim, dtype=dtype), tensor(batch, seqlen, nheads, dtype=dtype)
        B, A = tensor(batch, seqlen, ngroups, dstate, dtype=dtype), tensor(nheads, dtype=acc)
        D, bias, flags, offsets = None, None, None, None
        if full:
            D, bias = tensor(nheads, headdim, dtype=acc), A
            flags, offsets = tensor(batch, seqlen, dtype=torch.uint8), tensor(3, dtype=torch.int64)
        inputs = (x, dt, A, B, B, D, bias, flags, offsets)
        _, state = forward(*inputs, full, full)
        backward(x, state if full else None, *inputs, state, full, full)

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for headdim, dstate in ((64, 64), (8, 16)):
            for full in (False, True):
                label = f"{dtype}, headdim {headdim}, dstate {dstate}{', everything' if full else ''}"
                yield label.removeprefix("torch."), partial(call, dtype, headdim, dstate, full)
