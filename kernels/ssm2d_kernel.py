"""Triton kernels of ssm2d_kernel.

    h_ij = c_ij (A1 h_{i,j-1} + A2 v_{i,j-1}),  v_ij = c_ij (A3 h_{i-1,j} + A4 v_{i-1,j})

One program walks the anti-diagonals of the image for BLOCK_N states: row i stands at column t - i in step t, so what lies
to its left is its own work of the step before, in registers, and what lies above it that of the row above, in memory, with
a barrier between steps.

A number is a tuple: (re,) or (re, im). Complex tensors come as their real view, re and im interleaved.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, on_device_of
from .linear_scan import add, conj, multiply, real


@triton.jit
def load(ptr, at, keep, COMPLEX: tl.constexpr):
    """The numbers at these places; zero where `keep` is false."""
    if COMPLEX:
        return (tl.load(ptr + 2 * at, mask=keep, other=0.0), tl.load(ptr + 2 * at + 1, mask=keep, other=0.0))
    else:
        return (tl.load(ptr + at, mask=keep, other=0.0),)


@triton.jit
def store(ptr, at, x, keep, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr + 2 * at, x[0], mask=keep)
        tl.store(ptr + 2 * at + 1, x[1], mask=keep)
    else:
        tl.store(ptr + at, x[0], mask=keep)


@triton.jit
def scaled(factor, x, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (factor * x[0], factor * x[1])
    else:
        return (factor * x[0],)


@triton.jit
def sum_rows(x, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.sum(x[0], 0), tl.sum(x[1], 0))
    else:
        return (tl.sum(x[0], 0),)


@triton.jit
def zeros(BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.zeros((BLOCK_I, BLOCK_N), ACC), tl.zeros((BLOCK_I, BLOCK_N), ACC))
    else:
        return (tl.zeros((BLOCK_I, BLOCK_N), ACC),)


@triton.jit
def four_rows(A_ptr, n, lanes, in_n, COMPLEX: tl.constexpr):
    """A_1 to A_4 of this program's states, each (1, BLOCK_N)."""
    return (
        load(A_ptr, n, in_n, COMPLEX),
        load(A_ptr, lanes + n, in_n, COMPLEX),
        load(A_ptr, 2 * lanes + n, in_n, COMPLEX),
        load(A_ptr, 3 * lanes + n, in_n, COMPLEX),
    )


