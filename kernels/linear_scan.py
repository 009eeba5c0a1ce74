"""Triton kernels of linear_scan.

    h_l = a_l h_{l-1} + b_l

One program walks one segment of one sequence for BLOCK_D channels: it loads ROWS tokens at once and chains them in
registers, one multiply-add per token in the order of the walk. Where batch x channels cannot fill the device, every
sequence is cut into `nsplits` segments: the carry kernel reduces each to a map h -> P h + E, and each program of the
main kernel first chains the maps of the segments before its own.

A number is a tuple: (re,) or (re, im). Complex tensors come as their real view, re and im interleaved.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GRID_YZ, interpreted, multiprocessors, on_device_of, row_stride, sum_parts
from .math import rounded

RESTART, PAD = tl.constexpr(1), tl.constexpr(2)  # bits of `flags`


@triton.jit
def multiply(x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0])
    else:
        return (x[0] * y[0],)


@triton.jit
def add(x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (x[0] + y[0], x[1] + y[1])
    else:
        return (x[0] + y[0],)


@triton.jit
def conj(x, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (x[0], -x[1])
    else:
        return x


@triton.jit
def where(condition, x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1]))
    else:
        return (tl.where(condition, x[0], y[0]),)


@triton.jit
def constant(value: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.full((BLOCK_D,), value, ACC), tl.full((BLOCK_D,), 0.0, ACC))
    else:
        return (tl.full((BLOCK_D,), value, ACC),)


@triton.jit
def load(ptr, keep, ACC: tl.constexpr, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr):
    """BLOCK_D numbers; zero where `keep` is false."""
    x = tl.load(ptr, mask=keep, other=0.0).to(ACC)
    if COMPLEX:
        re, im = tl.split(tl.reshape(x, (BLOCK_D, 2)))
        return (re, im)
    else:
        return (x,)


@triton.jit
def store(ptr, x, keep, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr, tl.reshape(tl.join(x[0], x[1]), (2 * BLOCK_D,)), mask=keep)
    else:
        tl.store(ptr, rounded(x[0], ptr), mask=keep)


@triton.jit
def columns(dim, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr):
    """Reals in a row, the offsets of this program's channels in it, and which of them exist."""
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    c = tl.program_id(1) * (PARTS * BLOCK_D) + tl.arange(0, PARTS * BLOCK_D)
    return (PARTS * dim, c, c < PARTS * dim)


