"""How grid_scan walks: which cells and channels a program visits, what it loads there, and how many programs and launches.

The kernels themselves stand in grid_scan.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, multiprocessors, register_limit, row_stride, warp_size
from .math import softplus

SIDE = 16  # cells, of a tile

# x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left
Inputs = tuple[Tensor | None, ...]


class Cells(NamedTuple):
    """Inputs per cell, (batch, height * width, ...), and their row strides in elements."""

    x: Any
    dt_top: Any
    dt_left: Any
    B_top: Any
    B_left: Any
    C: Any
    z: Any  # or None
    x_row: Any
    dt_top_row: Any
    dt_left_row: Any
    B_top_row: Any
    B_left_row: Any
    C_row: Any
    z_row: Any


class Parameters(NamedTuple):
    """A (dim, dstate); D and the biases (dim,) or None."""

    A_top: Any
    A_left: Any
    D: Any
    dt_bias_top: Any
    dt_bias_left: Any


class Image(NamedTuple):
    """Sizes."""

    cells: int  # batch * height * width
    height: int
    width: int
    dim: int


class Tiles(NamedTuple):
    """What one launch takes: the tiles of one diagonal, from tile row `first` on, or (count 0) all of the image."""

    diagonal: int
    first: int
    count: int


class Passing(NamedTuple):
    """States, or in backward their adjoints, between strips and tiles: (batch, width | height, dstate, dim)."""

    row: Any  # from a tile to the one above or below it
    col: Any  # from a strip to the one beside it


@triton.jit
def program_of(image, count, BLOCK_D: tl.constexpr):
    """Block of channels, its channels, which of them exist; the image of the batch; the tile's number in the launch."""
    blocks = tl.cdiv(image.dim, BLOCK_D)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.maximum(count, 1)
    return block, d, d < image.dim, (part // count).to(tl.int64), part % count


@triton.jit
def states_of(d, in_d, image, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """States n, which of them exist, and of the tile (N, D) the mask, its offsets in a border's (dstate, dim) and in A's
    (dim, dstate)."""
    n = tl.arange(0, BLOCK_N)
    in_n = n < dstate
    in_ND = in_n[:, None] & in_d[None, :]
    return n, in_n, in_ND, n[:, None] * image.dim + d[None, :], d[None, :] * dstate + n[:, None]


@triton.jit
def token_of(image, seq, i, j, FROM_BOTTOM: tl.constexpr, FROM_RIGHT: tl.constexpr):
    """The row of memory of cell (i, j)."""
    line = image.height - 1 - i if FROM_BOTTOM else i
    return (seq * image.height + line) * image.width + (image.width - 1 - j if FROM_RIGHT else j)


@triton.jit
def load_vector(ptr, d, in_d, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """D or a bias; zeros for a missing one."""
    if ptr is None:
        return tl.zeros((BLOCK_D,), ACC)
    else:
        return tl.load(ptr + d, mask=in_d, other=0.0)


@triton.jit
def load_tile(ptr, slot, size, at_ND, mask_ND):
    """The states (dstate, dim) of one slot, of `size` numbers."""
    return tl.load(ptr + slot.to(tl.int64) * size + at_ND, mask=mask_ND, other=0.0)


@triton.jit
def store_tile(ptr, slot, size, at_ND, h_ND, mask_ND):
    tl.store(ptr + slot.to(tl.int64) * size + at_ND, h_ND, mask=mask_ND)


@triton.jit
def terms_of(i, j, inside):
    """Whether cell (i, j) has a term from above, one from the left (as the first cell has), and the weight of their sum."""
    return inside & (i > 0), inside & ((i == 0) | (j > 0)), tl.where((i > 0) & (j > 0), 0.5, 1.0)


@triton.jit
def load_cell(cells, row, i, j, inside, d, in_d):
    """x and dt of a cell as they lie in memory; zeros where there is none, or no such term."""
    top, left, _weight = terms_of(i, j, inside)
    return (
        tl.load(cells.x + row * cells.x_row + d, mask=in_d & inside, other=0.0),
        tl.load(cells.dt_top + row * cells.dt_top_row + d, mask=in_d & top, other=0.0),
        tl.load(cells.dt_left + row * cells.dt_left_row + d, mask=in_d & left, other=0.0),
    )


@triton.jit
def load_weights(ptr, row_stride, row, n, in_n, there, ACC: tl.constexpr):
    """B or C of a cell, (N, 1); zeros where there is no such term."""
    return tl.load(ptr + row * row_stride + n, mask=in_n & there, other=0.0).to(ACC)[:, None]


@triton.jit
def step_size(dt_D, dt_bias_D, there, SOFTPLUS: tl.constexpr):
    """dt with its bias and softplus; 0 where the term is not there."""
    dt_D = dt_D.to(dt_bias_D.dtype) + dt_bias_D
    return tl.where(there, softplus(dt_D) if SOFTPLUS else dt_D, 0.0)


@triton.jit
def add_term(
    h_ND, before_ND, dt_D, x_D, A_ND, B_ptr, B_row, row, n, in_n, there, dt_bias_D, SOFTPLUS: tl.constexpr
):  # fmt: skip
    """h + a before + b of one side; A holds A / ln 2."""
    dt_D = step_size(dt_D, dt_bias_D, there, SOFTPLUS)
    B_ND = load_weights(B_ptr, B_row, row, n, in_n, there, A_ND.dtype)
    return h_ND + tl.exp2(dt_D[None, :] * A_ND) * before_ND + (dt_D * x_D)[None, :] * B_ND


@triton.jit
def advance(
    above_ND, left_ND, loaded, cells, row, i, j, inside, n, in_n, A_top_ND, A_left_ND, bias_top_D, bias_left_D,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state of a cell."""
    x_D, dt_top_D, dt_left_D = loaded
    top, left, weight = terms_of(i, j, inside)
    x_D = x_D.to(A_top_ND.dtype)
    h_ND = tl.zeros_like(above_ND)
    h_ND = add_term(
        h_ND, above_ND, dt_top_D, x_D, A_top_ND, cells.B_top, cells.B_top_row, row, n, in_n, top, bias_top_D, SOFTPLUS
    )
    h_ND = add_term(
        h_ND, left_ND, dt_left_D, x_D, A_left_ND, cells.B_left, cells.B_left_row, row, n, in_n, left, bias_left_D,
        SOFTPLUS,
    )  # fmt: skip
    return h_ND * weight.to(A_top_ND.dtype)


class Plan(NamedTuple):
    """How a call is cut into programs."""

    block_d: int  # channels per program
    cols: int  # columns of a strip
    num_warps: int
    whole: bool  # an image to a program, not a tile


def plan_of(x: Tensor, A: Tensor, *, backward: bool) -> Plan:
    """The configuration, by rule.

    A warp takes as many channels as it has lanes and at most 4 states per lane, 2 in float64: more leave no registers for
    the row above, or in backward for the twice as many numbers to a state. With more states than that it takes fewer
    channels, in the end one, and then there are more warps to the channel. An image goes to one program where that makes
    4 warps per multiprocessor.
    """
    block_n = triton.next_power_of_2(max(1, A.shape[1]))
    if interpreted():
        block_d, num_warps = min(triton.next_power_of_2(max(1, x.shape[2])), max(1, (1 << 16) // block_n)), 1
    else:
        lanes = warp_size(x.device)
        per_warp = lanes * (2 if A.dtype == torch.float64 else 4)
        block_d, num_warps = min(lanes, max(1, per_warp // block_n)), min(16, max(1, block_n // per_warp))
    programs = x.shape[0] * triton.cdiv(x.shape[2], block_d)
    return Plan(block_d, 1 if backward else 2, num_warps, programs * num_warps >= 4 * multiprocessors(x.device))


class Launch(NamedTuple):
    """What the launches of one call share."""

    cells: Cells
    parameters: Parameters
    image: Image
    launches: list[Tiles]  # in the order of the scan
    parts: int  # of each image, that add to the gradients of parameters
    blocks: int
    options: dict[str, Any]

    def grid(self, tiles: Tiles) -> tuple[int]:
        """Programs of one launch."""
        return (self.cells.x.shape[0] * max(1, tiles.count) * self.blocks,)


def launch_of(
    inputs: Inputs, size: tuple[int, int], dt_softplus: bool, from_bottom: bool, from_right: bool, plan: Plan
) -> Launch:
    x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left = inputs
    assert x is not None and A_top is not None
    (batch, ncells, dim), (height, width) = x.shape, size
    per_cell = (x, dt_top, dt_left, B_top, B_left, C, z)
    rows = (None if t is None else row_stride(t) for t in per_cell)
    nrows, ncols = triton.cdiv(height, SIDE), triton.cdiv(width, SIDE)
    launches, parts = [Tiles(0, 0, 0)], 1
    if not plan.whole and nrows * ncols > 1:
        launches, parts = [], nrows * ncols
        for diagonal in range(nrows + ncols - 1):
            first = max(0, diagonal - ncols + 1)
            launches.append(Tiles(diagonal, first, min(diagonal, nrows - 1) - first + 1))
    options = {
        "dstate": A_top.shape[1], "SOFTPLUS": dt_softplus, "FROM_BOTTOM": from_bottom, "FROM_RIGHT": from_right,
        "TILE": SIDE, "BLOCK_D": plan.block_d, "BLOCK_N": triton.next_power_of_2(max(1, A_top.shape[1])),
        "COLS": plan.cols, "num_warps": plan.num_warps, **register_limit(255),
    }  # fmt: skip
    return Launch(
        Cells(*per_cell, *rows),
        Parameters(A_top, A_left, D, dt_bias_top, dt_bias_left),
        Image(batch * ncells, height, width, dim),
        launches if x.numel() else [],
        parts,
        triton.cdiv(dim, plan.block_d),
        options,
    )


def passing_of(A: Tensor, batch: int, size: tuple[int, int]) -> Passing:
    """Room for what strips and tiles pass on."""
    dim, dstate = A.shape
    return Passing(*(A.new_empty(batch, length, dstate, dim) for length in (size[1], size[0])))
