"""Triton kernels of grid_scan.

    h_ij = w (a_top h_{i-1,j} + b_top + a_left h_{i,j-1} + b_left),    y_ij = (C_ij . h_ij + D x_ij) silu(z_ij)

with a = exp(dt A), b = dt B x, and w = 1/2 where a cell has both terms, else 1. One program walks a part of one image for
BLOCK_D channels, in strips of COLS columns from top to bottom: a strip's row of states, COLS tiles (dstate, channels),
never leaves registers, and what it leaves to its right goes through memory. Where images x channel blocks fill the
device the part is the whole image; where they do not it is a tile of TILE x TILE cells, and there is one launch for
each diagonal of tiles, which do not depend on each other. Backward goes the other way tile by tile, recomputing the
states of one tile at a time from those kept along its upper and its left border. Nothing is added atomically: what
several programs add to comes in parts, summed in a fixed order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid_scan_walk import (
    SIDE,
    Inputs,
    Plan,
    advance,
    launch_of,
    load_cell,
    load_tile,
    load_vector,
    load_weights,
    passing_of,
    plan_of,
    program_of,
    states_of,
    step_size,
    store_tile,
    terms_of,
    token_of,
)
from .launch import on_device_of, row_stride, sum_parts
from .math import LN2, LOG2E, rounded, silu, silu_grad, softplus_grad


class Gradients(NamedTuple):
    """What backward writes; None where the input is None. The caller adds up the parts."""

    dx: Any  # (batch, height * width, dim)
    ddt_top: Any
    ddt_left: Any
    dz: Any
    dB_top: Any  # (blocks of channels, batch, height * width, dstate)
    dB_left: Any
    dC: Any
    dA_top: Any  # (batch * parts of the image, dstate, dim)
    dA_left: Any
    dD: Any  # (batch * parts of the image, dim)
    ddt_bias_top: Any
    ddt_bias_left: Any


@triton.jit(do_not_specialize=["diagonal", "first", "count"])
def grid_scan_fwd_kernel(
    cells, parameters, image, passing, y_ptr, checkpoints_ptr, diagonal, first, count, dstate: tl.constexpr,
    SOFTPLUS: tl.constexpr, FROM_BOTTOM: tl.constexpr, FROM_RIGHT: tl.constexpr,
    TILE: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One image, or one tile of it, for BLOCK_D channels. y (batch, height * width, dim)

    checkpoints (slots, dstate, dim) or None: of each image the states under every tile row but the last, (rows, width),
    then those to the right of every tile column but the last, (columns, height). The barriers stand between writing
    `passing` and reading it.
    """
    ACC: tl.constexpr = parameters.A_top.dtype.element_ty
    _block, d, in_d, seq, number = program_of(image, count, BLOCK_D)
    n, in_n, in_ND, at_ND, at_A = states_of(d, in_d, image, dstate, BLOCK_N)
    size = dstate * image.dim
    nrows, ncols = (image.height - 1) // TILE, (image.width - 1) // TILE
    slot = seq * (nrows * image.width + ncols * image.height)
    first_i, first_j, end_i, end_j = 0, 0, image.height, image.width
    if count > 0:
        first_i = (first + number) * TILE
        first_j = (diagonal - first - number) * TILE
        end_i, end_j = tl.minimum(first_i + TILE, image.height), tl.minimum(first_j + TILE, image.width)

    A_top_ND = tl.load(parameters.A_top + at_A, mask=in_ND, other=0.0) * LOG2E
    A_left_ND = tl.load(parameters.A_left + at_A, mask=in_ND, other=0.0) * LOG2E
    D_D = load_vector(parameters.D, d, in_d, BLOCK_D, ACC)
    bias_top_D = load_vector(parameters.dt_bias_top, d, in_d, BLOCK_D, ACC)
    bias_left_D = load_vector(parameters.dt_bias_left, d, in_d, BLOCK_D, ACC)

    for strip in range(first_j, end_j, COLS):
        above = ()
        for k in tl.static_range(COLS):
            mask_ND = in_ND & (first_i > 0) & (strip + k < end_j)
            above += (load_tile(passing.row, seq * image.width + strip + k, size, at_ND, mask_ND),)
        for i in range(first_i, end_i):
            # The loads of a row of the strip are on their way together; then the states follow one after the other.
            loaded = ()
            for k in tl.static_range(COLS):
                inside = strip + k < end_j
                row = token_of(image, seq, i, strip + k, FROM_BOTTOM, FROM_RIGHT)
                cell = load_cell(cells, row, i, strip + k, inside, d, in_d)
                z_D = cell[0]
                if cells.z is not None:
                    z_D = tl.load(cells.z + row * cells.z_row + d, mask=in_d & inside, other=0.0)
                loaded += ((cell, z_D, row),)
            h_ND = load_tile(passing.col, seq * image.height + i, size, at_ND, in_ND & (strip > 0))
            row_of_states = ()
            for k in tl.static_range(COLS):
                cell, z_D, row = loaded[k]
                inside = strip + k < end_j
                next_ND = advance(
                    above[k], h_ND, cell, cells, row, i, strip + k, inside, n, in_n,
                    A_top_ND, A_left_ND, bias_top_D, bias_left_D, SOFTPLUS,
                )  # fmt: skip
                h_ND = tl.where(inside, next_ND, h_ND)
                row_of_states += (h_ND,)
                C_ND = load_weights(cells.C, cells.C_row, row, n, in_n, inside, ACC)
                y_D = tl.sum(C_ND * h_ND, axis=0) + D_D * cell[0].to(ACC)
                if cells.z is not None:
                    y_D *= silu(z_D.to(ACC))
                tl.store(y_ptr + row * image.dim + d, rounded(y_D, y_ptr), mask=in_d & inside)
                if checkpoints_ptr is not None:
                    if inside & ((i + 1) % TILE == 0) & (i + 1 < image.height):
                        under = slot + (i // TILE) * image.width + strip + k
                        store_tile(checkpoints_ptr, under, size, at_ND, h_ND, in_ND)
            above = row_of_states
            end = strip + COLS
            store_tile(passing.col, seq * image.height + i, size, at_ND, h_ND, in_ND & (end < image.width))
            if checkpoints_ptr is not None:
                if (end % TILE == 0) & (end < image.width):
                    right = slot + nrows * image.width + (strip // TILE) * image.height + i
                    store_tile(checkpoints_ptr, right, size, at_ND, h_ND, in_ND)
        for k in tl.static_range(COLS):
            mask_ND = in_ND & (end_i < image.height) & (strip + k < end_j)
            store_tile(passing.row, seq * image.width + strip + k, size, at_ND, above[k], mask_ND)
        tl.debug_barrier()


@triton.jit
def recompute_tile(
    cells, image, states_ptr, checkpoints_ptr, slot, size, seq, home, first_i, first_j, end_i, end_j,
    d, in_d, n, in_n, in_ND, at_ND, A_top_ND, A_left_ND, bias_top_D, bias_left_D,
    SOFTPLUS: tl.constexpr, FROM_BOTTOM: tl.constexpr, FROM_RIGHT: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Leaves the states of one tile in `states`, (homes, TILE, TILE, dstate, dim)."""
    nrows = (image.height - 1) // TILE
    for strip in range(first_j, end_j, COLS):
        above = ()
        for k in tl.static_range(COLS):
            mask_ND = in_ND & (first_i > 0) & (strip + k < end_j)
            under = slot + (first_i // TILE - 1) * image.width + strip + k
            above += (load_tile(checkpoints_ptr, under, size, at_ND, mask_ND),)
        for i in range(first_i, end_i):
            loaded = ()
            for k in tl.static_range(COLS):
                row = token_of(image, seq, i, strip + k, FROM_BOTTOM, FROM_RIGHT)
                loaded += ((load_cell(cells, row, i, strip + k, strip + k < end_j, d, in_d), row),)
            place = (home * TILE + i - first_i) * TILE + strip - first_j
            right = slot + nrows * image.width + (first_j // TILE - 1) * image.height + i
            if strip == first_j:
                h_ND = load_tile(checkpoints_ptr, right, size, at_ND, in_ND & (strip > 0))
            else:
                h_ND = load_tile(states_ptr, place - 1, size, at_ND, in_ND)
            row_of_states = ()
            for k in tl.static_range(COLS):
                inside = strip + k < end_j
                cell, row = loaded[k]
                h_ND = advance(
                    above[k], h_ND, cell, cells, row, i, strip + k, inside, n, in_n,
                    A_top_ND, A_left_ND, bias_top_D, bias_left_D, SOFTPLUS,
                )  # fmt: skip
                row_of_states += (h_ND,)
                store_tile(states_ptr, place + k, size, at_ND, h_ND, in_ND & inside)
            above = row_of_states
        tl.debug_barrier()


@triton.jit
def store_weights(ptr, block, row, image, n, in_n, terms_ND, there, dstate: tl.constexpr):
    """This program's part of dB or dC at one cell, in (blocks, cells, dstate)."""
    at = (block.to(tl.int64) * image.cells + row) * dstate
    tl.store(ptr + at + n, rounded(tl.sum(terms_ND, axis=1), ptr), mask=in_n & there)


@triton.jit(do_not_specialize=["diagonal", "first", "count"])
def grid_scan_bwd_kernel(
    cells, parameters, image, passing, grads, dy_ptr, checkpoints_ptr, states_ptr, dy_row,
    diagonal, first, count, dstate: tl.constexpr,
    SOFTPLUS: tl.constexpr, FROM_BOTTOM: tl.constexpr, FROM_RIGHT: tl.constexpr,
    TILE: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mirror image: one tile, or those of one image from the last to the first, for BLOCK_D channels.

    dy (batch, height * width, dim)   states (programs / blocks, TILE, TILE, dstate, dim): scratch, one tile per program
    """
    ACC: tl.constexpr = parameters.A_top.dtype.element_ty
    block, d, in_d, seq, number = program_of(image, count, BLOCK_D)
    n, in_n, in_ND, at_ND, at_A = states_of(d, in_d, image, dstate, BLOCK_N)
    size = dstate * image.dim
    nrows, ncols = (image.height - 1) // TILE, (image.width - 1) // TILE
    slot = seq * (nrows * image.width + ncols * image.height)
    home = seq * tl.maximum(count, 1) + number
    ntiles, part = (nrows + 1) * (ncols + 1), seq
    if count > 0:
        tile = (first + number) * (ncols + 1) + diagonal - first - number
        ntiles, part = 1, seq * ntiles + tile

    A_top_ND = tl.load(parameters.A_top + at_A, mask=in_ND, other=0.0) * LOG2E
    A_left_ND = tl.load(parameters.A_left + at_A, mask=in_ND, other=0.0) * LOG2E
    D_D = load_vector(parameters.D, d, in_d, BLOCK_D, ACC)
    bias_top_D = load_vector(parameters.dt_bias_top, d, in_d, BLOCK_D, ACC)
    bias_left_D = load_vector(parameters.dt_bias_left, d, in_d, BLOCK_D, ACC)
    dA_top_ND, dA_left_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dD_D, dbias_top_D, dbias_left_D = tl.zeros_like(D_D), tl.zeros_like(D_D), tl.zeros_like(D_D)

    for later in range(ntiles):
        tile_row, tile_col = (ntiles - 1 - later) // (ncols + 1), (ntiles - 1 - later) % (ncols + 1)
        if count > 0:
            tile_row, tile_col = first + number, diagonal - first - number
        first_i, first_j = tile_row * TILE, tile_col * TILE
        end_i, end_j = tl.minimum(first_i + TILE, image.height), tl.minimum(first_j + TILE, image.width)
        recompute_tile(
            cells, image, states_ptr, checkpoints_ptr, slot, size, seq, home, first_i, first_j, end_i, end_j,
            d, in_d, n, in_n, in_ND, at_ND, A_top_ND, A_left_ND, bias_top_D, bias_left_D,
            SOFTPLUS, FROM_BOTTOM, FROM_RIGHT, TILE, COLS,
        )  # fmt: skip

        nstrips = tl.cdiv(end_j - first_j, COLS)
        for later_strips in range(nstrips):
            strip = first_j + (nstrips - 1 - later_strips) * COLS
            below = ()
            for k in tl.static_range(COLS):
                mask_ND = in_ND & (end_i < image.height) & (strip + k < end_j)
                below += (load_tile(passing.row, seq * image.width + strip + k, size, at_ND, mask_ND),)
            for later_rows in range(end_i - first_i):
                i = end_i - 1 - later_rows
                place = (home * TILE + i - first_i) * TILE + strip - first_j
                right_ND = load_tile(
                    passing.col, seq * image.height + i, size, at_ND, in_ND & (strip + COLS < image.width)
                )
                row_below = ()
                for later_cols in tl.static_range(COLS):
                    j = strip + COLS - 1 - later_cols
                    inside = j < end_j
                    row = token_of(image, seq, i, j, FROM_BOTTOM, FROM_RIGHT)
                    x_D, logit_top_D, logit_left_D = load_cell(cells, row, i, j, inside, d, in_d)
                    dy_D = tl.load(dy_ptr + row * dy_row + d, mask=in_d & inside, other=0.0).to(ACC)
                    C_ND = load_weights(cells.C, cells.C_row, row, n, in_n, inside, ACC)
                    h_ND = load_tile(states_ptr, place + COLS - 1 - later_cols, size, at_ND, in_ND & inside)
                    x_D = x_D.to(ACC)
                    if cells.z is not None:
                        z_D = tl.load(cells.z + row * cells.z_row + d, mask=in_d & inside, other=0.0).to(ACC)
                        y_D = tl.sum(C_ND * h_ND, axis=0) + D_D * x_D
                        dz_D = rounded(dy_D * y_D * silu_grad(z_D), grads.dz)
                        tl.store(grads.dz + row * image.dim + d, dz_D, mask=in_d & inside)
                        dy_D *= silu(z_D)
                    dD_D += dy_D * x_D
                    store_weights(grads.dC, block, row, image, n, in_n, dy_D[None, :] * h_ND, inside, dstate)

                    top, left, weight = terms_of(i, j, inside)
                    g_ND = (dy_D[None, :] * C_ND + below[COLS - 1 - later_cols] + right_ND) * weight.to(ACC)
                    dt_D = step_size(logit_top_D, bias_top_D, top, SOFTPLUS)
                    store_weights(
                        grads.dB_top, block, row, image, n, in_n, (dt_D * x_D)[None, :] * g_ND, inside, dstate
                    )
                    B_ND = load_weights(cells.B_top, cells.B_top_row, row, n, in_n, top, ACC)
                    gB_D = tl.sum(g_ND * B_ND, axis=0)
                    dx_D = D_D * dy_D + dt_D * gB_D
                    up_ND = g_ND * tl.exp2(dt_D[None, :] * A_top_ND)
                    row_below = (up_ND,) + row_below  # noqa: RUF005
                    if i > first_i:
                        h_ND = load_tile(states_ptr, place + COLS - 1 - later_cols - TILE, size, at_ND, in_ND & inside)
                    else:
                        under = slot + (tile_row - 1) * image.width + j
                        h_ND = load_tile(checkpoints_ptr, under, size, at_ND, in_ND & inside & (i > 0))
                    q_ND = up_ND * h_ND
                    dA_top_ND += dt_D[None, :] * q_ND
                    ddt_D = tl.sum(q_ND * A_top_ND, axis=0) * LN2 + gB_D * x_D
                    if SOFTPLUS:
                        ddt_D *= softplus_grad(logit_top_D.to(ACC) + bias_top_D)
                    ddt_D = tl.where(top, ddt_D, 0.0)
                    dbias_top_D += ddt_D
                    tl.store(grads.ddt_top + row * image.dim + d, rounded(ddt_D, grads.ddt_top), mask=in_d & inside)

                    dt_D = step_size(logit_left_D, bias_left_D, left, SOFTPLUS)
                    store_weights(
                        grads.dB_left, block, row, image, n, in_n, (dt_D * x_D)[None, :] * g_ND, inside, dstate
                    )
                    B_ND = load_weights(cells.B_left, cells.B_left_row, row, n, in_n, left, ACC)
                    gB_D = tl.sum(g_ND * B_ND, axis=0)
                    dx_D += dt_D * gB_D
                    leftwards_ND = g_ND * tl.exp2(dt_D[None, :] * A_left_ND)
                    right_ND = tl.where(inside, leftwards_ND, right_ND)
                    if j > first_j:
                        h_ND = load_tile(states_ptr, place + COLS - 1 - later_cols - 1, size, at_ND, in_ND & inside)
                    else:
                        beside = slot + nrows * image.width + (tile_col - 1) * image.height + i
                        h_ND = load_tile(checkpoints_ptr, beside, size, at_ND, in_ND & inside & (j > 0))
                    q_ND = leftwards_ND * h_ND
                    dA_left_ND += dt_D[None, :] * q_ND
                    ddt_D = tl.sum(q_ND * A_left_ND, axis=0) * LN2 + gB_D * x_D
                    if SOFTPLUS:
                        ddt_D *= softplus_grad(logit_left_D.to(ACC) + bias_left_D)
                    ddt_D = tl.where(left, ddt_D, 0.0)
                    dbias_left_D += ddt_D
                    tl.store(grads.ddt_left + row * image.dim + d, rounded(ddt_D, grads.ddt_left), mask=in_d & inside)
                    tl.store(grads.dx + row * image.dim + d, rounded(dx_D, grads.dx), mask=in_d & inside)
                below = row_below
                store_tile(passing.col, seq * image.height + i, size, at_ND, right_ND, in_ND & (strip > 0))
            for k in tl.static_range(COLS):
                mask_ND = in_ND & (first_i > 0) & (strip + k < end_j)
                store_tile(passing.row, seq * image.width + strip + k, size, at_ND, below[k], mask_ND)
            tl.debug_barrier()

    store_tile(grads.dA_top, part, size, at_ND, dA_top_ND, in_ND)
    store_tile(grads.dA_left, part, size, at_ND, dA_left_ND, in_ND)
    if grads.dD is not None:
        tl.store(grads.dD + part * image.dim + d, dD_D, mask=in_d)
    if grads.ddt_bias_top is not None:
        tl.store(grads.ddt_bias_top + part * image.dim + d, dbias_top_D, mask=in_d)
    if grads.ddt_bias_left is not None:
        tl.store(grads.ddt_bias_left + part * image.dim + d, dbias_left_D, mask=in_d)


def forward(
    inputs: Inputs, size: tuple[int, int], dt_softplus: bool, from_bottom: bool, from_right: bool, slots: int,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the states along the borders of tiles in `slots` slots (0: they are not kept)."""
    x, A = inputs[0], inputs[3]
    assert x is not None and A is not None
    call = launch_of(inputs, size, dt_softplus, from_bottom, from_right, plan or plan_of(x, A, backward=False))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    checkpoints = A.new_empty(slots, A.shape[1], x.shape[2])
    passing = passing_of(A, x.shape[0], size)
    with on_device_of(x):
        for tiles in call.launches:
            grid_scan_fwd_kernel[call.grid(tiles)](
                call.cells, call.parameters, call.image, passing, y, checkpoints if slots else None, *tiles,
                **call.options,
            )  # fmt: skip
    return y, checkpoints


def backward(
    dy: Tensor, inputs: Inputs, checkpoints: Tensor, size: tuple[int, int], dt_softplus: bool, from_bottom: bool,
    from_right: bool, plan: Plan | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the inputs, None where the input is None."""
    x, dt_top, dt_left, A, _, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left = inputs
    assert x is not None and A is not None
    call = launch_of(inputs, size, dt_softplus, from_bottom, from_right, plan or plan_of(x, A, backward=True))
    batch, (dim, dstate) = x.shape[0], A.shape

    def like(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    def per_block(weight: Tensor) -> Tensor:
        dtype = weight.dtype if call.blocks == 1 else A.dtype
        return torch.empty(call.blocks, *weight.shape, dtype=dtype, device=A.device)

    def per_part(given: Tensor | None, *shape: int) -> Tensor | None:
        return None if given is None else A.new_empty(batch * call.parts if call.launches else 0, *shape)

    grads = Gradients(
        dx=like(x), ddt_top=like(dt_top), ddt_left=like(dt_left), dz=like(z),
        dB_top=per_block(B_top), dB_left=per_block(B_left), dC=per_block(C),
        dA_top=per_part(A, dstate, dim), dA_left=per_part(A, dstate, dim), dD=per_part(D, dim),
        ddt_bias_top=per_part(dt_bias_top, dim), ddt_bias_left=per_part(dt_bias_left, dim),
    )  # fmt: skip
    homes = batch * max((tiles.count for tiles in call.launches), default=0) or batch
    states = A.new_empty(homes, SIDE, SIDE, dstate, dim)
    passing = passing_of(A, batch, size)
    with on_device_of(x):
        for tiles in reversed(call.launches):
            grid_scan_bwd_kernel[call.grid(tiles)](
                call.cells, call.parameters, call.image, passing, grads, dy, checkpoints, states, row_stride(dy), *tiles,
                **call.options,
            )  # fmt: skip
        summed = [
            None if parts is None else sum_parts(parts, dtype)
            for parts, dtype in (
                (grads.dA_top, A.dtype), (grads.dA_left, A.dtype), (grads.dB_top, x.dtype), (grads.dB_left, x.dtype),
                (grads.dC, x.dtype), (grads.dD, A.dtype), (grads.ddt_bias_top, A.dtype), (grads.ddt_bias_left, A.dtype),
            )
        ]  # fmt: skip
    dA = (parts.mT.contiguous() for parts in summed[:2] if parts is not None)
    return grads.dx, grads.ddt_top, grads.ddt_left, *dA, *summed[2:6], grads.dz, *summed[6:]


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tests/kernels/test_compile.py compiles ahead of time: a label and a call on `meta` tensors, each."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "fp32", partial(_both, fp32)
    yield "bf16, tiles, from the bottom right, gate", partial(_both, bf16, whole=False, gate=True, start=True)
    yield "bf16, 1 state", partial(_both, bf16, dstate=1)
    yield "fp32, 64 states", partial(_both, fp32, dstate=64)


def _both(dtype: torch.dtype, *, dstate: int = 16, whole: bool = True, gate: bool = False, start: bool = False) -> None:
    batch, height, width, dim = 2, 40, 56, 192

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = tensor(batch, height * width, dim), tensor(batch, height * width, dstate)
    A, vector = tensor(dim, dstate, dtype=torch.float32), tensor(dim, dtype=torch.float32)
    inputs = (x, x, x, A, A, weight, weight, weight, vector, x if gate else None, vector, vector)
    plans = [plan_of(x, A, backward=backward)._replace(whole=whole) for backward in (False, True)]
    slots = batch * (2 * width + 3 * height)
    checkpoints = forward(inputs, (height, width), True, start, start, slots, plans[0])[1]
    backward(x, inputs, checkpoints, (height, width), True, start, start, plans[1])
