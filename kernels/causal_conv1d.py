"""Triton kernels of causal_conv1d.

    y_l = act(bias + sum_k weight[:, width-1-k] x_{prev^k(l)})

The kernels see one numbering of rows. Rows 0..tokens-1 are the tokens; row tokens + s (width-1) + i is entry i of the
initial state of sequence s, which its first token follows; a negative row is zero. One step back or ahead in the walk
is arithmetic where each batch row is walked plainly, and a look-up in two tables (`links`) where the walk has resets,
pads, a path or packed sequences. In those tables entry tokens + s is the end of sequence s: the token before the end,
and the token after the initial state.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, on_device_of, register_limit, row_stride, sum_parts
from .math import rounded, silu, silu_grad

RESTART, PAD = tl.constexpr(1), tl.constexpr(2)  # bits of `flags`
CUT, SKIPPED = tl.constexpr(-1), tl.constexpr(-2)  # links: nothing on that side, the token is a pad


@triton.jit(do_not_specialize=["tokens", "seqlen"])
def causal_conv1d_link_kernel(
    order_ptr, flags_ptr, cu_seqlens_ptr, prev_ptr, next_ptr,
    tokens, seqlen, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program links the tokens of one sequence; `next` and the ends of both tables arrive filled with CUT.

    Position p of the walk leaves the mark 2p+1 if its token is real, 2p if it is a pad that restarts, else none. The
    greatest mark before a token is odd for the token it follows, even for a restart, and -1 at the start.
    """
    sequence = tl.program_id(0)
    if cu_seqlens_ptr is None:
        start, length = sequence * seqlen, seqlen
    else:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
        length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - start
    before_first = tokens + sequence * (WIDTH - 1) + WIDTH - 2 if HAS_STATE else CUT

    carry = tl.full((), -1, tl.int64)
    for first in range(0, length, BLOCK):
        p = first + tl.arange(0, BLOCK)
        inside = p < length
        token = token_at(p, start, length, order_ptr, inside, REVERSE)
        flag = flag_of(token, flags_ptr, inside)

        follows = (p > 0) & inside
        before = flag_of(token_at(p - 1, start, length, order_ptr, follows, REVERSE), flags_ptr, follows)
        mark = mark_of(p - 1, before)
        mark = tl.where(follows, mark, -1)
        mark = tl.maximum(tl.associative_scan(mark, 0, maximum), carry)
        carry = tl.max(mark, axis=0)
        mark = tl.maximum(mark, tl.where(flag & RESTART != 0, 2 * p.to(tl.int64), -1))

        joined = inside & (mark >= 0) & (mark % 2 == 1)
        neighbour = token_at((mark // 2).to(tl.int32), start, length, order_ptr, joined, REVERSE)
        link = tl.where(joined, neighbour, tl.where(mark == -1, before_first, CUT))
        real = flag & PAD == 0
        tl.store(prev_ptr + token, tl.where(real, link, SKIPPED).to(tl.int32), mask=inside)
        tl.store(next_ptr + neighbour, token.to(tl.int32), mask=joined & real)
        tl.store(next_ptr + tokens + sequence + p * 0, token.to(tl.int32), mask=inside & real & (mark == -1))

    # The end of the sequence follows its last mark as one more token would.
    last = length - 1
    some = last >= 0
    token = token_at(last, start, length, order_ptr, some, REVERSE)
    flag = flag_of(token, flags_ptr, some)
    mark = tl.maximum(tl.where(some, mark_of(last, flag), -1), carry)
    joined = (mark >= 0) & (mark % 2 == 1)
    neighbour = token_at((mark // 2).to(tl.int32), start, length, order_ptr, joined, REVERSE)
    link = tl.where(joined, neighbour, tl.where(mark == -1, before_first, CUT))
    end = tokens + sequence
    tl.store(prev_ptr + end, link.to(tl.int32))
    tl.store(next_ptr + tl.where(joined, neighbour, end), end.to(tl.int32), mask=joined | (mark == -1))


@triton.jit
def maximum(a, b):
    """How marks combine."""
    return tl.maximum(a, b)


@triton.jit
def mark_of(p, flag):
    """The mark that position p leaves for the positions after it."""
    twice = 2 * p.to(tl.int64)
    return tl.where(flag & PAD == 0, twice + 1, tl.where(flag & RESTART != 0, twice, -1))


@triton.jit
def token_at(p, start, length, order_ptr, inside, REVERSE: tl.constexpr):
    """Row of the token at position p of a sequence's walk."""
    step = length - 1 - p if REVERSE else p
    if order_ptr is not None:
        step = tl.load(order_ptr + step, mask=inside, other=0)
    return start + step


@triton.jit
def flag_of(token, flags_ptr, inside):
    """RESTART and PAD bits of tokens."""
    if flags_ptr is None:
        flag = token * 0
    else:
        flag = tl.load(flags_ptr + token, mask=inside, other=0).to(tl.int32)
    return flag


@triton.jit
def row_at(p, sequence, tokens, seqlen, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr):
    """Row at position p < seqlen of a plain walk; the positions before 0 are the initial state."""
    token = sequence * seqlen + (seqlen - 1 - p if REVERSE else p)
    before = tokens + sequence * (WIDTH - 1) + p + WIDTH - 1 if HAS_STATE else p * 0 - 1
    return tl.where(p >= 0, token, tl.where(p >= 1 - WIDTH, before, -1))


@triton.jit
def row_before(row, prev_ptr, tokens, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr):
    """Row before `row` in a linked walk."""
    before = tl.load(prev_ptr + row, mask=(row >= 0) & (row < tokens), other=-1)
    if HAS_STATE:
        oldest = (row - tokens) % (WIDTH - 1) == 0
        before = tl.where(row >= tokens, tl.where(oldest, -1, row - 1), before)
    return before


@triton.jit
def at(ptr, row, stride, d):
    """Pointers to channels d of each row."""
    return ptr + row.to(tl.int64)[:, None] * stride + d[None, :]


@triton.jit
def load_rows(
    x_ptr, initial_state_ptr, row, d, in_d, tokens, x_stride, dim, HAS_STATE: tl.constexpr, ACC: tl.constexpr
):
    """Rows of tokens or of the initial state, one below the other; zero for negative rows."""
    is_token = (row >= 0) & (row < tokens)
    x = tl.load(at(x_ptr, row, x_stride, d), mask=is_token[:, None] & in_d[None, :], other=0.0)
    if HAS_STATE:
        in_state = (row >= tokens)[:, None] & in_d[None, :]
        x += tl.load(at(initial_state_ptr, row - tokens, dim, d), mask=in_state, other=0.0)
    return x.to(ACC)


@triton.jit(do_not_specialize=["tokens", "seqlen", "nseq"])
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_state_ptr, prev_ptr, y_ptr, final_state_ptr,
    tokens, seqlen, nseq, dim, x_stride, WIDTH: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The first programs each make BLOCK_L rows of y for BLOCK_D channels, the others as many rows of final states."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    HAS_STATE: tl.constexpr = initial_state_ptr is not None
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    y_programs = tl.cdiv(tokens, BLOCK_L)
    block = tl.program_id(0)

    if block < y_programs:
        token = block * BLOCK_L + tl.arange(0, BLOCK_L)
        in_L = token < tokens
        sequence, p = token // seqlen, token % seqlen
        p = seqlen - 1 - p if REVERSE else p
        acc_LD = tl.zeros((BLOCK_L, BLOCK_D), ACC)
        if bias_ptr is not None:
            acc_LD += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(ACC)[None, :]
        row = tl.where(in_L, token, -1)
        for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
            w_D = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=in_d, other=0.0).to(ACC)
            x_LD = load_rows(x_ptr, initial_state_ptr, row, d, in_d, tokens, x_stride, dim, HAS_STATE, ACC)
            acc_LD += w_D[None, :] * x_LD
            if prev_ptr is not None:
                row = row_before(row, prev_ptr, tokens, WIDTH, HAS_STATE)
            else:
                row = row_at(p - k - 1, sequence, tokens, seqlen, WIDTH, HAS_STATE, REVERSE)
                row = tl.where(in_L, row, -1)
        if SILU:
            acc_LD = silu(acc_LD)
        if prev_ptr is not None:
            pad = tl.load(prev_ptr + token, mask=in_L, other=CUT) == SKIPPED
            acc_LD = tl.where(pad[:, None], 0.0, acc_LD)
        tl.store(at(y_ptr, token, dim, d), rounded(acc_LD, y_ptr), mask=in_L[:, None] & in_d[None, :])
    else:
        # Entry i of a final state lies width-1-i steps before the end of its sequence.
        entry = (block - y_programs) * BLOCK_L + tl.arange(0, BLOCK_L)
        in_L = entry < nseq * (WIDTH - 1)
        sequence, steps = entry // (WIDTH - 1), WIDTH - 1 - entry % (WIDTH - 1)
        if prev_ptr is not None:
            row = tl.load(prev_ptr + tokens + sequence, mask=in_L, other=-1)
            for k in range(1, WIDTH - 1):
                row = tl.where(k < steps, row_before(row, prev_ptr, tokens, WIDTH, HAS_STATE), row)
        else:
            row = tl.where(in_L, row_at(seqlen - steps, sequence, tokens, seqlen, WIDTH, HAS_STATE, REVERSE), -1)
        x_LD = load_rows(x_ptr, initial_state_ptr, row, d, in_d, tokens, x_stride, dim, HAS_STATE, ACC)
        tl.store(at(final_state_ptr, entry, dim, d), rounded(x_LD, final_state_ptr), mask=in_L[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["tokens", "seqlen", "rows", "tiles"])
def causal_conv1d_bwd_kernel(
    dy_ptr, dfinal_state_ptr, x_ptr, weight_ptr, bias_ptr, initial_state_ptr, prev_ptr, next_ptr,
    dx_ptr, dinitial_state_ptr, parts_ptr,
    tokens, seqlen, rows, tiles, dim, x_stride, dy_stride,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program makes `tiles` times BLOCK_L rows of dx (or of dinitial_state) and its part of dweight and dbias.

    With g the gradient before the activation: dx_l = sum_k weight[:, width-1-k] g_{next^k(l)}, where the end of the
    sequence in place of a token hands down its dfinal_state. g is recomputed wherever it is needed.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    HAS_STATE: tl.constexpr = initial_state_ptr is not None
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    taps = tl.arange(0, BLOCK_W)
    dparameter_WD = tl.zeros((BLOCK_W, BLOCK_D), ACC)

    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        is_token = row < tokens
        entry = row - tokens
        if prev_ptr is None:
            sequence, p = row // seqlen, row % seqlen
            p = seqlen - 1 - p if REVERSE else p
        else:
            sequence, p = entry * 0, entry * 0
        wait = entry * 0  # steps from an entry of the initial state to the first token
        if HAS_STATE:
            sequence = tl.where(is_token, sequence, entry // (WIDTH - 1))
            wait = tl.where(is_token, 0, WIDTH - 1 - entry % (WIDTH - 1))
            p = tl.where(is_token, p, -wait)
        first = entry * 0 - 1
        if HAS_STATE and next_ptr is not None:
            is_entry = (row >= tokens) & (row < rows)
            first = tl.load(next_ptr + tokens + sequence, mask=is_entry, other=-1)

        ahead = tl.where(is_token, row, -1)
        g_LD = before_activation(
            ahead, p, sequence, dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_state_ptr, prev_ptr, d, in_d,
            tokens, seqlen, dim, x_stride, dy_stride, WIDTH, HAS_STATE, REVERSE, SILU, UNROLL, ACC,
        )  # fmt: skip
        back = ahead
        for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
            x_LD = load_rows(x_ptr, initial_state_ptr, back, d, in_d, tokens, x_stride, dim, HAS_STATE, ACC)
            dw_D = tl.sum(g_LD * x_LD, axis=0)
            dparameter_WD += tl.where((taps == WIDTH - 1 - k)[:, None], dw_D[None, :], 0.0)
            if prev_ptr is not None:
                back = row_before(back, prev_ptr, tokens, WIDTH, HAS_STATE)
            else:
                back = row_at(p - k - 1, sequence, tokens, seqlen, WIDTH, HAS_STATE, REVERSE)
                back = tl.where(is_token, back, -1)
        dparameter_WD += tl.where((taps == WIDTH)[:, None], tl.sum(g_LD, axis=0)[None, :], 0.0)

        w_D = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1), mask=in_d, other=0.0).to(ACC)
        dx_LD = w_D[None, :] * g_LD
        for k in range(1, WIDTH):
            if next_ptr is not None:
                ahead = tl.load(next_ptr + ahead, mask=(ahead >= 0) & (ahead < tokens), other=-1)
                ahead = tl.where(wait == k, first, ahead)
            else:
                ahead = row_at(p + k, sequence, tokens, seqlen, WIDTH, False, REVERSE)
                ahead = tl.where(p + k < seqlen, ahead, tl.where(p + k == seqlen, tokens + sequence, -1))
            ahead = tl.where(row < rows, ahead, -1)
            g_LD = before_activation(
                ahead, p + k, sequence, dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_state_ptr, prev_ptr, d, in_d,
                tokens, seqlen, dim, x_stride, dy_stride, WIDTH, HAS_STATE, REVERSE, SILU, UNROLL, ACC,
            )  # fmt: skip
            w_D = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=in_d, other=0.0).to(ACC)
            dx_LD += w_D[None, :] * g_LD
            if dfinal_state_ptr is not None:
                slot = (ahead - tokens) * (WIDTH - 1) + WIDTH - 1 - k
                at_end = (ahead >= tokens)[:, None] & in_d[None, :]
                dx_LD += tl.load(at(dfinal_state_ptr, slot, dim, d), mask=at_end, other=0.0).to(ACC)

        tl.store(at(dx_ptr, row, dim, d), rounded(dx_LD, dx_ptr), mask=is_token[:, None] & in_d[None, :])
        if HAS_STATE:
            is_entry = ((row >= tokens) & (row < rows))[:, None] & in_d[None, :]
            tl.store(at(dinitial_state_ptr, entry, dim, d), rounded(dx_LD, dinitial_state_ptr), mask=is_entry)

    part = tl.program_id(0) * (WIDTH + 1) + taps
    tl.store(at(parts_ptr, part, dim, d), dparameter_WD, mask=(taps <= WIDTH)[:, None] & in_d[None, :])


@triton.jit
def before_activation(
    row, p, sequence, dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_state_ptr, prev_ptr, d, in_d,
    tokens, seqlen, dim, x_stride, dy_stride,
    WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation at token rows (at positions p of plain walks); zero at all other rows and pads."""
    is_token = (row >= 0) & (row < tokens)
    if prev_ptr is not None:
        is_token &= tl.load(prev_ptr + row, mask=is_token, other=SKIPPED) != SKIPPED
    in_LD = is_token[:, None] & in_d[None, :]
    g_LD = tl.load(at(dy_ptr, row, dy_stride, d), mask=in_LD, other=0.0).to(ACC)
    if SILU:
        v_LD = tl.zeros_like(g_LD)
        if bias_ptr is not None:
            v_LD += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(ACC)[None, :]
        back = tl.where(is_token, row, -1)
        for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
            w_D = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=in_d, other=0.0).to(ACC)
            v_LD += w_D[None, :] * load_rows(
                x_ptr, initial_state_ptr, back, d, in_d, tokens, x_stride, dim, HAS_STATE, ACC
            )
            if prev_ptr is not None:
                back = row_before(back, prev_ptr, tokens, WIDTH, HAS_STATE)
            else:
                back = row_at(p - k - 1, sequence, tokens, seqlen, WIDTH, HAS_STATE, REVERSE)
                back = tl.where(is_token, back, -1)
        g_LD *= silu_grad(v_LD)
    return g_LD


# Programs per 64 channels before a program of the backward takes more rows; its part of dweight is memory traffic.
PROGRAMS = 256


class Plan:
    """Sizes, tiles and link tables of a call."""

    def __init__(
        self, x: Tensor, weight: Tensor, initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None,
        cu_seqlens: Tensor | None, reverse: bool,
    ) -> None:  # fmt: skip
        batch, self.seqlen, self.dim = x.shape
        self.width, self.tokens = weight.shape[1], batch * self.seqlen
        self.nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.entries = self.nseq * (self.width - 1)
        self.state = None if initial_state is None or initial_state.numel() == 0 else initial_state
        self.prev = self.next = None
        # Kernels number rows in 32 bits, with some to spare for the last tile.
        if self.tokens + max(self.entries, self.nseq) >= 2**31 - 2048:
            raise ValueError(f"x must have fewer than 2**31 tokens in all, got {tuple(x.shape)}; split the batch")
        if x.numel() > 0 and not (order is None and flags is None and cu_seqlens is None):
            self.link(x.device, order, flags, cu_seqlens, reverse)
        unroll = self.width if self.width <= 4 else 2
        self.constants = {"WIDTH": self.width, "REVERSE": reverse, "UNROLL": unroll}

    def link(
        self, device: torch.device, order: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
    ) -> None:
        """Make the tables `prev` and `next`."""
        self.prev, self.next = torch.full((2, self.tokens + self.nseq), CUT.value, dtype=torch.int32, device=device)
        with on_device_of(self.prev):
            causal_conv1d_link_kernel[(self.nseq,)](
                order, flags, cu_seqlens, self.prev, self.next, self.tokens, self.seqlen,
                WIDTH=self.width, HAS_STATE=self.state is not None, REVERSE=reverse, BLOCK=1024, num_warps=4,
            )  # fmt: skip

    def tile(self, rows: int, num_warps: int) -> dict[str, int]:
        """`rows` tokens of a 128-byte line of half precision; where they are interpreted, more of them at a time."""
        block_l = triton.next_power_of_2(max(rows, min(self.tokens, 1024))) if interpreted() else rows
        return {"BLOCK_L": block_l, "BLOCK_D": 64, "num_warps": num_warps}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, final_state)."""
    plan = Plan(x, weight, initial_state, order, flags, cu_seqlens, reverse)
    y = x.new_empty(x.shape)
    final_state = x.new_empty(plan.nseq, plan.width - 1, plan.dim)
    if y.numel() == 0:
        return y, final_state.zero_() if plan.state is None else final_state.copy_(plan.state)
    tile = plan.tile(16, num_warps=4)
    programs = sum(triton.cdiv(rows, tile["BLOCK_L"]) for rows in (plan.tokens, plan.entries))
    with on_device_of(x):
        causal_conv1d_fwd_kernel[(programs, triton.cdiv(plan.dim, tile["BLOCK_D"]))](
            x, weight, bias, plan.state, plan.prev, y, final_state,
            plan.tokens, plan.seqlen, plan.nseq, plan.dim, row_stride(x), SILU=silu,
            **plan.constants, **tile, **register_limit(128),
        )  # fmt: skip
    return y, final_state


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dweight, dbias, dinitial_state)."""
    plan = Plan(x, weight, initial_state, order, flags, cu_seqlens, reverse)
    acc = acc_dtype(x.dtype)
    dx = x.new_empty(x.shape)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    if dx.numel() == 0:
        dparameter = x.new_zeros(plan.width + 1, plan.dim, dtype=acc)
        if dinitial_state is not None:
            dinitial_state.zero_() if dfinal_state is None else dinitial_state.copy_(dfinal_state)
    else:
        rows = plan.tokens + (0 if plan.state is None else plan.entries)
        tile = plan.tile(8, num_warps=4)
        tiles = max(1, min(16, rows // (PROGRAMS * tile["BLOCK_L"])))
        programs = triton.cdiv(rows, tile["BLOCK_L"] * tiles)
        parts = x.new_empty(programs, plan.width + 1, plan.dim, dtype=acc)
        with on_device_of(x):
            causal_conv1d_bwd_kernel[(programs, triton.cdiv(plan.dim, tile["BLOCK_D"]))](
                dy, dfinal_state, x, weight, bias, plan.state, plan.prev, plan.next, dx, dinitial_state, parts,
                plan.tokens, plan.seqlen, rows, tiles, plan.dim, row_stride(x), row_stride(dy),
                SILU=silu, BLOCK_W=triton.next_power_of_2(plan.width + 1), **plan.constants, **tile, **register_limit(168),
            )  # fmt: skip
        dparameter = sum_parts(parts, acc)
    dbias = None if bias is None else dparameter[plan.width].clone()
    return dx, dparameter[: plan.width].t().contiguous(), dbias, dinitial_state


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward at every usual width, of plain and of linked walks, with and without states."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def call(dtype: torch.dtype, width: int, linked: bool, stateful: bool, reverse: bool) -> None:
        x, flags = tensor(2, 16384, 1536, dtype=dtype), tensor(2, 16384, dtype=torch.uint8) if linked else None
        weight, bias = tensor(1536, width, dtype=torch.float32), tensor(1536, dtype=torch.float32)
        state = tensor(2, width - 1, 1536, dtype=dtype) if stateful else None
        walk = (None, flags, None, reverse, True)
        forward(x, weight, bias, state, *walk)
        backward(x, state, x, weight, bias, state, *walk)

    kinds = {
        "plain": (False, False, False),
        "reverse, state": (False, True, True),
        "linked, state": (True, True, False),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for width, names in ((4, kinds), (3, ("linked, state",)), (2, ("plain",)), (7, ("linked, state",))):
            for name in names:
                label = f"width {width}, {name}, {str(dtype).removeprefix('torch.')}"
                yield label, partial(call, dtype, width, *kinds[name])
