"""Triton kernels of ssd: forward, and what it shares with backward (ssd_backward.py).

    h_l = exp(dt_l A) h_{l-1} + dt_l x_l B_l^T,    y_l = (h_l C_l + D x_l) silu(z_l)

Two launches. The state kernel walks the chunks of a sequence and leaves the state before each, a program for every tile
of a head's state; the output kernel makes the tokens of every chunk at once from the state before it and the masked
product (L o C B^T) (dt X). Decays within a chunk are differences of one running sum, kept in two fp32 parts so that none
of its digits are lost, masked before the exponential. States lie as (dstate, headdim); sums are fp32 (fp64 for fp64).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, in_two_parts, interpreted, on_device_of, register_limit, row_stride
from .math import INTERPRETED, LOG2E, clamped, rounded, silu, softplus, softplus_grad

RESTART, PAD = tl.constexpr(1), tl.constexpr(2)  # bits of `flags`


class Tokens(NamedTuple):
    """Inputs per token: tensors, row strides in elements."""

    x: Any  # (batch, seqlen, nheads, headdim)
    dt: Any  # (batch, seqlen, nheads)
    B: Any  # (batch, seqlen, ngroups, dstate)
    C: Any
    z: Any  # (batch, seqlen, nheads, headdim) or None
    x_row: Any
    dt_row: Any
    B_row: Any
    C_row: Any
    z_row: Any


class Steps(NamedTuple):
    """What turns dt into decays. Triton takes a float in fp32: each limit comes with what that leaves out."""

    A: Any  # (nheads,)
    dt_bias: Any  # (nheads,) or None
    dt_min: tuple[float, float]
    dt_max: tuple[float, float]


class Walk(NamedTuple):
    """Which token stands at a position; flags (batch, seqlen) uint8 and cu_seqlens (nseq + 1,) int64 may be None."""

    flags: Any
    cu_seqlens: Any
    seqlen: Any
    nseq: Any


class Sizes(NamedTuple):
    """Of one token."""

    nheads: int
    heads_per_group: int
    headdim: int
    dstate: int


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in the dtype of acc. The interpreter would multiply the bits of bf16 as integers."""
    if INTERPRETED:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def sequence_of(walk, sequence, Q: tl.constexpr):
    """First row, length, and slot of the first chunk of a sequence."""
    if walk.cu_seqlens is None:
        first = sequence.to(tl.int64) * walk.seqlen
        length = first * 0 + walk.seqlen
        slot = sequence.to(tl.int64) * tl.cdiv(walk.seqlen, Q)
    else:
        first = tl.load(walk.cu_seqlens + sequence)
        length = tl.load(walk.cu_seqlens + sequence + 1) - first
        slot = first // Q + sequence
    return first, length, slot


@triton.jit
def sequence_at(walk, slot, Q: tl.constexpr):
    """The sequence that a slot belongs to: the last whose own slots begin at or before it."""
    if walk.cu_seqlens is None:
        low = slot // tl.cdiv(walk.seqlen, Q)
    else:
        low = slot * 0
        high = low + walk.nseq
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(walk.cu_seqlens + middle) // Q + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    return low


