"""Triton kernels of minimum_spanning_tree: Boruvka's rounds, then a breadth-first walk, one program for each row.

Edges come sorted by weight, equal ones by index, so that an edge is known by its rank and no two ranks are equal. In each
round every part of the tokens takes its least edge to another part, and the parts so joined become one. Minima are atomic,
on integers, whose minimum does not depend on the order. Nothing waits for the host.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, on_device_of

NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["seqlen", "nedges"])
def spanning_tree_kernel(
    ends_ptr, part_ptr, least_ptr, joined_ptr, taken_ptr, seqlen, nedges, BLOCK: tl.constexpr
):  # fmt: skip
    """taken[e] = 1 for the edges of the tree, by rank.

    ends (batch, nedges, 2)   part, least, joined (batch, seqlen): the lowest token of each token's part, the least edge
    of each part, the part that it joins     taken (batch, nedges), given as 0     all int32
    """
    row = tl.program_id(0).to(tl.int64)
    ends_ptr += row * nedges * 2
    taken_ptr += row * nedges
    part_ptr += row * seqlen
    least_ptr += row * seqlen
    joined_ptr += row * seqlen
    lane = tl.arange(0, BLOCK)
    for start in range(0, seqlen, BLOCK):
        v = start + lane
        tl.store(part_ptr + v, v, mask=v < seqlen)
    tl.debug_barrier()

    joins = seqlen
    while joins > 0:
        for start in range(0, seqlen, BLOCK):
            tl.store(least_ptr + start + lane, NONE, mask=start + lane < seqlen)
        tl.debug_barrier()
        for start in range(0, nedges, BLOCK):
            e = start + lane
            p = tl.load(part_ptr + tl.load(ends_ptr + 2 * e, mask=e < nedges, other=0))
            q = tl.load(part_ptr + tl.load(ends_ptr + 2 * e + 1, mask=e < nedges, other=0))
            crosses = (e < nedges) & (p != q)
            tl.atomic_min(least_ptr + p, e, mask=crosses)
            tl.atomic_min(least_ptr + q, e, mask=crosses)
        tl.debug_barrier()

        # the part at the other end of a part's least edge; of two that take the same edge the lower one leads
        joins = 0
        for start in range(0, seqlen, BLOCK):
            v = start + lane
            e = tl.load(least_ptr + v, mask=v < seqlen, other=NONE)
            found = e != NONE
            p = tl.load(part_ptr + tl.load(ends_ptr + 2 * e.to(tl.int64), mask=found, other=0))
            q = tl.load(part_ptr + tl.load(ends_ptr + 2 * e.to(tl.int64) + 1, mask=found, other=0))
            other = tl.where(p == v, q, p)
            mutual = found & (tl.load(least_ptr + other, mask=found, other=NONE) == e)
            joined = tl.where(found & ((other < v) | (mutual == 0)), other, v)
            tl.store(joined_ptr + v, joined, mask=v < seqlen)
            tl.store(taken_ptr + e, 1, mask=found)
            joins += tl.sum(found.to(tl.int32), 0)
        tl.debug_barrier()

        # follow the joins to their ends
        moved = joins
        while moved > 0:
            moved = 0
            for start in range(0, seqlen, BLOCK):
                v = start + lane
                once = tl.load(joined_ptr + v, mask=v < seqlen, other=0)
                twice = tl.load(joined_ptr + once)
                tl.store(joined_ptr + v, twice, mask=v < seqlen)
                moved += tl.sum(((v < seqlen) & (once != twice)).to(tl.int32), 0)
            tl.debug_barrier()
        for start in range(0, seqlen, BLOCK):
            v = start + lane
            p = tl.load(part_ptr + v, mask=v < seqlen, other=0)
            tl.store(part_ptr + v, tl.load(joined_ptr + p), mask=v < seqlen)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["seqlen", "root"])
def breadth_first_kernel(first_ptr, near_ptr, order_ptr, parent_ptr, seqlen, root, BLOCK: tl.constexpr):
    """order and parent (batch, seqlen) of the trees whose tokens v have the neighbours near[first[v]..first[v + 1]].

    first (batch, seqlen + 1)    near (batch, 2 (seqlen - 1))    int32
    """
    row = tl.program_id(0).to(tl.int64)
    first_ptr += row * (seqlen + 1)
    near_ptr += row * 2 * (seqlen - 1)
    order_ptr += row * seqlen
    parent_ptr += row * seqlen
    tl.store(order_ptr, root)
    tl.store(parent_ptr, 0)
    tl.debug_barrier()
    lo, hi = seqlen * 0, seqlen * 0 + 1
    while lo < hi:
        end = hi
        for start in range(lo, hi, BLOCK):
            p = start + tl.arange(0, BLOCK)
            in_p = p < hi
            token = tl.load(order_ptr + p, mask=in_p, other=0)
            above = tl.load(order_ptr + tl.load(parent_ptr + p, mask=in_p, other=0))
            above = tl.where(p > 0, above, -1)
            first = tl.load(first_ptr + token, mask=in_p, other=0)
            degree = tl.where(in_p, tl.load(first_ptr + token + 1) - first, 0)
            children = tl.where(in_p & (p > 0), degree - 1, degree)
            place = end + tl.cumsum(children, 0) - children
            for j in range(tl.max(degree, 0)):
                near = tl.load(near_ptr + first + j, mask=j < degree, other=-1)
                child = (j < degree) & (near != above) & (place < seqlen)
                tl.store(order_ptr + place, near, mask=child)
                tl.store(parent_ptr + place, p, mask=child)
                place += child.to(tl.int32)
            end += tl.sum(children, 0)
        tl.debug_barrier()
        lo = hi
        # no further than the tables, even if edges that join no tree came unchecked
        hi = tl.minimum(end, seqlen)


def neighbours(taken: Tensor, ends: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """(first, near): the neighbours of every token in the tree, in ascending order, one list of them for each row."""
    batch = taken.shape[0]
    chosen = torch.argsort(taken, dim=1, descending=True, stable=True)[:, : seqlen - 1]
    pairs = ends.long().gather(1, chosen[..., None].expand(-1, -1, 2))
    arcs = torch.cat([pairs, pairs.flip(2)], dim=1)
    arcs = (arcs[..., 0] * seqlen + arcs[..., 1]).sort(dim=1).values
    starts = (torch.arange(seqlen + 1, device=taken.device) * seqlen).expand(batch, -1).contiguous()
    return torch.searchsorted(arcs, starts, out_int32=True), (arcs % seqlen).to(torch.int32)


def forward(weights: Tensor, edges: Tensor, seqlen: int, root: int) -> tuple[int, Tensor, Tensor]:
    """(1, order, parent): that the edges join all tokens was checked before."""
    batch, nedges = weights.shape
    order, parent = (torch.zeros(batch, seqlen, dtype=torch.int32, device=weights.device) for _ in range(2))
    if order.numel() == 0:
        return 1, order, parent
    # -0 and 0 are equal, and a NaN is greater than any number whatever its sign
    weights = torch.where(weights.isnan(), torch.nan, weights + 0.0)
    ends = edges[torch.sort(weights, dim=1, stable=True).indices]
    taken = torch.zeros(batch, nedges, dtype=torch.int32, device=weights.device)
    tables = (torch.empty_like(order) for _ in range(3))
    block = 1024
    with on_device_of(weights):
        spanning_tree_kernel[(batch,)](
            ends, *tables, taken, seqlen, nedges, BLOCK=block, num_warps=8, num_stages=1
        )  # fmt: skip
        breadth_first_kernel[(batch,)](
            *neighbours(taken, ends, seqlen), order, parent, seqlen, root,
            BLOCK=block if interpreted() else 64, num_warps=2, num_stages=1,
        )  # fmt: skip
    return 1, order, parent


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """The two kernels know nothing of the dtype of weights."""

    def call() -> None:
        weights = torch.empty(2, 112, device="meta")
        forward(weights, torch.empty(112, 2, dtype=torch.int32, device="meta"), 64, 0)

    yield "an image", partial(call)
