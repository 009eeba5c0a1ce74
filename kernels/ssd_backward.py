"""Triton kernels of ssd's backward; see ssd.py.

Three launches and the sums over parts. The state kernel of ssd.py leaves the gradient of the state after each chunk;
with it and the states that forward kept every chunk stands alone. One kernel gives what belongs to a head (dx, ddt, dz
and parts of dA, dD, ddt_bias), one adds dB and dC over the heads of a group, in a fixed order. The logarithm of a token's
decay gets the sum of all products that pass over it, and nothing is subtracted: with T_ts = dM_ts M_ts

    dlog_l = sum_{s < l <= t} T_ts + sum_{t >= l} dy_t . (enter_t C_t h) + sum_{s < l} x_s . (leave_s dt_s B_s dh) + ...
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, on_device_of, register_limit, row_stride, sum_parts
from .math import rounded, silu_grad
from .ssd import (
    Plan,
    decays_of,
    dot,
    load_dy,
    load_rows,
    mask_of,
    sequence_at,
    sequence_of,
    steps_of,
    tokens_of,
)


@triton.jit(do_not_specialize=["dy_row"])
def ssd_bwd_heads_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, D_ptr, states_ptr, dstates_ptr, ungated_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dsteps_ptr, dD_ptr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one head.

    dsteps (slots, 2, nheads): parts of dA and ddt_bias    dD (slots, nheads, headdim): parts of dD, or None
    """
    ACC: tl.constexpr = steps.A.dtype.element_ty
    slot, head = (tl.program_id(0) // sizes.nheads).to(tl.int64), tl.program_id(0) % sizes.nheads
    sequence = sequence_at(walk, slot, Q)
    first, length, first_slot = sequence_of(walk, sequence, Q)
    index = slot - first_slot
    # Slots that hold no chunk, which packed sequences leave, have no states either: they give zeros.
    occupied = index * Q < length
    row, inside, live, part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
    dt_Q, slope_Q = steps_of(tokens, steps, row, live, head, SOFTPLUS)
    high_Q, low_Q, enter_Q, leave_Q, across = decays_of(steps, dt_Q, part_Q, head)
    state = (slot * sizes.nheads + head) * sizes.dstate * sizes.headdim
    group = head // sizes.heads_per_group

    CB_QQ, dM_QQ = tl.zeros((Q, Q), ACC), tl.zeros((Q, Q), ACC)
    for start in range(0, sizes.dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = (n < sizes.dstate) & occupied
        B_QN = load_rows(tokens.B, row, tokens.B_row, group * sizes.dstate + n, live, in_n)
        C_QN = load_rows(tokens.C, row, tokens.C_row, group * sizes.dstate + n, live, in_n)
        CB_QQ = dot(C_QN, tl.trans(B_QN), CB_QQ, PRECISION)
    for start in range(0, sizes.headdim, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < sizes.headdim
        x_QP = load_rows(tokens.x, row, tokens.x_row, head * sizes.headdim + p, live, in_p)
        dy_QP = load_dy(dy_ptr, dy_row, tokens, row, head * sizes.headdim + p, live, in_p, ACC)
        dM_QQ = dot(dy_QP, tl.trans(x_QP), dM_QQ, PRECISION)
        if dD_ptr is not None:
            at_D = (slot * sizes.nheads + head) * sizes.headdim + p
            tl.store(dD_ptr + at_D, tl.sum(dy_QP.to(ACC) * x_QP.to(ACC), 0), mask=in_p)
    M_QQ = CB_QQ * mask_of(high_Q, low_Q, part_Q, Q)
    # T_ts summed over t >= l, then over s < l
    passing_QQ = tl.cumsum(dM_QQ * M_QQ * dt_Q[None, :], 0, reverse=True)
    t = tl.arange(0, Q)
    earlier_QQ = t[None, :] < t[:, None]
    dlog_Q = tl.sum(tl.where(earlier_QQ, passing_QQ, 0.0), 1)

    entered_Q, left_Q, dots_Q = tl.zeros((Q,), ACC), tl.zeros((Q,), ACC), tl.zeros((Q,), ACC)
    crossed = tl.sum(entered_Q, 0)
    for start in range(0, sizes.headdim, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < sizes.headdim
        column = head * sizes.headdim + p
        Ch_QP, Bdh_QP = tl.zeros((Q, BLOCK_P), ACC), tl.zeros((Q, BLOCK_P), ACC)
        for start_n in range(0, sizes.dstate, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            in_n = (n < sizes.dstate) & occupied
            B_QN = load_rows(tokens.B, row, tokens.B_row, group * sizes.dstate + n, live, in_n)
            C_QN = load_rows(tokens.C, row, tokens.C_row, group * sizes.dstate + n, live, in_n)
            h_NP = load_rows(states_ptr + state, n, sizes.headdim, p, in_n, in_p)
            dh_NP = load_rows(dstates_ptr + state, n, sizes.headdim, p, in_n, in_p)
            crossed += tl.sum(tl.sum(h_NP * dh_NP, 1), 0)
            Ch_QP = dot(C_QN, rounded(h_NP, tokens.C), Ch_QP, PRECISION)
            Bdh_QP = dot(B_QN, rounded(dh_NP, tokens.B), Bdh_QP, PRECISION)

        dy_QP = load_dy(dy_ptr, dy_row, tokens, row, column, live, in_p, ACC)
        x_QP = load_rows(tokens.x, row, tokens.x_row, column, live, in_p).to(ACC)
        entered_Q += enter_Q * tl.sum(dy_QP.to(ACC) * Ch_QP, 1)
        du_QP = Bdh_QP * leave_Q[:, None]
        left_Q += dt_Q * tl.sum(du_QP * x_QP, 1)
        du_QP = dot(tl.trans(rounded(M_QQ, tokens.x)), dy_QP, du_QP, PRECISION)
        dots_Q += tl.sum(du_QP * x_QP, 1)

        dx_QP = du_QP * dt_Q[:, None]
        exists_QP = inside[:, None] & in_p[None, :]
        at_QP = row[:, None] * (sizes.nheads * sizes.headdim) + column[None, :]
        if D_ptr is not None:
            dx_QP += tl.load(D_ptr + column, mask=in_p, other=0.0)[None, :] * dy_QP.to(ACC)
        tl.store(dx_ptr + at_QP, rounded(dx_QP, dx_ptr), mask=exists_QP)
        if dz_ptr is not None:
            z_QP = load_rows(tokens.z, row, tokens.z_row, column, live, in_p).to(ACC)
            given_QP = load_rows(dy_ptr, row, dy_row, column, live, in_p).to(ACC)
            ungated_QP = load_rows(ungated_ptr, row, sizes.nheads * sizes.headdim, column, live, in_p)
            tl.store(dz_ptr + at_QP, rounded(given_QP * ungated_QP * silu_grad(z_QP), dz_ptr), mask=exists_QP)

    dlog_Q += tl.cumsum(entered_Q, 0, reverse=True) + across * crossed
    dlog_Q += tl.sum(tl.where(earlier_QQ, left_Q[None, :], 0.0), 1)
    ddt_Q = (dlog_Q * tl.load(steps.A + head) + dots_Q) * slope_Q
    tl.store(ddt_ptr + row * sizes.nheads + head, rounded(ddt_Q, ddt_ptr), mask=inside)
    at = dsteps_ptr + slot * (2 * sizes.nheads) + head
    tl.store(at, tl.sum(dlog_Q * dt_Q, 0))
    tl.store(at + sizes.nheads, tl.sum(ddt_Q, 0))


@triton.jit(do_not_specialize=["dy_row", "rows"])
def ssd_bwd_weights_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, states_ptr, dstates_ptr, dB_ptr, dC_ptr, rows, heads,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk, BLOCK_N states and `heads` heads of one group: dB and dC (parts, rows, ngroups, dstate)."""
    ACC: tl.constexpr = steps.A.dtype.element_ty
    ngroups = sizes.nheads // sizes.heads_per_group
    slot, group = (tl.program_id(0) // ngroups).to(tl.int64), tl.program_id(0) % ngroups
    sequence = sequence_at(walk, slot, Q)
    first, length, first_slot = sequence_of(walk, sequence, Q)
    index = slot - first_slot
    # Slots that hold no chunk, which packed sequences leave, have no states either: they give zeros.
    occupied = index * Q < length
    row, inside, live, part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = (n < sizes.dstate) & occupied
    begin = tl.program_id(2) * heads
    end = tl.minimum(begin + heads, sizes.heads_per_group)

    dG_QQ = tl.zeros((Q, Q), ACC)
    dB_QN, dC_QN = tl.zeros((Q, BLOCK_N), ACC), tl.zeros((Q, BLOCK_N), ACC)
    for i in range(begin, end):
        head = group * sizes.heads_per_group + i
        dt_Q, _ = steps_of(tokens, steps, row, live, head, SOFTPLUS)
        high_Q, low_Q, enter_Q, leave_Q, _ = decays_of(steps, dt_Q, part_Q, head)
        state = (slot * sizes.nheads + head) * sizes.dstate * sizes.headdim
        dM_QQ = tl.zeros((Q, Q), ACC)
        for start in range(0, sizes.headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            in_p = p < sizes.headdim
            x_QP = load_rows(tokens.x, row, tokens.x_row, head * sizes.headdim + p, live, in_p)
            dy_QP = load_dy(dy_ptr, dy_row, tokens, row, head * sizes.headdim + p, live, in_p, ACC)
            dM_QQ = dot(dy_QP, tl.trans(x_QP), dM_QQ, PRECISION)
            in_NP = in_n[:, None] & in_p[None, :]
            at_NP = state + n[:, None] * sizes.headdim + p[None, :]
            none_QN = tl.zeros((Q, BLOCK_N), ACC)
            dh_NP = rounded(tl.load(dstates_ptr + at_NP, mask=in_NP, other=0.0), tokens.x)
            dB_QN += (leave_Q * dt_Q)[:, None] * dot(x_QP, tl.trans(dh_NP), none_QN, PRECISION)
            h_NP = rounded(tl.load(states_ptr + at_NP, mask=in_NP, other=0.0), tokens.x)
            dC_QN += enter_Q[:, None] * dot(dy_QP, tl.trans(h_NP), none_QN, PRECISION)
        dG_QQ += dM_QQ * mask_of(high_Q, low_Q, part_Q, Q) * dt_Q[None, :]

    column = group * sizes.dstate + n
    B_QN = load_rows(tokens.B, row, tokens.B_row, column, live, in_n)
    C_QN = load_rows(tokens.C, row, tokens.C_row, column, live, in_n)
    dB_QN = dot(tl.trans(rounded(dG_QQ, tokens.x)), C_QN, dB_QN, PRECISION)
    dC_QN = dot(rounded(dG_QQ, tokens.x), B_QN, dC_QN, PRECISION)
    at_QN = (tl.program_id(2) * rows + row)[:, None] * (ngroups * sizes.dstate) + column[None, :]
    exists_QN = inside[:, None] & in_n[None, :]
    tl.store(dB_ptr + at_QN, rounded(dB_QN, dB_ptr), mask=exists_QN)
    tl.store(dC_ptr + at_QN, rounded(dC_QN, dC_ptr), mask=exists_QN)


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor, ungated: Tensor | None, dt_softplus: bool, dt_min: float,
    dt_max: float, reverse: bool, chunk: int, wide: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state), None where the input is None.

    With `wide` those per token are in the dtype of states. dz is None without `ungated`, y before the gate.
    """
    plan = Plan(x, dt, A, B, C, z, dt_bias, flags, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, chunk)
    like = plan.acc if wide else x.dtype
    dx, ddt = x.new_empty(x.shape, dtype=like), dt.new_empty(dt.shape, dtype=like)
    dz = None if ungated is None else x.new_empty(x.shape, dtype=like)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    dstates = A.new_empty(plan.slots, plan.nheads, plan.dstate, plan.headdim)
    dsteps = A.new_empty(plan.slots, 2, plan.nheads)
    dD = None if D is None else A.new_empty(plan.slots, *D.shape)
    blocks_n = triton.cdiv(plan.dstate, plan.narrow_n)
    splits = head_splits(plan, blocks_n, multiprocessors(x.device))
    heads = triton.cdiv(plan.nheads // plan.ngroups, splits)
    splits = triton.cdiv(plan.nheads // plan.ngroups, heads)
    part_dtype = like if splits == 1 else plan.acc
    dB, dC = (B.new_empty(splits, *B.shape, dtype=part_dtype) for _ in range(2))
    tiles = {"num_stages": 1, "num_warps": 8, **register_limit(255)}
    with on_device_of(x):
        if plan.nseq * plan.nheads * plan.headdim > 0:
            plan.states(dy, dfinal_state, dstates, dinitial_state)
        if plan.slots * plan.nheads > 0:
            ssd_bwd_heads_kernel[(plan.slots * plan.nheads,)](
                *plan.arguments, dy, row_stride(dy), D, checkpoints, dstates, ungated, dx, ddt, dz, dsteps, dD,
                **plan.options, **tiles, BLOCK_P=plan.gated_p, BLOCK_N=plan.gated_n,
            )  # fmt: skip
            ssd_bwd_weights_kernel[(plan.slots * plan.ngroups, blocks_n, splits)](
                *plan.arguments, dy, row_stride(dy), checkpoints, dstates, dB, dC, plan.batch * plan.seqlen, heads,
                **plan.options, **tiles, BLOCK_P=16, BLOCK_N=plan.narrow_n,
            )  # fmt: skip
    dA, dbias = sum_parts(dsteps, plan.acc).unbind(0)
    return (
        dx, ddt, dA.clone(), sum_parts(dB, like), sum_parts(dC, like), None if dD is None else sum_parts(dD, plan.acc),
        dz, None if dt_bias is None else dbias.clone(), dinitial_state,
    )  # fmt: skip


def head_splits(plan: Plan, blocks_n: int, processors: int) -> int:
    """Into how many parts to cut the heads of a group, so that two programs come on each multiprocessor."""
    programs = max(1, plan.slots * plan.ngroups * blocks_n)
    return max(1, min(plan.nheads // plan.ngroups, triton.cdiv(2 * processors, programs)))