@triton.jit
def tokens_of(walk, first, length, index, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Rows of a chunk's tokens; which exist; which count (no pad); how many restarts lie up to and with each."""
    p = index * Q + tl.arange(0, Q)
    inside = p < length
    row = first + (length - 1 - p if REVERSE else p)
    if walk.flags is None:
        return row, inside, inside, tl.zeros((Q,), tl.int32)
    else:
        flag = tl.load(walk.flags + row, mask=inside, other=PAD)
        restarts = tl.where(inside & ((flag & RESTART) != 0), 1, 0)
        return row, inside, inside & ((flag & PAD) == 0), tl.cumsum(restarts, 0)


@triton.jit
def steps_of(tokens, steps, row, live, head, SOFTPLUS: tl.constexpr):
    """dt as the recurrence uses it, and its derivative by the input."""
    ACC: tl.constexpr = steps.A.dtype.element_ty
    raw = tl.load(tokens.dt + row * tokens.dt_row + head, mask=live, other=0.0).to(ACC)
    if steps.dt_bias is not None:
        raw += tl.load(steps.dt_bias + head)
    free, slope = raw, raw * 0.0 + 1.0
    if SOFTPLUS:
        free, slope = softplus(raw), softplus_grad(raw)
    low = tl.cast(steps.dt_min[0], ACC) + tl.cast(steps.dt_min[1], ACC)
    high = tl.cast(steps.dt_max[0], ACC) + tl.cast(steps.dt_max[1], ACC)
    slope = tl.where((free >= low) & (free <= high), slope, 0.0)
    return tl.where(live, clamped(free, low, high), 0.0), tl.where(live, slope, 0.0)


@triton.jit
def decays_of(steps, dt_Q, part_Q, head):
    """Of one head: log2 of the decay up to each token, in two parts; decay from the chunk's start to each token, from
    each token to its end, and over all of it."""
    ACC: tl.constexpr = steps.A.dtype.element_ty
    rate = tl.load(steps.A + head).to(tl.float64) * LOG2E
    log_Q = dt_Q.to(tl.float64) * rate
    sum_Q, total = tl.cumsum(log_Q, 0), tl.sum(log_Q, 0)
    high_Q = sum_Q.to(ACC)
    low_Q = (sum_Q - high_Q.to(tl.float64)).to(ACC)
    parts = tl.max(part_Q, 0)
    enter_Q = tl.where(part_Q == 0, tl.exp2(high_Q), 0.0)
    leave_Q = tl.where(part_Q == parts, tl.exp2((total - sum_Q).to(ACC)), 0.0)
    return high_Q, low_Q, enter_Q, leave_Q, tl.where(parts == 0, tl.exp2(total.to(ACC)), 0.0)


@triton.jit
def mask_of(high_Q, low_Q, part_Q, Q: tl.constexpr):
    """L: decay from token s (columns) to token t (rows); 0 where s comes after t or a restart lies between."""
    t = tl.arange(0, Q)
    together = (t[:, None] >= t[None, :]) & (part_Q[:, None] == part_Q[None, :])
    exponent = (high_Q[:, None] - high_Q[None, :]) + (low_Q[:, None] - low_Q[None, :])
    return tl.exp2(tl.where(together, exponent, float("-inf")))


@triton.jit
def load_rows(ptr, row, stride, column, live, in_column):
    """A tile (tokens, columns); zeros at pads."""
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=live[:, None] & in_column[None, :], other=0.0)


@triton.jit
def load_dy(dy_ptr, dy_row, tokens, row, column, live, in_column, ACC: tl.constexpr):
    """The gradient of y before the gate."""
    dy = load_rows(dy_ptr, row, dy_row, column, live, in_column)
    if tokens.z is not None:
        z = load_rows(tokens.z, row, tokens.z_row, column, live, in_column)
        dy = rounded(dy.to(ACC) * silu(z.to(ACC)), dy_ptr)
    return dy