@triton.jit(do_not_specialize=["height", "width"])
def ssm2d_kernel_fwd_kernel(
    A_ptr, B_ptr, h_ptr, v_ptr, height, width, lanes,
    COMPLEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A (4, lanes), B (2, lanes); h, v (height, width, lanes)."""
    ACC: tl.constexpr = h_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_I)[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    in_n = n < lanes
    A1, A2, A3, A4 = four_rows(A_ptr, n, lanes, in_n, COMPLEX)
    h = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    v = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)

    for t in range(height + width - 1):
        j = t - i
        inside = (i < height) & (j >= 0) & (j < width) & in_n
        cell = (i.to(tl.int64) * width + j) * lanes + n
        above = inside & (i > 0)
        origin = inside & (i == 0) & (j == 0)
        factor = tl.where((i > 0) & (j > 0), 0.5, 1.0).to(ACC)

        h_above = load(h_ptr, cell - width * lanes, above, COMPLEX)
        v_above = load(v_ptr, cell - width * lanes, above, COMPLEX)
        h = scaled(factor, add(multiply(A1, h, COMPLEX), multiply(A2, v, COMPLEX), COMPLEX), COMPLEX)
        v = scaled(factor, add(multiply(A3, h_above, COMPLEX), multiply(A4, v_above, COMPLEX), COMPLEX), COMPLEX)
        h = add(h, load(B_ptr, n + tl.zeros_like(i), origin, COMPLEX), COMPLEX)
        v = add(v, load(B_ptr, lanes + n + tl.zeros_like(i), origin, COMPLEX), COMPLEX)

        store(h_ptr, cell, h, inside, COMPLEX)
        store(v_ptr, cell, v, inside, COMPLEX)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["height", "width"])
def ssm2d_kernel_bwd_kernel(
    dh_ptr, dv_ptr, A_ptr, h_ptr, v_ptr, below_ptr, dA_ptr, dB_ptr, height, width, lanes,
    COMPLEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the far corner, gh and gv being the gradients of h and v:

        gh_ij = dh_ij + c_{i,j+1} A1* gh_{i,j+1} + c_{i+1,j} A3* gv_{i+1,j}
        gv_ij = dv_ij + c_{i,j+1} A2* gh_{i,j+1} + c_{i+1,j} A4* gv_{i+1,j}

    below (2, height, lanes): c gv of every row, of this step and of the one before      dA (4, lanes), dB (2, lanes)
    """
    ACC: tl.constexpr = h_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_I)[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    in_n = n < lanes
    A1, A2, A3, A4 = four_rows(A_ptr, n, lanes, in_n, COMPLEX)
    A1, A2, A3, A4 = conj(A1, COMPLEX), conj(A2, COMPLEX), conj(A3, COMPLEX), conj(A4, COMPLEX)
    right = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    dA1 = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    dA2 = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    dA3 = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    dA4 = zeros(BLOCK_I, BLOCK_N, ACC, COMPLEX)
    plane = height.to(tl.int64) * lanes * (2 if COMPLEX else 1)

    for step in range(height + width - 1):
        t = height + width - 2 - step
        j = t - i
        inside = (i < height) & (j >= 0) & (j < width) & in_n
        cell = (i.to(tl.int64) * width + j) * lanes + n
        row = i.to(tl.int64) * lanes + n
        to_left, to_top = inside & (j > 0), inside & (i > 0)
        factor = tl.where((i > 0) & (j > 0), 0.5, 1.0).to(ACC)

        under = load(below_ptr + plane * ((step + 1) % 2), row + lanes, inside & (i + 1 < height), COMPLEX)
        gh = add(multiply(A1, right, COMPLEX), multiply(A3, under, COMPLEX), COMPLEX)
        gv = add(multiply(A2, right, COMPLEX), multiply(A4, under, COMPLEX), COMPLEX)
        gh = add(gh, load(dh_ptr, cell, inside, COMPLEX), COMPLEX)
        gv = add(gv, load(dv_ptr, cell, inside, COMPLEX), COMPLEX)

        right = scaled(tl.where(inside, factor, 0.0), gh, COMPLEX)
        up = scaled(tl.where(inside, factor, 0.0), gv, COMPLEX)
        store(below_ptr + plane * (step % 2), row, up, (i < height) & in_n, COMPLEX)
        tl.debug_barrier()

        dA1 = add(dA1, multiply(conj(load(h_ptr, cell - lanes, to_left, COMPLEX), COMPLEX), right, COMPLEX), COMPLEX)
        dA2 = add(dA2, multiply(conj(load(v_ptr, cell - lanes, to_left, COMPLEX), COMPLEX), right, COMPLEX), COMPLEX)
        top = cell - width * lanes
        dA3 = add(dA3, multiply(conj(load(h_ptr, top, to_top, COMPLEX), COMPLEX), up, COMPLEX), COMPLEX)
        dA4 = add(dA4, multiply(conj(load(v_ptr, top, to_top, COMPLEX), COMPLEX), up, COMPLEX), COMPLEX)
        if t == 0:
            origin = inside & (i == 0)
            store(dB_ptr, n + tl.zeros_like(i), gh, origin, COMPLEX)
            store(dB_ptr, lanes + n + tl.zeros_like(i), gv, origin, COMPLEX)

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < lanes
    store(dA_ptr, n, sum_rows(dA1, COMPLEX), in_n, COMPLEX)
    store(dA_ptr, lanes + n, sum_rows(dA2, COMPLEX), in_n, COMPLEX)
    store(dA_ptr, 2 * lanes + n, sum_rows(dA3, COMPLEX), in_n, COMPLEX)
    store(dA_ptr, 3 * lanes + n, sum_rows(dA4, COMPLEX), in_n, COMPLEX)


# Numbers of a tile, rows x states, per program; interpreted, one program takes all states.
TILE = 128


def blocks(height: int, lanes: int) -> dict[str, int]:
    """Rows and states of a tile."""
    rows = triton.next_power_of_2(max(1, height))
    states = triton.next_power_of_2(lanes) if interpreted() else max(1, TILE // rows)
    return {"BLOCK_I": rows, "BLOCK_N": states}


def forward(A: Tensor, B: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(h, v), each (height, width, ngroups, dstate)."""
    h, v = (A.new_empty(height, width, *A.shape[1:]) for _ in range(2))
    if h.numel() > 0:
        lanes = A[0].numel()
        block = blocks(height, lanes)
        with on_device_of(A):
            ssm2d_kernel_fwd_kernel[(triton.cdiv(lanes, block["BLOCK_N"]),)](
                real(A), real(B), real(h), real(v), height, width, lanes, COMPLEX=A.is_complex(), **block
            )
    return h, v


def backward(dh: Tensor, dv: Tensor, A: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dB)"""
    dA, dB = torch.empty_like(A), A.new_empty(2, *A.shape[1:])
    if h.numel() == 0:
        return dA.zero_(), dB.zero_()
    height, width = h.shape[:2]
    lanes = A[0].numel()
    block = blocks(height, lanes)
    # Before its first step a row has handed nothing up.
    below = A.new_zeros(2, height, lanes)
    with on_device_of(A):
        ssm2d_kernel_bwd_kernel[(triton.cdiv(lanes, block["BLOCK_N"]),)](
            real(dh), real(dv), real(A), real(h), real(v), real(below), real(dA), real(dB),
            height, width, lanes, COMPLEX=A.is_complex(), **block,
        )  # fmt: skip
    return dA, dB


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each dtype, at the sizes of CIFAR and of ImageNet."""

    def call(dtype: torch.dtype, side: int) -> None:
        A, B = (torch.empty(rows, 8, 16, dtype=dtype, device="meta") for rows in (4, 2))
        h, v = forward(A, B, side, side)
        backward(h, v, A, h, v)

    for dtype in (torch.float32, torch.complex64):
        for side in (8, 56, 224):
            yield f"{str(dtype).removeprefix('torch.')}, {side}x{side}", partial(call, dtype, side)
