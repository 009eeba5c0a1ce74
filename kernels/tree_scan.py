"""Triton kernels of tree_scan.

    xi_v = b_v + sum over children c of v:  a_c xi_c                  leaves to root (1)
    h_root = xi_root,  h_v = xi_v + a_v (h_parent - a_v xi_v)         root to leaves (2)

One program walks one tree for BLOCK_D channels, a run of positions at a time of which none is another's parent, ROWS of
them together; a barrier ends each run. What is computed on the way lies by position, where children are neighbours.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GRID_YZ, acc_dtype, interpreted, on_device_of, row_stride
from .math import rounded


@triton.jit
def tables_of(order_ptr, parent_ptr, child_ptr, tree_stride):
    """The tables of this program's tree: rows of order and parent, tree_stride apart, those of child one longer."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tree_stride
    return (order_ptr + at, parent_ptr + at, child_ptr + tl.where(tree_stride == 0, 0, at + sample))


@triton.jit
def run_below(parent_ptr, hi):
    """Where the longest run of positions up to `hi` begins of which none is the parent of another."""
    return tl.where(hi > 1, tl.load(parent_ptr + hi - 1) + 1, 0)


@triton.jit
def at_tokens(base_ptr, order_ptr, p, in_p, stride, d):
    """Addresses of the channels of the tokens at positions p."""
    token = tl.load(order_ptr + p, mask=in_p, other=0).to(tl.int64)
    return base_ptr + token[:, None] * stride + d[None, :]


@triton.jit
def sweep_up(
    own_ptr, own_stride, a_ptr, a_stride, order_ptr, parent_ptr, child_ptr, state_ptr, out_ptr, d, seqlen, dim,
    ROWS: tl.constexpr,
):  # fmt: skip
    """state[p] = own + sum of a state[c] over the children c of p (1); also to `out`, by token, where that is given.

    own, a, out: rows of one sample, by token      state: (seqlen, dim) of one sample, by position
    """
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    in_d = d < dim
    hi = seqlen
    while hi > 0:
        lo = run_below(parent_ptr, hi)
        for start in range(lo, hi, ROWS):
            p = start + tl.arange(0, ROWS)
            in_p = p < hi
            first = tl.load(child_ptr + p, mask=in_p, other=0)
            last = tl.load(child_ptr + p + 1, mask=in_p, other=0)
            keep = in_p[:, None] & in_d[None, :]
            x_PD = tl.load(at_tokens(own_ptr, order_ptr, p, in_p, own_stride, d), mask=keep, other=0.0).to(ACC)
            for j in range(tl.max(last - first, 0)):
                c = first + j
                has = c < last
                inside = has[:, None] & in_d[None, :]
                a_PD = tl.load(at_tokens(a_ptr, order_ptr, c, has, a_stride, d), mask=inside, other=0.0).to(ACC)
                xi_PD = tl.load(state_ptr + c.to(tl.int64)[:, None] * dim + d[None, :], mask=inside, other=0.0)
                x_PD += a_PD * xi_PD
            tl.store(state_ptr + p.to(tl.int64)[:, None] * dim + d[None, :], x_PD, mask=keep)
            if out_ptr is not None:
                tl.store(at_tokens(out_ptr, order_ptr, p, in_p, dim, d), rounded(x_PD, out_ptr), mask=keep)
        tl.debug_barrier()
        hi = lo