@triton.jit(do_not_specialize=["dy_row"])
def ssd_state_kernel(
    tokens, steps, walk, sizes, dy_ptr, dy_row, initial_ptr, states_ptr, final_ptr,
    ADJOINT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one head's state along one sequence: h <- exp(sum dt A) h + sum_s leave_s dt_s B_s x_s^T.

    With ADJOINT the gradient of the state, from the end: dh <- exp(sum dt A) dh + sum_t enter_t C_t dy_t^T.
    states (slots, nheads, dstate, headdim): the one before each chunk (ADJOINT: after it); may be None
    initial, final (nseq, nheads, headdim, dstate): where the walk begins and ends; may be None
    """
    ACC: tl.constexpr = steps.A.dtype.element_ty
    sequence, head = tl.program_id(0) // sizes.nheads, tl.program_id(0) % sizes.nheads
    first, length, slot = sequence_of(walk, sequence, Q)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_n = p < sizes.headdim, n < sizes.dstate
    in_NP = in_n[:, None] & in_p[None, :]
    at_NP = n[:, None] * sizes.headdim + p[None, :]  # in (dstate, headdim)
    given_NP = tl.program_id(0).to(tl.int64) * sizes.headdim * sizes.dstate + p[None, :] * sizes.dstate + n[:, None]
    column_p, column_n = head * sizes.headdim + p, head // sizes.heads_per_group * sizes.dstate + n

    h_NP = tl.zeros((BLOCK_N, BLOCK_P), ACC)
    if initial_ptr is not None:
        h_NP = tl.load(initial_ptr + given_NP, mask=in_NP, other=0.0)
    nchunks = tl.cdiv(length, Q)
    for i in range(nchunks):
        index = nchunks - 1 - i if ADJOINT else i
        if states_ptr is not None:
            state = ((slot + index) * sizes.nheads + head) * sizes.dstate * sizes.headdim
            tl.store(states_ptr + state + at_NP, h_NP, mask=in_NP)
        row, _, live, part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
        dt_Q, _ = steps_of(tokens, steps, row, live, head, SOFTPLUS)
        _, _, enter_Q, leave_Q, across = decays_of(steps, dt_Q, part_Q, head)
        if ADJOINT:
            value_QP = load_dy(dy_ptr, dy_row, tokens, row, column_p, live, in_p, ACC)
            weight_QN = load_rows(tokens.C, row, tokens.C_row, column_n, live, in_n)
            scale_Q = enter_Q
        else:
            value_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p)
            weight_QN = load_rows(tokens.B, row, tokens.B_row, column_n, live, in_n)
            scale_Q = leave_Q * dt_Q
        scaled_QP = rounded(value_QP.to(ACC) * scale_Q[:, None], tokens.x)
        h_NP = dot(tl.trans(weight_QN), scaled_QP, across * h_NP, PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + given_NP, h_NP, mask=in_NP)


@triton.jit
def ssd_fwd_kernel(
    tokens, steps, walk, sizes, D_ptr, states_ptr, addend_ptr, y_ptr, ungated_ptr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens of one chunk, BLOCK_P channels of one head: y = enter C h + (L o C B^T) (dt x), and what comes after."""
    ACC: tl.constexpr = steps.A.dtype.element_ty
    slot, head = (tl.program_id(0) // sizes.nheads).to(tl.int64), tl.program_id(0) % sizes.nheads
    sequence = sequence_at(walk, slot, Q)
    first, length, first_slot = sequence_of(walk, sequence, Q)
    index = slot - first_slot
    if index * Q < length:
        row, inside, live, part_Q = tokens_of(walk, first, length, index, REVERSE, Q)
        dt_Q, _ = steps_of(tokens, steps, row, live, head, SOFTPLUS)
        high_Q, low_Q, enter_Q, _, _ = decays_of(steps, dt_Q, part_Q, head)
        p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = p < sizes.headdim
        column_p = head * sizes.headdim + p
        state = states_ptr + (slot * sizes.nheads + head) * sizes.dstate * sizes.headdim

        y_QP, CB_QQ = tl.zeros((Q, BLOCK_P), ACC), tl.zeros((Q, Q), ACC)
        for start in range(0, sizes.dstate, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_n = n < sizes.dstate
            column_n = head // sizes.heads_per_group * sizes.dstate + n
            B_QN = load_rows(tokens.B, row, tokens.B_row, column_n, live, in_n)
            C_QN = load_rows(tokens.C, row, tokens.C_row, column_n, live, in_n)
            h_NP = rounded(load_rows(state, n, sizes.headdim, p, in_n, in_p), tokens.C)
            CB_QQ = dot(C_QN, tl.trans(B_QN), CB_QQ, PRECISION)
            y_QP = dot(C_QN, h_NP, y_QP, PRECISION)

        x_QP = load_rows(tokens.x, row, tokens.x_row, column_p, live, in_p)
        M_QQ = CB_QQ * mask_of(high_Q, low_Q, part_Q, Q) * dt_Q[None, :]
        y_QP = dot(rounded(M_QQ, tokens.x), x_QP, y_QP * enter_Q[:, None], PRECISION)

        at_QP = row[:, None] * (sizes.nheads * sizes.headdim) + column_p[None, :]
        exists_QP = inside[:, None] & in_p[None, :]
        if D_ptr is not None:
            y_QP += tl.load(D_ptr + column_p, mask=in_p, other=0.0)[None, :] * x_QP.to(ACC)
        if addend_ptr is not None:
            y_QP += tl.load(addend_ptr + at_QP, mask=exists_QP, other=0.0)
        if ungated_ptr is not None:
            tl.store(ungated_ptr + at_QP, y_QP, mask=exists_QP)
        if tokens.z is not None:
            y_QP *= silu(load_rows(tokens.z, row, tokens.z_row, column_p, live, in_p).to(ACC))
        tl.store(y_ptr + at_QP, rounded(tl.where(live[:, None], y_QP, 0.0), y_ptr), mask=exists_QP)


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: on NVIDIA in three tf32 products, which keep its digits; elsewhere as it is."""
    if dtype != torch.float32 or interpreted():
        return "ieee"
    return "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"


def block(size: int, most: int) -> int:
    """Side of a tile for an axis of this size; tl.dot takes none below 16."""
    return min(most, max(16, triton.next_power_of_2(size)))


class Plan:
    """Sizes, tiles and arguments of one call."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None,
        flags: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
        reverse: bool, chunk: int,
    ) -> None:  # fmt: skip
        self.batch, self.seqlen, self.nheads, self.headdim = x.shape
        self.ngroups, self.dstate = B.shape[2:]
        self.nseq = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is None:
            self.slots = self.batch * triton.cdiv(self.seqlen, chunk)
        else:
            self.slots = self.seqlen // chunk + self.nseq
        self.chunk, self.acc = chunk, acc_dtype(x.dtype)
        if flags is not None and self.acc == torch.float64:
            # Triton lays the operands of a product out for the narrowest load they depend on, masks included, and does
            # not compile products of fp64 laid out for bytes.
            flags = flags.to(torch.int64)
        strides = (0 if t is None else row_stride(t) for t in (x, dt, B, C, z))
        self.arguments = (
            Tokens(x, dt, B, C, z, *strides),
            Steps(A, dt_bias, in_two_parts(dt_min), in_two_parts(dt_max)),
            Walk(flags, cu_seqlens, self.seqlen, self.nseq),
            Sizes(self.nheads, self.nheads // self.ngroups, self.headdim, self.dstate),
        )
        self.options = {
            "SOFTPLUS": dt_softplus, "REVERSE": reverse, "PRECISION": precision_of(x.dtype), "Q": chunk
        }  # fmt: skip
        # Tile sides for which every kernel stays in its registers on every target: tests/kernels/test_compile.py.
        # fp32 operands take three times the registers of bf16, being split for the tensor cores.
        half = x.dtype.itemsize == 2 or interpreted()
        self.block_p, self.block_n = block(self.headdim, 64 if half else 32), block(self.dstate, 64 if half else 32)
        self.narrow_p, self.narrow_n = block(self.headdim, 32), block(self.dstate, 32 if half else 16)
        roomy = interpreted() or (half and z is None)
        self.gated_p = self.narrow_p if roomy else block(self.headdim, 16)
        self.gated_n = self.narrow_n if roomy else block(self.dstate, 16)

    def states(self, dy: Tensor | None, initial: Tensor | None, states: Tensor | None, final: Tensor | None) -> None:
        """The state kernel; with dy that of the gradient of the state."""
        # A program holds one tile of the state; small tiles give batch x heads programs enough to fill a device.
        block_p, block_n = self.narrow_p, self.block_n
        grid = (self.nseq * self.nheads, triton.cdiv(self.headdim, block_p), triton.cdiv(self.dstate, block_n))
        ssd_state_kernel[grid](
            *self.arguments, dy, 0 if dy is None else row_stride(dy), initial, states, final,
            ADJOINT=dy is not None, **self.options, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=2,
        )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    addend: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, chunk: int, save: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y (in the dtype of states if `wide`), the final state, the states before each chunk and y before the gate.

    The last two are for backward: without `save` there are none.
    """
    plan = Plan(x, dt, A, B, C, z, dt_bias, flags, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, chunk)
    y = x.new_empty(x.shape, dtype=plan.acc if wide else x.dtype)
    final_state = A.new_empty(plan.nseq, plan.nheads, plan.headdim, plan.dstate)
    states = A.new_empty(plan.slots, plan.nheads, plan.dstate, plan.headdim)
    ungated = A.new_empty(x.shape) if save and z is not None else None
    with on_device_of(x):
        if final_state.numel() > 0:
            plan.states(None, initial_state, states, final_state)
        if y.numel() > 0:
            ssd_fwd_kernel[(plan.slots * plan.nheads, triton.cdiv(plan.headdim, plan.block_p))](
                *plan.arguments, D, states, addend, y, ungated,
                **plan.options, BLOCK_P=plan.block_p, BLOCK_N=plan.narrow_n,
                num_warps=4, num_stages=2, **register_limit(255),
            )  # fmt: skip
    return y, final_state, states if save else states[:0].clone(), ungated


def backward(*args: Any) -> tuple[Tensor | None, ...]:
    """See ssd_backward.py."""
    from .ssd_backward import backward

    return backward(*args)


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward for the sizes of heads and states that tiles differ by, plain and with everything."""

    def call(dtype: torch.dtype, headdim: int, dstate: int, chunk: int, full: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        batch, seqlen, nheads = 1, 256, 8
        x, z = tensor(batch, seqlen, nheads, headdim, dtype=dtype), None
        dt = tensor(batch, seqlen, nheads, dtype=dtype)
        B = tensor(batch, seqlen, 1, dstate, dtype=dtype)
        A, D, bias, state, flags, offsets = tensor(nheads, dtype=acc_dtype(dtype)), None, None, None, None, None
        if full:
            z, bias, D = x, A, tensor(nheads, headdim, dtype=A.dtype)
            state = tensor(2, nheads, headdim, dstate, dtype=A.dtype)
            flags, offsets = tensor(batch, seqlen, dtype=torch.uint8), tensor(3, dtype=torch.int64)
        options = (full, 0.0, float("inf"), full, chunk)
        walk = (flags, offsets)
        _, _, states, ungated = forward(x, dt, A, B, B, D, z, bias, state, *walk, None, *options, True, False)
        backward(x, state, x, dt, A, B, B, D, z, bias, state, *walk, states, ungated, *options, False)

    # fp16 takes the registers of bf16, so that the largest of its kernels stands for all.
    for dtype, headdim, dstate, full in (
        (torch.float32, 64, 128, False),
        (torch.float32, 64, 128, True),
        (torch.float32, 8, 16, True),
        (torch.bfloat16, 64, 128, False),
        (torch.bfloat16, 64, 128, True),
        (torch.bfloat16, 8, 16, True),
        (torch.float16, 64, 128, True),
    ):
        chunk = 16 if dstate == 16 else 64 if dtype.itemsize == 2 else 32
        label = f"{dtype}, headdim {headdim}, dstate {dstate}, chunk {chunk}{', everything' if full else ''}"
        yield label.removeprefix("torch."), partial(call, dtype, headdim, dstate, chunk, full)
