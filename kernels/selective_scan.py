"""Triton kernels of selective_scan, real states.

    h_l = exp(dt_l A) h_{l-1} + dt_l B_l x_l,    y_l = (C_l . h_l + D x_l) silu(z_l)

One program walks one split of one sequence for BLOCK_D channels; the state, a tile (dstate, channels), never leaves
registers. Where sequences x channel blocks cannot fill the device, every sequence is cut into splits: the local pass
leaves what each split makes of an empty state and its summed dt, the carry kernel chains them (the decay over a split
is exp(A sum dt)), and the output pass starts each split from the state that enters it. Backward walks the other way
with the same three launches, recomputing the states of 64 tokens at a time from their checkpoint. Nothing is added
atomically: what several programs add to comes in parts, summed in a fixed order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, row_stride, sum_parts
from .math import LN2, LOG2E, rounded, silu, silu_grad, softplus_grad
from .selective_scan_walk import (
    CHECKPOINT_EVERY,
    Launch,
    Plan,
    channels_of,
    launch_of,
    load_constant,
    load_dt_weight,
    load_dy_and_z,
    load_token,
    load_vector,
    load_weights,
    plan_of,
    split_of,
    step_size,
    tile_of,
    visit,
)


class Gradients(NamedTuple):
    """What backward writes; None where the input is None. The caller adds up the parts."""

    dx: Any  # (batch, seqlen, dim), dense, as dz
    ddt: Any
    dz: Any
    ddt_row: Any  # row stride of ddt
    dx_before: Any  # what dx and dz are added to, dense in the dtype of the states, or None: what other walks have left
    dz_before: Any
    dB: Any  # (parts, batch, seqlen, groups, dstate), or for a constant B as dA
    dC: Any
    dA: Any  # (nseq * nsplits, dim, dstate)
    dD: Any  # (nseq * nsplits, dim)
    ddt_bias: Any
    dinitial_state: Any  # (nseq, dim, dstate)


@triton.jit
def advance(h_ND, walk, restart, x_D, dt_D, A_ND, B_ND):
    """The state after one token; A_ND holds A / ln 2."""
    if walk.flags is not None:
        h_ND = tl.where(restart, 0.0, h_ND)
    Abar_ND = tl.exp2(dt_D[None, :] * A_ND)  # (4)
    return Abar_ND * h_ND + (dt_D * x_D)[None, :] * B_ND  # (2a)


@triton.jit
def store_weights(ptr, tile_ND, row, run, sizes, share, at_N, mask_N, dstate: tl.constexpr):
    """One program's part of dB or dC at one token, in (parts, batch, seqlen, groups, dstate)."""
    part = run % share // sizes.run * sizes.blocks_per_run + tl.program_id(0) % sizes.blocks_per_run
    at_row = (part.to(tl.int64) * sizes.rows + row) * (sizes.dim // share) * dstate
    tl.store(ptr + at_row + at_N, rounded(tl.sum(tile_ND, axis=1), ptr), mask=mask_N)


@triton.jit
def add_before(value_D, before_ptr, row, d, mask_D, dim):
    """The sum with what other walks have left at this token, if there are any."""
    if before_ptr is None:
        return value_D
    else:
        return value_D + tl.load(before_ptr + row * dim + d, mask=mask_D, other=0.0)


@triton.jit(do_not_specialize=["seqlen", "sizes"])
def selective_scan_fwd_kernel(
    tokens, walk, A_ptr, D_ptr, dt_bias_ptr, initial_state_ptr, states_ptr, y_ptr, before_ptr, final_state_ptr,
    checkpoints_ptr, seqlen, y_row, sizes, dstate: tl.constexpr, rank: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The output pass over one split for BLOCK_D channels.

    A (dim, dstate)   D, dt_bias (dim,) or None   initial_state (or None), final_state (nseq, dim, dstate)
    states (nseq * nsplits, dim, dstate): the state that enters each split; None if there is one, which initial_state enters
    y (batch, seqlen, dim), with a row stride   before (batch, seqlen, dim) or None: added to y, as A
    checkpoints (slots, dim, dstate) or None: the state before every 64th position
    """
    ACC: tl.constexpr = A_ptr.dtype.element_ty
    run, d, in_d, part = channels_of(sizes, BLOCK_D)
    seq, split, begin, end, first, length, slot = split_of(walk, part, sizes, seqlen)
    n, in_n, in_ND, at_ND = tile_of(d, in_d, dstate, BLOCK_N)
    at_B, at_C = run // sizes.B_share * dstate + n, run // sizes.C_share * dstate + n

    A_ND = tl.load(A_ptr + at_ND, mask=in_ND, other=0.0) * LOG2E
    B_const = load_constant(tokens.B, tokens.B_row, at_ND, in_ND, ACC)
    C_const = load_constant(tokens.C, tokens.C_row, at_ND, in_ND, ACC)
    D_D = load_vector(D_ptr, d, in_d, BLOCK_D, ACC)
    dt_bias_D = load_vector(dt_bias_ptr, d, in_d, BLOCK_D, ACC)
    dt_weight_RD = load_dt_weight(tokens, d, in_d, sizes.dim, rank, BLOCK_R)
    h_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if states_ptr is not None:
        h_ND = tl.load(states_ptr + part * sizes.dim * dstate + at_ND, mask=in_ND, other=0.0)
    elif initial_state_ptr is not None:
        h_ND = tl.load(initial_state_ptr + seq * sizes.dim * dstate + at_ND, mask=in_ND, other=0.0)

    for chunk in range(begin, end, CHECKPOINT_EVERY):
        if checkpoints_ptr is not None:
            checkpoint_ptr = checkpoints_ptr + (slot + chunk // CHECKPOINT_EVERY) * sizes.dim * dstate
            tl.store(checkpoint_ptr + at_ND, h_ND, mask=in_ND)
        for p in range(chunk, tl.minimum(chunk + CHECKPOINT_EVERY, end), TOKENS):
            # The loads of several tokens are on their way together; then the states follow one after the other.
            loaded = ()
            for i in tl.static_range(TOKENS):
                token = load_token(
                    tokens, walk, first, length, p + i, p + i < end, d, in_d, dt_weight_RD, rank, sizes.dim, REVERSE
                )
                row, mask_D, z_D = token[0], token[3], token[4]
                if tokens.z is not None:
                    z_D = tl.load(tokens.z + row * tokens.z_row + d, mask=mask_D, other=0.0)
                loaded += ((token, z_D),)
            for i in tl.static_range(TOKENS):
                token, z_D = loaded[i]
                row, live, restart, _mask_D, x_D, dt_D = token
                x_D = x_D.to(ACC)
                dt_D = step_size(dt_D, dt_bias_D, live, SOFTPLUS)
                B_ND = load_weights(B_const, tokens.B, tokens.B_row, row, at_B, in_n & live, ACC)
                C_ND = load_weights(C_const, tokens.C, tokens.C_row, row, at_C, in_n & live, ACC)

                h_ND = advance(h_ND, walk, restart, x_D, dt_D, A_ND, B_ND)
                y_D = tl.sum(C_ND * h_ND, axis=0) + D_D * x_D  # (2b)
                if tokens.z is not None:
                    y_D *= silu(z_D.to(ACC))
                y_D = add_before(tl.where(live, y_D, 0.0), before_ptr, row, d, in_d & live, sizes.dim)
                tl.store(y_ptr + row * y_row + d, rounded(y_D, y_ptr), mask=in_d & (p + i < end))

    is_last = (begin + sizes.span >= length) & ((begin < length) | (split == 0))
    tl.store(final_state_ptr + seq * sizes.dim * dstate + at_ND, h_ND, mask=in_ND & is_last)


@triton.jit(do_not_specialize=["seqlen", "sizes"])
def selective_scan_local_kernel(
    tokens, walk, dy_ptr, A_ptr, dt_bias_ptr, states_ptr, dt_sum_ptr, seqlen, dy_row, sizes, dstate: tl.constexpr,
    rank: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The local pass: the state at the end of each split if none enters it.

    With dy (batch, seqlen, dim) it is that of backward: the gradient that leaves the start of each split if none enters
    its end.
    states (nseq * nsplits, dim, dstate)   dt_sum (nseq * nsplits, dim): infinite if the split drops the state
    """
    ACC: tl.constexpr = A_ptr.dtype.element_ty
    BACKWARD: tl.constexpr = dy_ptr is not None
    run, d, in_d, part = channels_of(sizes, BLOCK_D)
    _seq, split, begin, end, first, length, _slot = split_of(walk, part, sizes, seqlen)
    n, in_n, in_ND, at_ND = tile_of(d, in_d, dstate, BLOCK_N)
    weights, weights_row, share = tokens.B, tokens.B_row, sizes.B_share
    if BACKWARD:
        weights, weights_row, share = tokens.C, tokens.C_row, sizes.C_share
    at_N = run // share * dstate + n

    A_ND = tl.load(A_ptr + at_ND, mask=in_ND, other=0.0) * LOG2E
    constant_ND = load_constant(weights, weights_row, at_ND, in_ND, ACC)
    dt_bias_D = load_vector(dt_bias_ptr, d, in_d, BLOCK_D, ACC)
    dt_weight_RD = load_dt_weight(tokens, d, in_d, sizes.dim, rank, BLOCK_R)
    dt_sum_D = tl.zeros((BLOCK_D,), ACC)
    h_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)

    # What the outermost split leaves enters no other.
    count = tl.where((split == 0) if BACKWARD else (end == length), 0, end - begin)
    for done in range(0, count, TOKENS):
        loaded = ()
        for i in tl.static_range(TOKENS):
            p = end - 1 - done - i if BACKWARD else begin + done + i
            token = load_token(
                tokens, walk, first, length, p, done + i < count, d, in_d, dt_weight_RD, rank, sizes.dim, REVERSE
            )
            row, mask_D, u_D, z_D = token[0], token[3], token[4], token[4]
            if BACKWARD:
                u_D, z_D = load_dy_and_z(dy_ptr, dy_row, tokens, row, d, mask_D)
            loaded += ((token, u_D, z_D),)

        for i in tl.static_range(TOKENS):
            token, u_D, z_D = loaded[i]
            row, live, restart, _mask_D, _x_D, dt_D = token
            u_D = u_D.to(ACC)
            dt_D = step_size(dt_D, dt_bias_D, live, SOFTPLUS)
            weights_ND = load_weights(constant_ND, weights, weights_row, row, at_N, in_n & live, ACC)
            if BACKWARD:
                if tokens.z is not None:
                    u_D *= silu(z_D.to(ACC))
                h_ND = tl.exp2(dt_D[None, :] * A_ND) * (h_ND + u_D[None, :] * weights_ND)
                if walk.flags is not None:
                    h_ND = tl.where(restart, 0.0, h_ND)
            else:
                h_ND = advance(h_ND, walk, restart, u_D, dt_D, A_ND, weights_ND)
            dt_sum_D += dt_D
            if walk.flags is not None:
                dt_sum_D = tl.where(restart, float("inf"), dt_sum_D)

    tl.store(states_ptr + part * sizes.dim * dstate + at_ND, h_ND, mask=in_ND)
    tl.store(dt_sum_ptr + part * sizes.dim + d, dt_sum_D, mask=in_d)


@triton.jit(do_not_specialize=["dim", "nsplits"])
def selective_scan_carry_kernel(
    states_ptr, dt_sum_ptr, A_ptr, outer_state_ptr, dim, nsplits,
    dstate: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Chains the splits of one sequence: puts what enters a split in the place of what the split leaves by itself.

    states (nseq * nsplits, dim, dstate)   dt_sum (nseq * nsplits, dim)   A (dim, dstate)
    outer_state (nseq, dim, dstate) or None: what enters the first split, or with BACKWARD the last one
    """
    ACC: tl.constexpr = A_ptr.dtype.element_ty
    seq = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    _n, _in_n, in_ND, at_ND = tile_of(d, in_d, dstate, BLOCK_N)

    A_ND = tl.load(A_ptr + at_ND, mask=in_ND, other=0.0) * LOG2E
    h_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if outer_state_ptr is not None:
        h_ND = tl.load(outer_state_ptr + seq * dim * dstate + at_ND, mask=in_ND, other=0.0)
    for i in range(nsplits):
        part = seq * nsplits + (nsplits - 1 - i if BACKWARD else i)
        state_ptr = states_ptr + part * dim * dstate
        local_ND = tl.load(state_ptr + at_ND, mask=in_ND, other=0.0)
        dt_sum_D = tl.load(dt_sum_ptr + part * dim + d, mask=in_d, other=0.0)
        tl.store(state_ptr + at_ND, h_ND, mask=in_ND)
        dropped_D = dt_sum_D == float("inf")
        decay_ND = tl.exp2(tl.where(dropped_D, 0.0, dt_sum_D)[None, :] * A_ND)
        h_ND = decay_ND * tl.where(dropped_D[None, :], 0.0, h_ND) + local_ND


@triton.jit(do_not_specialize=["seqlen", "sizes"])
def selective_scan_bwd_kernel(
    tokens, walk, grads, dy_ptr, dfinal_state_ptr, A_ptr, D_ptr, dt_bias_ptr, checkpoints_ptr, states_ptr, scratch_ptr,
    seqlen, dy_row, sizes, dstate: tl.constexpr, rank: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The mirror image of the output pass: walks one split from its end to its start, chunk by chunk.

    dy (batch, seqlen, dim)   dfinal_state (nseq, dim, dstate) or None   checkpoints (slots, dim, dstate)
    states (nseq * nsplits, dim, dstate): the gradient that enters the end of each split; None: dfinal_state enters
    scratch (nhomes, 64 / STEP + STEP, dim, dstate): a home per split that has tokens

    A chunk of 64 tokens is taken in steps of STEP tokens: a walk through the chunk leaves the state before each step in
    scratch; then step by step, last step first, another leaves the state before each of its tokens. The barriers stand
    between writing scratch and reading it.
    """
    ACC: tl.constexpr = A_ptr.dtype.element_ty
    SLOTS: tl.constexpr = CHECKPOINT_EVERY // STEP + STEP
    run, d, in_d, part = channels_of(sizes, BLOCK_D)
    seq, split, begin, end, first, length, slot = split_of(walk, part, sizes, seqlen)
    n, in_n, in_ND, at_ND = tile_of(d, in_d, dstate, BLOCK_N)
    at_B, at_C = run // sizes.B_share * dstate + n, run // sizes.C_share * dstate + n
    home = part if walk.cu_seqlens is None else first // sizes.span + seq + split

    A_ND = tl.load(A_ptr + at_ND, mask=in_ND, other=0.0) * LOG2E
    B_const = load_constant(tokens.B, tokens.B_row, at_ND, in_ND, ACC)
    C_const = load_constant(tokens.C, tokens.C_row, at_ND, in_ND, ACC)
    D_D = load_vector(D_ptr, d, in_d, BLOCK_D, ACC)
    dt_bias_D = load_vector(dt_bias_ptr, d, in_d, BLOCK_D, ACC)
    dt_weight_RD = load_dt_weight(tokens, d, in_d, sizes.dim, rank, BLOCK_R)
    dA_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dB_const, dC_const = tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dD_D, ddt_bias_D = tl.zeros((BLOCK_D,), ACC), tl.zeros((BLOCK_D,), ACC)
    dh_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if states_ptr is not None:
        dh_ND = tl.load(states_ptr + part * sizes.dim * dstate + at_ND, mask=in_ND, other=0.0)
    elif dfinal_state_ptr is not None:
        dh_ND = tl.load(dfinal_state_ptr + seq * sizes.dim * dstate + at_ND, mask=in_ND, other=0.0)

    nchunks = tl.cdiv(end - begin, CHECKPOINT_EVERY)
    for later_chunks in range(nchunks):
        chunk = begin + (nchunks - 1 - later_chunks) * CHECKPOINT_EVERY
        nsteps = tl.cdiv(tl.minimum(end - chunk, CHECKPOINT_EVERY), STEP)
        checkpoint_ptr = checkpoints_ptr + (slot + chunk // CHECKPOINT_EVERY) * sizes.dim * dstate
        h_ND = tl.load(checkpoint_ptr + at_ND, mask=in_ND, other=0.0)
        for step in range(nsteps):
            before_ptr = scratch_ptr + (home * SLOTS + step) * sizes.dim * dstate
            tl.store(before_ptr + at_ND, h_ND, mask=in_ND)
            # The last step's states are not needed here.
            step_end = tl.where(step == nsteps - 1, 0, tl.minimum(chunk + step * STEP + STEP, end))
            for p in range(chunk + step * STEP, step_end, TOKENS):
                loaded = ()
                for i in tl.static_range(TOKENS):
                    loaded += (
                        load_token(
                            tokens,
                            walk,
                            first,
                            length,
                            p + i,
                            p + i < end,
                            d,
                            in_d,
                            dt_weight_RD,
                            rank,
                            sizes.dim,
                            REVERSE,
                        ),
                    )
                for i in tl.static_range(TOKENS):
                    row, live, restart, _mask_D, x_D, dt_D = loaded[i]
                    dt_D = step_size(dt_D, dt_bias_D, live, SOFTPLUS)
                    B_ND = load_weights(B_const, tokens.B, tokens.B_row, row, at_B, in_n & live, ACC)
                    h_ND = advance(h_ND, walk, restart, x_D.to(ACC), dt_D, A_ND, B_ND)

        tl.debug_barrier()
        for later_steps in range(nsteps):
            step = nsteps - 1 - later_steps
            step_begin = chunk + step * STEP
            count = tl.minimum(end - step_begin, STEP)
            h_ND = tl.load(scratch_ptr + (home * SLOTS + step) * sizes.dim * dstate + at_ND, mask=in_ND, other=0.0)
            for i in range(count):
                before_ptr = scratch_ptr + (home * SLOTS + SLOTS - STEP + i) * sizes.dim * dstate
                tl.store(before_ptr + at_ND, h_ND, mask=in_ND)
                p = step_begin + i
                token = load_token(
                    tokens, walk, first, length, p, p < end, d, in_d, dt_weight_RD, rank, sizes.dim, REVERSE
                )
                row, live, restart, _mask_D, x_D, dt_D = token
                dt_D = step_size(dt_D, dt_bias_D, live, SOFTPLUS)
                B_ND = load_weights(B_const, tokens.B, tokens.B_row, row, at_B, in_n & live, ACC)
                h_ND = advance(h_ND, walk, restart, x_D.to(ACC), dt_D, A_ND, B_ND)

            tl.debug_barrier()
            # dy and z come from far away: they are fetched one token ahead.
            row, live, restart = visit(walk, first, length, step_begin + count - 1, count > 0, REVERSE)
            dy_ahead_D, z_ahead_D = load_dy_and_z(dy_ptr, dy_row, tokens, row, d, in_d & live)
            for later_tokens in range(count):
                i = count - 1 - later_tokens
                p = step_begin + i
                dy_D, z_D = dy_ahead_D.to(ACC), z_ahead_D.to(ACC)
                row, live, restart = visit(walk, first, length, p - 1, i > 0, REVERSE)
                dy_ahead_D, z_ahead_D = load_dy_and_z(dy_ptr, dy_row, tokens, row, d, in_d & live)
                token = load_token(
                    tokens, walk, first, length, p, p < end, d, in_d, dt_weight_RD, rank, sizes.dim, REVERSE
                )
                row, live, restart, _mask_D, x_D, dt_D = token
                B_ND = load_weights(B_const, tokens.B, tokens.B_row, row, at_B, in_n & live, ACC)
                C_ND = load_weights(C_const, tokens.C, tokens.C_row, row, at_C, in_n & live, ACC)
                x_D = x_D.to(ACC)
                logit_D, dt_D = dt_D.to(ACC) + dt_bias_D, step_size(dt_D, dt_bias_D, live, SOFTPLUS)
                if tokens.z is not None:
                    y_D = tl.sum(C_ND * h_ND, axis=0) + D_D * x_D
                    dz_D = tl.where(live, dy_D * y_D * silu_grad(z_D), 0.0)
                    dz_D = add_before(dz_D, grads.dz_before, row, d, in_d & live, sizes.dim)
                    tl.store(grads.dz + row * sizes.dim + d, rounded(dz_D, grads.dz), mask=in_d)
                    dy_D *= silu(z_D)
                dD_D += dy_D * x_D

                dC_ND = dy_D[None, :] * h_ND
                if tokens.C_row is None:
                    dC_const += dC_ND
                else:
                    store_weights(grads.dC, dC_ND, row, run, sizes, sizes.C_share, at_C, in_n, dstate)
                dh_ND += dy_D[None, :] * C_ND
                dB_ND = (dt_D * x_D)[None, :] * dh_ND
                if tokens.B_row is None:
                    dB_const += dB_ND
                else:
                    store_weights(grads.dB, dB_ND, row, run, sizes, sizes.B_share, at_B, in_n, dstate)
                dBx_D = tl.sum(dh_ND * B_ND, axis=0)
                dx_D = add_before(dt_D * dBx_D + D_D * dy_D, grads.dx_before, row, d, in_d & live, sizes.dim)
                tl.store(grads.dx + row * sizes.dim + d, rounded(dx_D, grads.dx), mask=in_d)

                # From here on dh and h stand before the token: the gradient of dt A is their product.
                dh_ND *= tl.exp2(dt_D[None, :] * A_ND)
                if walk.flags is not None:
                    dh_ND = tl.where(restart, 0.0, dh_ND)
                before_ptr = scratch_ptr + (home * SLOTS + SLOTS - STEP + i) * sizes.dim * dstate
                h_ND = tl.load(before_ptr + at_ND, mask=in_ND, other=0.0)
                ddtA_ND = dh_ND * h_ND
                dA_ND += dt_D[None, :] * ddtA_ND
                ddt_D = tl.sum(ddtA_ND * A_ND, axis=0) * LN2 + dBx_D * x_D
                if SOFTPLUS:
                    ddt_D *= softplus_grad(logit_D)
                ddt_D = tl.where(live, ddt_D, 0.0)
                ddt_bias_D += ddt_D
                tl.store(grads.ddt + row * grads.ddt_row + d, rounded(ddt_D, grads.ddt), mask=in_d)
            tl.debug_barrier()

    at_part_ND = part * sizes.dim * dstate + at_ND
    tl.store(grads.dA + at_part_ND, dA_ND, mask=in_ND)
    if tokens.B_row is None:
        tl.store(grads.dB + at_part_ND, dB_const, mask=in_ND)
    if tokens.C_row is None:
        tl.store(grads.dC + at_part_ND, dC_const, mask=in_ND)
    if D_ptr is not None:
        tl.store(grads.dD + part * sizes.dim + d, dD_D, mask=in_d)
    if dt_bias_ptr is not None:
        tl.store(grads.ddt_bias + part * sizes.dim + d, ddt_bias_D, mask=in_d)
    if grads.dinitial_state is not None:
        tl.store(grads.dinitial_state + seq * sizes.dim * dstate + at_ND, dh_ND, mask=in_ND & (split == 0))


def entering_states(
    call: Launch, A: Tensor, dt_bias: Tensor | None, outer_state: Tensor | None, dy: Tensor | None
) -> Tensor | None:
    """What enters each split, (nseq * nsplits, dim, dstate): the state, or with dy its gradient. None for one split."""
    nsplits, (dim, dstate) = call.sizes.nsplits, A.shape
    if nsplits == 1 or not call.grid[0]:
        return None
    states, dt_sum = A.new_empty(call.nparts, dim, dstate), A.new_empty(call.nparts, dim)
    dy_row = None if dy is None else row_stride(dy)
    seqlen = call.tokens.x.shape[1]
    selective_scan_local_kernel[call.grid](
        call.tokens, call.walk, dy, A, dt_bias, states, dt_sum, seqlen, dy_row, call.sizes, **call.options
    )
    options = {key: call.options[key] for key in ("dstate", "BLOCK_D", "BLOCK_N", "num_warps", "num_stages")}
    grid = (call.nparts // nsplits, triton.cdiv(dim, options["BLOCK_D"]))
    selective_scan_carry_kernel[grid](states, dt_sum, A, outer_state, dim, nsplits, BACKWARD=dy is not None, **options)
    return states


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    dt_softplus: bool, reverse: bool, save: bool, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and with `save` the checkpoints that `backward` takes.

    The checkpoints come in a tensor of shape (slots, dstate, dim), but each is kept in the order (dim, dstate) of every
    other state here.
    """
    call = launch_of(x, dt, A, B, C, z, order, flags, cu_seqlens, dt_softplus, reverse, plan)
    (batch, seqlen, dim), dstate, nseq = x.shape, A.shape[1], call.nparts // call.sizes.nsplits
    every = CHECKPOINT_EVERY.value
    slots = batch * triton.cdiv(seqlen, every) if cu_seqlens is None else seqlen // every + nseq
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    checkpoints = A.new_empty(slots if save else 0, dstate, dim)
    final_state = launch_forward(call, A, D, dt_bias, initial_state, y, None, checkpoints if save else None)
    return y, final_state, checkpoints


def launch_forward(
    call: Launch, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    y: Tensor, before: Tensor | None, checkpoints: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write y (flat rows), to which `before` is added, and the checkpoints; return the final state."""
    final_state = A.new_empty(call.nparts // call.sizes.nsplits, *A.shape)
    if call.grid[0]:
        with on_device_of(y):
            states = entering_states(call, A, dt_bias, initial_state, None)
            selective_scan_fwd_kernel[call.grid](
                call.tokens, call.walk, A, D, dt_bias, initial_state, states, y, before, final_state, checkpoints,
                y.shape[1], row_stride(y), call.sizes, **call.options,
            )  # fmt: skip
    return final_state


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor, dt_softplus: bool, reverse: bool, plan: Plan | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; None where the input is None."""
    call = launch_of(x, dt, A, B, C, z, order, flags, cu_seqlens, dt_softplus, reverse, plan)
    dx, ddt, dz, dinitial_state = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, dt, z, initial_state)
    )
    assert dx is not None and ddt is not None
    sums = launch_backward(call, dy, dfinal_state, A, D, dt_bias, checkpoints, dx, ddt, dz, None, None, dinitial_state)
    dA, dB, dC, dD, ddt_bias = sums
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state


def launch_backward(
    call: Launch, dy: Tensor, dfinal_state: Tensor | None, A: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    checkpoints: Tensor, dx: Tensor, ddt: Tensor, dz: Tensor | None, dx_before: Tensor | None, dz_before: Tensor | None,
    dinitial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Write dx and dz, to which `before` is added, ddt (flat rows) and dinitial_state; return dA, dB, dC, dD, ddt_bias."""
    (dim, dstate), sizes, nparts = A.shape, call.sizes, call.nparts
    seqlen, B, C, cu_seqlens = dx.shape[1], call.tokens.B, call.tokens.C, call.walk.cu_seqlens

    def parts_of(weight: Tensor, share: int) -> Tensor:
        if weight.ndim == 2:
            return A.new_empty(nparts, dim, dstate)
        nblocks = share // sizes.run * sizes.blocks_per_run
        return torch.empty(nblocks, *weight.shape, dtype=weight.dtype if nblocks == 1 else A.dtype, device=A.device)

    grads = Gradients(
        dx=dx, ddt=ddt, dz=dz, ddt_row=row_stride(ddt), dx_before=dx_before, dz_before=dz_before,
        dB=parts_of(B, sizes.B_share), dC=parts_of(C, sizes.C_share), dA=A.new_empty(nparts, dim, dstate),
        dD=None if D is None else A.new_empty(nparts, dim),
        ddt_bias=None if dt_bias is None else A.new_empty(nparts, dim),
        dinitial_state=dinitial_state,
    )  # fmt: skip
    with on_device_of(dx):
        if call.grid[0]:
            states = entering_states(call, A, dt_bias, dfinal_state, dy)
            nhomes = nparts if cu_seqlens is None else seqlen // sizes.span + nparts // sizes.nsplits
            scratch = A.new_empty(nhomes, CHECKPOINT_EVERY.value // call.step + call.step, dim, dstate)
            selective_scan_bwd_kernel[call.grid](
                call.tokens, call.walk, grads, dy, dfinal_state, A, D, dt_bias, checkpoints, states, scratch,
                seqlen, row_stride(dy), sizes, STEP=call.step, **call.options,
            )  # fmt: skip
        dA, dD, ddt_bias = (None if t is None else sum_parts(t, A.dtype) for t in (grads.dA, grads.dD, grads.ddt_bias))
        dB, dC = (sum_parts(parts, weight.dtype) for parts, weight in ((grads.dB, B), (grads.dC, C)))
    return dA, dB, dC, dD, ddt_bias


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tests/kernels/test_compile.py compiles ahead of time: a label and a call on `meta` tensors, each."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "fp32", partial(_both, fp32)
    yield "bf16", partial(_both, bf16)
    yield "bf16, split, packed, flags, reverse, states", partial(_both, bf16, packed=True, flags=True, nsplits=4)
    yield "fp32, path, flags", partial(_both, fp32, path=True, flags=True)
    yield "fp32, constant B and C, no gate", partial(_both, fp32, constant=True, gate=False)
    yield "bf16, no gate", partial(_both, bf16, gate=False)
    yield "bf16, 1 state", partial(_both, bf16, dstate=1)
    yield "fp32, 64 states", partial(_both, fp32, dstate=64)
    yield "bf16, 128 states", partial(_both, bf16, dstate=128)


def _both(
    dtype: torch.dtype, *, dstate: int = 16, nsplits: int = 1,
    packed: bool = False, flags: bool = False, path: bool = False, constant: bool = False, gate: bool = True,
) -> None:  # fmt: skip
    batch, seqlen, dim, nseq = (1 if packed else 2), 1024, 1536, (4 if packed else 2)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, A = tensor(batch, seqlen, dim), tensor(dim, dstate, dtype=torch.float32)
    vector = tensor(dim, dtype=torch.float32)
    weight = A if constant else tensor(batch, seqlen, 1, dstate)
    state = tensor(nseq, dim, dstate, dtype=torch.float32) if packed else None
    tables = (
        tensor(seqlen, dtype=torch.int32) if path else None,
        tensor(batch, seqlen, dtype=torch.uint8) if flags else None,
        tensor(nseq + 1, dtype=torch.int64) if packed else None,
    )
    plan = plan_of(x, A, dim, nseq, packed)._replace(nsplits=nsplits)
    inputs = (x, x, A, weight, weight, vector, x if gate else None, vector, state, *tables)
    checkpoints = forward(*inputs, True, packed, True, plan)[2]
    backward(x, state, *inputs, checkpoints, True, packed, plan)