@triton.jit(do_not_specialize=["seqlen"])
def tree_scan_fwd_kernel(
    a_ptr, b_ptr, order_ptr, parent_ptr, child_ptr, xi_ptr, work_ptr, h_ptr, seqlen, dim, a_stride, b_stride, tree_stride,
    BOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h of one tree for BLOCK_D channels. xi (batch, seqlen, dim), and in `work`, which may be xi itself, h by position."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    order_ptr, parent_ptr, child_ptr = tables_of(order_ptr, parent_ptr, child_ptr, tree_stride)
    row = tl.program_id(0).to(tl.int64) * seqlen
    a_ptr += row * a_stride
    xi_ptr += row * dim
    h_ptr += row * dim
    sweep_up(
        b_ptr + row * b_stride, b_stride, a_ptr, a_stride, order_ptr, parent_ptr, child_ptr, xi_ptr,
        None if BOTH else h_ptr, d, seqlen, dim, ROWS,
    )  # fmt: skip

    if BOTH:
        work_ptr += row * dim
        ACC: tl.constexpr = xi_ptr.dtype.element_ty
        lo = seqlen * 0
        while lo < seqlen:
            hi = tl.load(child_ptr + lo)
            for start in range(lo, hi, ROWS):
                p = start + tl.arange(0, ROWS)
                in_p = p < hi
                keep = in_p[:, None] & in_d[None, :]
                below = keep & (p > 0)[:, None]
                above = tl.load(parent_ptr + p, mask=in_p, other=0).to(tl.int64)
                own = p.to(tl.int64)[:, None] * dim + d[None, :]

                a_PD = tl.load(at_tokens(a_ptr, order_ptr, p, in_p, a_stride, d), mask=below, other=0.0).to(ACC)
                xi_PD = tl.load(xi_ptr + own, mask=keep, other=0.0)
                above_PD = tl.load(work_ptr + above[:, None] * dim + d[None, :], mask=below, other=0.0)
                h_PD = xi_PD + a_PD * (above_PD - a_PD * xi_PD)  # (2)

                tl.store(work_ptr + own, h_PD, mask=keep)
                tl.store(at_tokens(h_ptr, order_ptr, p, in_p, dim, d), rounded(h_PD, h_ptr), mask=keep)
            tl.debug_barrier()
            lo = hi


@triton.jit(do_not_specialize=["seqlen"])
def tree_scan_bwd_kernel(
    dh_ptr, a_ptr, xi_ptr, order_ptr, parent_ptr, child_ptr, dwork_ptr, work_ptr, da_ptr, db_ptr,
    seqlen, dim, dh_stride, a_stride, tree_stride, BOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """da and db of one tree for BLOCK_D channels; work and dwork (batch, seqlen, dim) by position.

    With BOTH db is (1) and (2) on dh, gxi being its first sweep, and h is computed again on the way down:
        da_v = gxi_v (h_parent - a_v xi_v) + xi_v (db_parent - a_v gxi_v)
    Else db_v = dh_v + a_v db_parent and da_v = db_parent xi_v.
    """
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    ACC: tl.constexpr = xi_ptr.dtype.element_ty
    order_ptr, parent_ptr, child_ptr = tables_of(order_ptr, parent_ptr, child_ptr, tree_stride)
    row = tl.program_id(0).to(tl.int64) * seqlen
    dh_ptr += row * dh_stride
    a_ptr += row * a_stride
    xi_ptr += row * dim
    dwork_ptr += row * dim
    da_ptr += row * dim
    db_ptr += row * dim
    if BOTH:
        work_ptr += row * dim
        sweep_up(
            dh_ptr, dh_stride, a_ptr, a_stride, order_ptr, parent_ptr, child_ptr, dwork_ptr, None, d, seqlen, dim, ROWS
        )

    lo = seqlen * 0
    while lo < seqlen:
        hi = tl.load(child_ptr + lo)
        for start in range(lo, hi, ROWS):
            p = start + tl.arange(0, ROWS)
            in_p = p < hi
            keep = in_p[:, None] & in_d[None, :]
            below = keep & (p > 0)[:, None]
            above = tl.load(parent_ptr + p, mask=in_p, other=0).to(tl.int64)[:, None] * dim + d[None, :]
            own = p.to(tl.int64)[:, None] * dim + d[None, :]

            a_PD = tl.load(at_tokens(a_ptr, order_ptr, p, in_p, a_stride, d), mask=below, other=0.0).to(ACC)
            xi_PD = tl.load(xi_ptr + own, mask=keep, other=0.0)
            dabove_PD = tl.load(dwork_ptr + above, mask=below, other=0.0)
            if BOTH:
                g_PD = tl.load(dwork_ptr + own, mask=keep, other=0.0)
                outside_PD = tl.load(work_ptr + above, mask=below, other=0.0) - a_PD * xi_PD
                doutside_PD = dabove_PD - a_PD * g_PD
                da_PD = tl.where(below, g_PD * outside_PD + xi_PD * doutside_PD, 0.0)
                db_PD = g_PD + a_PD * doutside_PD
                tl.store(work_ptr + own, xi_PD + a_PD * outside_PD, mask=keep)
            else:
                dh_PD = tl.load(at_tokens(dh_ptr, order_ptr, p, in_p, dh_stride, d), mask=keep, other=0.0).to(ACC)
                da_PD = dabove_PD * xi_PD
                db_PD = dh_PD + a_PD * dabove_PD

            tl.store(dwork_ptr + own, db_PD, mask=keep)
            tl.store(at_tokens(da_ptr, order_ptr, p, in_p, dim, d), rounded(da_PD, da_ptr), mask=keep)
            tl.store(at_tokens(db_ptr, order_ptr, p, in_p, dim, d), rounded(db_PD, db_ptr), mask=keep)
        tl.debug_barrier()
        lo = hi


def first_children(parent: Tensor) -> Tensor:
    """(trees, seqlen + 1): how many positions lie before the children of each; those of p are child[p]..child[p + 1]."""
    trees, seqlen = parent.shape
    positions = torch.arange(seqlen + 1, dtype=torch.int32, device=parent.device).expand(trees, -1).contiguous()
    return torch.searchsorted(parent[:, 1:].contiguous(), positions, out_int32=True) + 1


class Plan:
    """Sizes, tiles, grid and tables of one call."""

    def __init__(self, rows: Tensor, order: Tensor, parent: Tensor) -> None:
        batch, self.seqlen, self.dim = rows.shape
        if interpreted():
            block, tile = min(1 << 12, triton.next_power_of_2(max(1, self.dim))), 32
        else:
            # few positions stand in a run, and the fewer channels a program has, the more programs there are
            block, tile = 32, 32
        block = max(block, triton.next_power_of_2(triton.cdiv(self.dim, MAX_GRID_YZ)))
        self.grid = (batch, triton.cdiv(self.dim, block))
        self.empty = rows.numel() == 0
        self.tables = (order, parent, None if self.empty else first_children(parent))
        self.tree_stride = 0 if order.shape[0] == 1 else self.seqlen
        self.acc = acc_dtype(rows.dtype)
        # no stages: a load must not be moved before the barrier that it waits for
        self.constants = {"ROWS": tile, "BLOCK_D": block, "num_warps": 4, "num_stages": 1}


def forward(a: Tensor, b: Tensor, order: Tensor, parent: Tensor, both: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(h, xi). `xi` is the first sweep by position in the tree, for backward, where `save` is set, else empty."""
    plan = Plan(b, order, parent)
    h = b.new_empty(b.shape)
    xi = b.new_empty(b.shape, dtype=plan.acc)
    if not plan.empty:
        work = torch.empty_like(xi) if save and both else xi
        with on_device_of(b):
            tree_scan_fwd_kernel[plan.grid](
                a, b, *plan.tables, xi, work, h, plan.seqlen, plan.dim, row_stride(a), row_stride(b), plan.tree_stride,
                BOTH=both, **plan.constants,
            )  # fmt: skip
    return h, xi if save else xi.new_empty(0)


def backward(dh: Tensor, a: Tensor, xi: Tensor, order: Tensor, parent: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """(da, db)"""
    plan = Plan(dh, order, parent)
    da, db = a.new_empty(a.shape), dh.new_empty(dh.shape)
    if not plan.empty:
        dwork = torch.empty_like(xi)
        work = torch.empty_like(xi) if both else None
        with on_device_of(dh):
            tree_scan_bwd_kernel[plan.grid](
                dh, a, xi, *plan.tables, dwork, work, da, db,
                plan.seqlen, plan.dim, row_stride(dh), row_stride(a), plan.tree_stride, BOTH=both, **plan.constants,
            )  # fmt: skip
    return da, db


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each dtype, by both sweeps and by the first alone."""

    def call(dtype: torch.dtype, both: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        b, table = tensor(2, 64, 96, dtype=dtype), tensor(2, 64, dtype=torch.int32)
        h, xi = forward(b, b, table, table, both, True)
        backward(h, b, xi, table, table, both)

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for both in (True, False):
            label = f"{str(dtype).removeprefix('torch.')}, {'both sweeps' if both else 'up'}"
            yield label, partial(call, dtype, both)
