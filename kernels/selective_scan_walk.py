"""How selective_scan walks: which tokens and channels a program visits, what it loads there, and how many programs.

The kernels themselves stand in selective_scan.py.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, multiprocessors, row_stride, warp_size
from .math import softplus

CHECKPOINT_EVERY = tl.constexpr(64)  # tokens
HELD_RANK = tl.constexpr(16)  # of dt_weight, kept in registers
RESTART, PAD = tl.constexpr(1), tl.constexpr(2)  # bits of `flags`


class Tokens(NamedTuple):
    """Inputs per token: tensors, row strides in elements. A B or C without a row stride is constant: (dim, dstate)."""

    x: Any  # (batch, seqlen, dim)
    dt: Any  # (batch, seqlen, dim), or with dt_weight (batch, seqlen, rank)
    z: Any  # (batch, seqlen, dim) or None
    B: Any  # (batch, seqlen, groups of B, dstate)
    C: Any  # (batch, seqlen, groups of C, dstate)
    dt_weight: Any  # (rank, dim), dense, or None
    x_row: Any
    dt_row: Any
    z_row: Any
    B_row: Any
    C_row: Any


class Walk(NamedTuple):
    """Which token stands at a position of the walk; each may be None."""

    order: Any  # (seqlen,) int32
    flags: Any  # (batch, seqlen) uint8
    cu_seqlens: Any  # (nseq + 1,) int64


class Sizes(NamedTuple):
    """A run is channels that share their group of B and of C; a block never reaches over its end."""

    dim: int
    rows: int  # batch * seqlen
    run: int  # channels
    blocks_per_run: int
    nsplits: int
    span: int  # positions per split, a multiple of CHECKPOINT_EVERY
    B_share: int  # channels per group of B
    C_share: int


@triton.jit
def channels_of(sizes, BLOCK_D: tl.constexpr):
    """First channel of the program's run, its channels, which of them exist, and its part = seq * nsplits + split."""
    pid = tl.program_id(0)
    blocks = sizes.dim // sizes.run * sizes.blocks_per_run
    block = pid % blocks
    run = block // sizes.blocks_per_run * sizes.run
    d = run + block % sizes.blocks_per_run * BLOCK_D + tl.arange(0, BLOCK_D)
    return run, d, d < run + sizes.run, (pid // blocks).to(tl.int64)


@triton.jit
def split_of(walk, part, sizes, seqlen):
    """Sequence, split, positions begin..end of the split; the sequence's first row, length and checkpoint slot."""
    seq, split = part // sizes.nsplits, part % sizes.nsplits
    first, length, slot = seq * seqlen, seqlen, seq * tl.cdiv(seqlen, CHECKPOINT_EVERY)
    if walk.cu_seqlens is not None:
        first = tl.load(walk.cu_seqlens + seq)
        length = (tl.load(walk.cu_seqlens + seq + 1) - first).to(tl.int32)
        slot = first // CHECKPOINT_EVERY + seq
    begin = (split * sizes.span).to(tl.int32)
    return seq, split, begin, tl.minimum(begin + sizes.span, length), first, length, slot


@triton.jit
def tile_of(d, in_d, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """States n, which of them exist, and of the tile (N, D) the mask and the offsets in (dim, dstate)."""
    n = tl.arange(0, BLOCK_N)
    in_n = n < dstate
    return n, in_n, in_n[:, None] & in_d[None, :], d[None, :] * dstate + n[:, None]


@triton.jit
def visit(walk, first, length, p, inside, REVERSE: tl.constexpr):
    """Row at position p; whether its token counts, that is lies inside and is no pad; whether it drops the state."""
    token = length - 1 - p if REVERSE else p
    if walk.order is not None:
        token = tl.load(walk.order + token, mask=inside, other=0)
    row = first + token
    if walk.flags is None:
        return row, inside, tl.full((), 0, tl.int1)
    else:
        flag = tl.load(walk.flags + row, mask=inside, other=0)
        return row, inside & ((flag & PAD) == 0), (flag & RESTART) != 0


@triton.jit
def load_token(
    tokens, walk, first, length, p, inside, d, in_d, dt_weight_RD, rank: tl.constexpr, dim, REVERSE: tl.constexpr
):
    """What `visit` says of position p, and x and dt of its token as they lie in memory; zeros where none counts.

    With a rank, dt is expanded from its low-rank form.
    """
    row, live, restart = visit(walk, first, length, p, inside, REVERSE)
    mask_D = in_d & live
    x_D = tl.load(tokens.x + row * tokens.x_row + d, mask=mask_D, other=0.0)
    if rank == 0:
        return row, live, restart, mask_D, x_D, tl.load(tokens.dt + row * tokens.dt_row + d, mask=mask_D, other=0.0)
    else:
        return row, live, restart, mask_D, x_D, expand(tokens, row, live, d, in_d, dt_weight_RD, rank, dim)


@triton.jit
def expand(tokens, row, live, d, in_d, dt_weight_RD, rank: tl.constexpr, dim):
    """dt of one token from its low-rank form."""
    if rank <= HELD_RANK:
        r = tl.arange(0, dt_weight_RD.shape[0])
        low_R = tl.load(tokens.dt + row * tokens.dt_row + r, mask=(r < rank) & live, other=0.0)
        return tl.sum(dt_weight_RD * low_R.to(dt_weight_RD.dtype)[:, None], axis=0)
    else:
        dt_D = tl.zeros(d.shape, tokens.dt_weight.dtype.element_ty)
        for first_r in range(0, rank, HELD_RANK):
            r = first_r + tl.arange(0, HELD_RANK)
            low_R = tl.load(tokens.dt + row * tokens.dt_row + r, mask=(r < rank) & live, other=0.0)
            mask_RD = (r < rank)[:, None] & in_d[None, :]
            weight_RD = tl.load(tokens.dt_weight + r[:, None] * dim + d[None, :], mask=mask_RD, other=0.0)
            dt_D += tl.sum(weight_RD * low_R.to(dt_D.dtype)[:, None], axis=0)
        return dt_D


@triton.jit
def load_dt_weight(tokens, d, in_d, dim, rank: tl.constexpr, BLOCK_R: tl.constexpr):
    """What expands dt, (R, D); for no rank, and for one that registers cannot hold, a mask that nobody reads."""
    if rank == 0 or rank > HELD_RANK:
        return in_d
    else:
        r = tl.arange(0, BLOCK_R)
        mask_RD = (r < rank)[:, None] & in_d[None, :]
        return tl.load(tokens.dt_weight + r[:, None] * dim + d[None, :], mask=mask_RD, other=0.0)


@triton.jit
def load_dy_and_z(dy_ptr, dy_row, tokens, row, d, mask_D):
    """dy and z of one token as they lie in memory; dy again where there is no z."""
    dy_D = tl.load(dy_ptr + row * dy_row + d, mask=mask_D, other=0.0)
    if tokens.z is None:
        return dy_D, dy_D
    else:
        return dy_D, tl.load(tokens.z + row * tokens.z_row + d, mask=mask_D, other=0.0)


@triton.jit
def load_vector(ptr, d, in_d, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """D or dt_bias; zeros for a missing one."""
    if ptr is None:
        return tl.zeros((BLOCK_D,), ACC)
    else:
        return tl.load(ptr + d, mask=in_d, other=0.0)


@triton.jit
def load_constant(ptr, row_stride, at_ND, in_ND, ACC: tl.constexpr):
    """A constant B or C, (N, D); zeros, which nobody uses, if it comes per token."""
    if row_stride is None:
        return tl.load(ptr + at_ND, mask=in_ND, other=0.0)
    else:
        return tl.zeros_like(in_ND).to(ACC)


@triton.jit
def load_weights(constant_ND, ptr, row_stride, row, at_N, mask_N, ACC: tl.constexpr):
    """B or C of one token, (N, 1); or the constant (N, D)."""
    if row_stride is None:
        return constant_ND
    else:
        return tl.load(ptr + row * row_stride + at_N, mask=mask_N, other=0.0).to(ACC)[:, None]


@triton.jit
def step_size(dt_D, dt_bias_D, live, SOFTPLUS: tl.constexpr):
    """dt with its bias and softplus; 0 where no token counts, which leaves the state as it is."""
    dt_D = dt_D.to(dt_bias_D.dtype) + dt_bias_D
    return tl.where(live, softplus(dt_D) if SOFTPLUS else dt_D, 0.0)


class Plan(NamedTuple):
    """How a call is cut into programs."""

    block_d: int  # channels per program
    tokens: int  # whose loads are on their way together
    step: int  # tokens whose states backward has at a time
    num_warps: int
    nsplits: int  # per sequence


def plan_of(x: Tensor, A: Tensor, run: int, nseq: int, packed: bool) -> Plan:
    """The configuration, by rule.

    A warp takes as many channels as it has lanes and at most 16 states per lane, 8 in float64: more leave no registers.
    With more states than that it takes fewer channels, in the end one, and then there are more warps to the channel.
    The length is split where programs are fewer than 4 warps per multiprocessor, so that there are about 8, but not
    into less than 128 tokens.
    """
    (_, seqlen, dim), every = x.shape, CHECKPOINT_EVERY.value
    block_n = triton.next_power_of_2(max(1, A.shape[1]))
    if interpreted():
        return Plan(min(triton.next_power_of_2(run), max(1, (1 << 16) // block_n)), 4, every, 1, 1)
    lanes = warp_size(x.device)
    per_warp = lanes * (8 if A.dtype == torch.float64 else 16)
    block_d, num_warps = min(lanes, max(1, per_warp // block_n)), min(16, max(1, block_n // per_warp))
    blocks = max(1, dim // run * triton.cdiv(run, block_d))
    wanted = 8 * multiprocessors(x.device)
    nsplits = 1
    if nseq * blocks * num_warps * 2 <= wanted:
        # The lengths of packed sequences are on the device; any of them may be all of the row.
        nsplits = wanted // (blocks * num_warps * (1 if packed else nseq))
    return Plan(block_d, 2 if block_n <= 16 else 1, 8, num_warps, max(1, min(nsplits, seqlen // (2 * every))))


class Launch(NamedTuple):
    """What the launches of one call share."""

    tokens: Tokens
    walk: Walk
    sizes: Sizes
    nparts: int  # sequences * splits
    step: int
    grid: tuple[int]
    options: dict[str, Any]


def launch_of(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, reverse: bool, plan: Plan | None,
    dt_weight: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Row strides, sizes and options from the tensors of a call."""
    (batch, seqlen, dim), dstate = x.shape, A.shape[1]
    nseq = batch if cu_seqlens is None else len(cu_seqlens) - 1
    B_share, C_share = (dim if weight.ndim == 2 else dim // weight.shape[2] for weight in (B, C))
    run = max(1, math.gcd(B_share, C_share))
    plan = plan or plan_of(x, A, run, nseq, cu_seqlens is not None)
    rows = [None if t is None or t.ndim == 2 else row_stride(t) for t in (x, dt, z, B, C)]
    rank = 0 if dt_weight is None else dt_weight.shape[0]
    every = CHECKPOINT_EVERY.value
    span = max(1, triton.cdiv(triton.cdiv(seqlen, plan.nsplits), every)) * every
    blocks_per_run = triton.cdiv(run, plan.block_d)
    return Launch(
        tokens=Tokens(x, dt, z, B, C, dt_weight, *rows),
        walk=Walk(order, flags, cu_seqlens),
        sizes=Sizes(dim, batch * seqlen, run, blocks_per_run, plan.nsplits, span, B_share, C_share),
        nparts=nseq * plan.nsplits,
        step=plan.step,
        grid=(nseq * plan.nsplits * (dim // run) * blocks_per_run,),
        options={
            "dstate": dstate, "rank": rank, "SOFTPLUS": dt_softplus, "REVERSE": reverse, "TOKENS": plan.tokens,
            "BLOCK_D": plan.block_d, "BLOCK_N": triton.next_power_of_2(max(1, dstate)),
            "BLOCK_R": triton.next_power_of_2(max(1, rank)),
            # One stage: software pipelining of these loops has given wrong numbers on Blackwell with Triton 3.5 to 3.7.
            "num_warps": plan.num_warps, "num_stages": 1,
        },
    )  # fmt: skip