@triton.jit
def segment(cu_seqlens_ptr, seqlen, nsplits, seg):
    """Sequence and split of this program, first row and length of the sequence, the positions lo <= p < hi to walk."""
    sequence = (tl.program_id(0) // nsplits).to(tl.int64)
    split = tl.program_id(0) % nsplits
    if cu_seqlens_ptr is None:
        first = sequence * seqlen
        length = first * 0 + seqlen
    else:
        first = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first
    lo = tl.minimum(split.to(tl.int64) * seg, length)
    return (sequence, split, first, length, lo, tl.minimum(lo + seg, length))


@triton.jit
def row_at(p, first, length, REVERSE: tl.constexpr):
    return first + (length - 1 - p if REVERSE else p)


@triton.jit
def flags_at(flags_ptr, row, inside):
    """(restart, pad) of a token; what lies beyond the segment counts as a pad."""
    if flags_ptr is None:
        return (inside & False, inside == 0)
    else:
        flag = tl.load(flags_ptr + row, mask=inside, other=PAD)
        return ((flag & RESTART) != 0, (flag & PAD) != 0)


@triton.jit
def chain_carries(
    h, products_ptr, ends_ptr, rows, lo, hi, in_c, width,
    BACKWARDS: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h -> P h + E for each segment lo <= j < hi of the sequence whose first carry lies in row `rows`."""
    for j in range(lo, hi, ROWS):
        products, ends = (), ()
        for i in tl.static_range(ROWS):
            at = (rows + (lo + hi - 1 - j - i if BACKWARDS else j + i)) * width
            products += (load(products_ptr + at, (j + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
            ends += (load(ends_ptr + at, (j + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
        for i in tl.static_range(ROWS):
            h = where(j + i < hi, add(multiply(products[i], h, COMPLEX), ends[i], COMPLEX), h, COMPLEX)
    return h


@triton.jit(do_not_specialize=["seqlen", "nsplits", "seg"])
def linear_scan_carry_kernel(
    a_ptr, b_ptr, flags_ptr, cu_seqlens_ptr, products_ptr, ends_ptr, seqlen, dim, a_stride, b_stride, nsplits, seg,
    ADJOINT: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One segment as the map h -> P h + E; with ADJOINT as that of the gradient, from its end to its start, b being dh.

    Rows of a lie a_stride apart (0: one row for all tokens); P and E are (nseq, nsplits, dim) in ACC.
    """
    width, c, in_c = columns(dim, BLOCK_D, COMPLEX)
    sequence, split, first, length, lo, hi = segment(cu_seqlens_ptr, seqlen, nsplits, seg)
    product = constant(1.0, BLOCK_D, ACC, COMPLEX)
    end = constant(0.0, BLOCK_D, ACC, COMPLEX)
    zero = constant(0.0, BLOCK_D, ACC, COMPLEX)

    for l in range(lo, hi, ROWS):
        a_rows, b_rows, flags = (), (), ()
        for i in tl.static_range(ROWS):
            row = row_at(lo + hi - 1 - l - i if ADJOINT else l + i, first, length, REVERSE)
            a_rows += (load(a_ptr + row * a_stride + c, (l + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
            b_rows += (load(b_ptr + row * b_stride + c, (l + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
            flags += (flags_at(flags_ptr, row, l + i < hi),)
        for i in tl.static_range(ROWS):
            restart, pad = flags[i]
            if ADJOINT:
                a = conj(a_rows[i], COMPLEX)
                end = add(end, b_rows[i], COMPLEX)
                end = where(pad, end, multiply(a, end, COMPLEX), COMPLEX)
                product = where(pad, product, multiply(a, product, COMPLEX), COMPLEX)
            if flags_ptr is not None:
                end = where(restart, zero, end, COMPLEX)
                product = where(restart, zero, product, COMPLEX)
            if not ADJOINT:
                end = where(pad, end, add(multiply(a_rows[i], end, COMPLEX), b_rows[i], COMPLEX), COMPLEX)
                product = where(pad, product, multiply(a_rows[i], product, COMPLEX), COMPLEX)

    at = (sequence * nsplits + split) * width + c
    store(products_ptr + at, product, in_c, BLOCK_D, COMPLEX)
    store(ends_ptr + at, end, in_c, BLOCK_D, COMPLEX)


@triton.jit(do_not_specialize=["seqlen", "nsplits", "seg"])
def linear_scan_fwd_kernel(
    a_ptr, b_ptr, initial_ptr, flags_ptr, cu_seqlens_ptr, products_ptr, ends_ptr, h_ptr, states_ptr, final_ptr,
    seqlen, dim, a_stride, b_stride, nsplits, seg,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h_l = a_l h_{l-1} + b_l along one segment; `states` is h in ACC where that is wanted too."""
    width, c, in_c = columns(dim, BLOCK_D, COMPLEX)
    sequence, split, first, length, lo, hi = segment(cu_seqlens_ptr, seqlen, nsplits, seg)
    zero = constant(0.0, BLOCK_D, ACC, COMPLEX)
    h = zero
    if initial_ptr is not None:
        h = load(initial_ptr + sequence * width + c, in_c, ACC, BLOCK_D, COMPLEX)
    if products_ptr is not None:
        h = chain_carries(
            h, products_ptr + c, ends_ptr + c, sequence * nsplits, 0, split, in_c, width,
            False, COMPLEX, ACC, ROWS, BLOCK_D,
        )  # fmt: skip

    for l in range(lo, hi, ROWS):
        a_rows, b_rows, flags = (), (), ()
        for i in tl.static_range(ROWS):
            row = row_at(l + i, first, length, REVERSE)
            a_rows += (load(a_ptr + row * a_stride + c, (l + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
            b_rows += (load(b_ptr + row * b_stride + c, (l + i < hi) & in_c, ACC, BLOCK_D, COMPLEX),)
            flags += (flags_at(flags_ptr, row, l + i < hi),)
        for i in tl.static_range(ROWS):
            restart, pad = flags[i]
            if flags_ptr is not None:
                h = where(restart, zero, h, COMPLEX)
            h = where(pad, h, add(multiply(a_rows[i], h, COMPLEX), b_rows[i], COMPLEX), COMPLEX)

            at = row_at(l + i, first, length, REVERSE) * width + c
            store(h_ptr + at, h, (l + i < hi) & in_c, BLOCK_D, COMPLEX)
            if states_ptr is not None:
                store(states_ptr + at, h, (l + i < hi) & in_c, BLOCK_D, COMPLEX)

    if split == nsplits - 1:
        store(final_ptr + sequence * width + c, h, in_c, BLOCK_D, COMPLEX)


@triton.jit(do_not_specialize=["seqlen", "nsplits", "seg"])
def linear_scan_bwd_kernel(
    dh_ptr, dfinal_ptr, a_ptr, h_ptr, initial_ptr, flags_ptr, cu_seqlens_ptr, products_ptr, ends_ptr,
    da_ptr, db_ptr, dinitial_ptr, seqlen, dim, dh_stride, a_stride, nsplits, seg,
    CONSTANT_A: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """db_l = dh_l + conj(a_{l+1}) db_{l+1} and da_l = db_l conj(h_{l-1}), from the end of one segment to its start.

    With CONSTANT_A da is the sum over the segment, (nseq, nsplits, dim) in ACC.
    """
    width, c, in_c = columns(dim, BLOCK_D, COMPLEX)
    sequence, split, first, length, lo, hi = segment(cu_seqlens_ptr, seqlen, nsplits, seg)
    zero = constant(0.0, BLOCK_D, ACC, COMPLEX)
    dh, initial, da_segment = zero, zero, zero
    if initial_ptr is not None:
        initial = load(initial_ptr + sequence * width + c, in_c, ACC, BLOCK_D, COMPLEX)
    if dfinal_ptr is not None:
        dh = load(dfinal_ptr + sequence * width + c, in_c, ACC, BLOCK_D, COMPLEX)
    if products_ptr is not None:
        dh = chain_carries(
            dh, products_ptr + c, ends_ptr + c, sequence * nsplits, split + 1, nsplits, in_c, width,
            True, COMPLEX, ACC, ROWS, BLOCK_D,
        )  # fmt: skip

    for l in range(lo, hi, ROWS):
        a_rows, dh_rows, h_rows, flags = (), (), (), ()
        for i in tl.static_range(ROWS):
            p = lo + hi - 1 - l - i
            row = row_at(p, first, length, REVERSE)
            before = row_at(p - 1, first, length, REVERSE)
            inside = l + i < hi
            a_rows += (load(a_ptr + row * a_stride + c, inside & in_c, ACC, BLOCK_D, COMPLEX),)
            dh_rows += (load(dh_ptr + row * dh_stride + c, inside & in_c, ACC, BLOCK_D, COMPLEX),)
            h_rows += (load(h_ptr + before * width + c, inside & (p > 0) & in_c, ACC, BLOCK_D, COMPLEX),)
            flags += (flags_at(flags_ptr, row, inside),)
        da_rows = zero
        for i in tl.static_range(ROWS):
            restart, pad = flags[i]
            p = lo + hi - 1 - l - i
            h = h_rows[i]
            if initial_ptr is not None:
                h = where(p == 0, initial, h, COMPLEX)

            dh = add(dh, dh_rows[i], COMPLEX)
            db = where(pad, zero, dh, COMPLEX)
            da = multiply(db, conj(h, COMPLEX), COMPLEX)
            dh = where(pad, dh, multiply(conj(a_rows[i], COMPLEX), dh, COMPLEX), COMPLEX)
            if flags_ptr is not None:
                da = where(restart, zero, da, COMPLEX)
                dh = where(restart, zero, dh, COMPLEX)

            at = row_at(p, first, length, REVERSE) * width + c
            store(db_ptr + at, db, (l + i < hi) & in_c, BLOCK_D, COMPLEX)
            if CONSTANT_A:
                da_rows = add(da_rows, da, COMPLEX)
            else:
                store(da_ptr + at, da, (l + i < hi) & in_c, BLOCK_D, COMPLEX)
        da_segment = add(da_segment, da_rows, COMPLEX)

    if CONSTANT_A:
        store(da_ptr + (sequence * nsplits + split) * width + c, da_segment, in_c, BLOCK_D, COMPLEX)
    if dinitial_ptr is not None:
        if split == 0:
            store(dinitial_ptr + sequence * width + c, dh, in_c, BLOCK_D, COMPLEX)


# A program holds 2 x ROWS rows of 256 bytes in flight, 8 KB (half of that at 16 bits). Bandwidth x latency of current
# devices asks for 20 to 40 KB per multiprocessor, which so many programs supply. More rows spill registers.
ROWS = {"cuda": 16, "hip": 4}
PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_SEGMENT = 128


@cache
def rows_at_once() -> int:
    """Tokens that a program loads together on the active GPU."""
    return ROWS[triton.runtime.driver.active.get_current_target().backend]


def split_length(programs: int, seqlen: int, processors: int) -> int:
    """Into how many segments to cut each sequence, when there are `programs` sequences x blocks of channels.

    Splitting moves five tensors in place of three, so the device has to be less than 3/5 full without it.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * processors
    if 5 * programs >= 3 * wanted:
        return 1
    return max(1, min(triton.cdiv(wanted, programs), seqlen // MIN_SEGMENT))


class Plan:
    """Sizes, tiles and grid of one call."""

    def __init__(self, b: Tensor, cu_seqlens: Tensor | None) -> None:
        batch, self.seqlen, self.dim = b.shape
        self.nseq = batch if cu_seqlens is None else len(cu_seqlens) - 1
        wide = b.dtype in (torch.float64, torch.complex128)
        real = torch.float64 if wide else torch.float32
        self.acc = real.to_complex() if b.is_complex() else real
        if interpreted():
            rows, block = 8, min(1 << 12, triton.next_power_of_2(max(1, self.dim)))
        else:
            rows, block = rows_at_once(), 32 if b.itemsize >= 8 else 64
        block = max(block, triton.next_power_of_2(triton.cdiv(self.dim, MAX_GRID_YZ)))
        blocks = max(1, triton.cdiv(self.dim, block))
        wanted = split_length(max(1, self.nseq) * blocks, self.seqlen, multiprocessors(b.device))
        self.seg = max(rows, triton.cdiv(triton.cdiv(self.seqlen, wanted), rows) * rows)
        self.nsplits = max(1, triton.cdiv(self.seqlen, self.seg))
        self.grid = (self.nseq * self.nsplits, blocks)
        self.sizes = (self.seqlen, self.dim)
        self.constants = {
            "COMPLEX": b.is_complex(), "ACC": tl.float64 if wide else tl.float32, "ROWS": rows, "BLOCK_D": block,
            "num_warps": 1,
        }  # fmt: skip

    def carries(
        self, a: Tensor, b: Tensor, flags: Tensor | None, cu_seqlens: Tensor | None, *, adjoint: bool, reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """P and E of every segment; None where sequences are not split."""
        if self.nsplits == 1:
            return None, None
        products, ends = (b.new_empty(self.nseq, self.nsplits, self.dim, dtype=self.acc) for _ in range(2))
        linear_scan_carry_kernel[self.grid](
            real(a), real(b), flags, cu_seqlens, real(products), real(ends),
            *self.sizes, reals_per_row(a), reals_per_row(b), self.nsplits, self.seg,
            ADJOINT=adjoint, REVERSE=reverse, **self.constants,
        )  # fmt: skip
        return real(products), real(ends)


def real(x: Tensor | None) -> Tensor | None:
    """Complex numbers as pairs of reals."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def reals_per_row(x: Tensor) -> int:
    """Reals from one token of flat rows to the next; 0 for one row that serves all tokens."""
    return 0 if x.ndim == 1 else row_stride(x) * (2 if x.is_complex() else 1)


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, final_state, states). `states` is h unrounded where backward needs it so and `save` is set, else empty."""
    plan = Plan(b, cu_seqlens)
    h = b.new_empty(b.shape)
    final_state = b.new_empty(plan.nseq, plan.dim, dtype=plan.acc)
    kept = save and a.ndim == 1 and b.dtype != plan.acc
    states = b.new_empty(b.shape if kept else (0,), dtype=plan.acc)
    if final_state.numel() > 0:
        with on_device_of(b):
            products, ends = plan.carries(a, b, flags, cu_seqlens, adjoint=False, reverse=reverse)
            linear_scan_fwd_kernel[plan.grid](
                real(a), real(b), real(initial_state), flags, cu_seqlens, products, ends,
                real(h), real(states) if kept else None, real(final_state),
                *plan.sizes, reals_per_row(a), reals_per_row(b), plan.nsplits, plan.seg, REVERSE=reverse, **plan.constants,
            )  # fmt: skip
    return h, final_state, states


def backward(
    dh: Tensor, dfinal_state: Tensor | None, a: Tensor, h: Tensor, initial_state: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(da, db, dinitial_state); h is the output of forward, or its `states` where these are not empty."""
    plan = Plan(dh, cu_seqlens)
    constant_a = a.ndim == 1
    da = a.new_empty((plan.nseq * plan.nsplits, plan.dim) if constant_a else dh.shape)
    db = dh.new_empty(dh.shape)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    if plan.nseq * plan.dim > 0:
        with on_device_of(dh):
            products, ends = plan.carries(a, dh, flags, cu_seqlens, adjoint=True, reverse=reverse)
            linear_scan_bwd_kernel[plan.grid](
                real(dh), real(dfinal_state), real(a), real(h), real(initial_state), flags, cu_seqlens,
                products, ends, real(da), real(db), real(dinitial_state),
                *plan.sizes, reals_per_row(dh), reals_per_row(a), plan.nsplits, plan.seg,
                CONSTANT_A=constant_a, REVERSE=reverse, **plan.constants,
            )  # fmt: skip
    if constant_a:
        parts = real(da)
        da = sum_parts(parts, parts.dtype)
        da = torch.view_as_complex(da) if a.is_complex() else da
    return da, db, dinitial_state


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each dtype: a per token, plain and with all options; a constant, split, with all options."""

    def call(dtype: torch.dtype, constant_a: bool, seqlen: int, full: bool) -> None:
        tensor, dim = partial(torch.empty, device="meta"), 32
        b = tensor(1, seqlen, dim, dtype=dtype)
        plan = Plan(b, None)
        a = tensor(dim, dtype=plan.acc) if constant_a else b
        state = tensor(1, dim, dtype=plan.acc) if full else None
        flags = tensor(1, seqlen, dtype=torch.uint8) if full else None
        h, _, states = forward(a, b, state, flags, None, full, True)
        backward(h, state, a, states if states.numel() else h, state, flags, None, full)

    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for constant_a, seqlen, full in ((False, 64, False), (False, 64, True), (True, 65536, True)):
            label = (
                f"{str(dtype).removeprefix('torch.')}, a {'constant' if constant_a else 'per token'}, "
                f"{seqlen} tokens{', states, flags, reverse' if full else ''}"
            )
            yield label, partial(call, dtype, constant_a, seqlen, full)
