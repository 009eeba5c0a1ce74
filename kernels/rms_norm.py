"""Triton kernels of rms_norm.

    s = x + residual;  v = s (* silu(z));  y = v / sqrt(mean(v^2) + eps) * weight + bias (* silu(z))

One program holds ROWS rows of one group of channels. Backward programs take the rows tile by tile and keep the partial
sums of dweight and dbias in registers; the parts are added in order afterwards. A group of more than NARROW channels is
too much for the registers: the wide kernels go over a tile twice, chunk by chunk, first for the sums of its rows.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, in_two_parts, interpreted, multiprocessors, on_device_of, register_limit, sum_parts
from .math import rounded, silu, silu_grad

NARROW = 4096


@triton.jit
def tile(first, nrows, channel, group, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, channels and mask of a tile, from a row and a channel of the group given by program axis 1."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    i = channel + tl.arange(0, BLOCK)
    return row[:, None], (tl.program_id(1) * group + i)[None, :], (row < nrows)[:, None] & (i < group)[None, :]


@triton.jit
def operand(ptr, row, c, row_stride, inside, ACC: tl.constexpr):
    """A tile of rows with a stride, in the accumulation type."""
    return tl.load(ptr + row * row_stride + c, mask=inside, other=0.0).to(ACC)


@triton.jit
def sum_of(x_ptr, residual_ptr, row, c, x_stride, residual_stride, inside, ACC: tl.constexpr):
    """s, a tile of it."""
    s = operand(x_ptr, row, c, x_stride, inside, ACC)
    if residual_ptr is not None:
        s += operand(residual_ptr, row, c, residual_stride, inside, ACC)
    return s


@triton.jit
def put_normalised(
    y_ptr, v, rstd, gate, weight_ptr, bias_ptr, row, c, dim, inside, GATED: tl.constexpr, ACC: tl.constexpr
):
    """y of a tile; gate is silu(z) where it comes after."""
    y = v * rstd * operand(weight_ptr, 0, c, 0, inside, ACC)
    if bias_ptr is not None:
        y += operand(bias_ptr, 0, c, 0, inside, ACC)
    if GATED:
        y *= gate
    tl.store(y_ptr + row * dim + c, rounded(y, y_ptr), mask=inside)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, z_ptr, y_ptr, total_ptr, rstd_ptr,
    nrows, dim, group, ngroups, x_stride, residual_stride, z_stride, eps, eps_rest,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, residual, z (nrows, dim) with row strides; y, total (nrows, dim); rstd (nrows, ngroups)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, c, inside = tile(first, nrows, 0, group, ROWS, BLOCK)
    v = sum_of(x_ptr, residual_ptr, row, c, x_stride, residual_stride, inside, ACC)
    if residual_ptr is not None:
        tl.store(total_ptr + row * dim + c, rounded(v, total_ptr), mask=inside)
    gate = v
    if z_ptr is not None:
        gate = silu(operand(z_ptr, row, c, z_stride, inside, ACC))
        if not GATE_AFTER:
            v *= gate

    every = first + tl.arange(0, ROWS)
    rstd = 1.0 / tl.sqrt(tl.where(every < nrows, tl.sum(v * v, axis=1) / group + tl.cast(eps, ACC) + eps_rest, 1.0))
    tl.store(rstd_ptr + every * ngroups + tl.program_id(1), rstd, mask=every < nrows)
    GATED: tl.constexpr = z_ptr is not None and GATE_AFTER
    put_normalised(y_ptr, v, rstd[:, None], gate, weight_ptr, bias_ptr, row, c, dim, inside, GATED, ACC)


@triton.jit
def rms_norm_wide_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, z_ptr, y_ptr, total_ptr, rstd_ptr,
    nrows, dim, group, ngroups, x_stride, residual_stride, z_stride, eps, eps_rest,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rms_norm_fwd_kernel for groups of any size."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    squares = tl.zeros((ROWS,), ACC)
    for channel in range(0, group, BLOCK):
        row, c, inside = tile(first, nrows, channel, group, ROWS, BLOCK)
        v = sum_of(x_ptr, residual_ptr, row, c, x_stride, residual_stride, inside, ACC)
        if residual_ptr is not None:
            tl.store(total_ptr + row * dim + c, rounded(v, total_ptr), mask=inside)
        if z_ptr is not None and not GATE_AFTER:
            v *= silu(operand(z_ptr, row, c, z_stride, inside, ACC))
        squares += tl.sum(v * v, axis=1)

    every = first + tl.arange(0, ROWS)
    rstd = 1.0 / tl.sqrt(tl.where(every < nrows, squares / group + tl.cast(eps, ACC) + eps_rest, 1.0))
    tl.store(rstd_ptr + every * ngroups + tl.program_id(1), rstd, mask=every < nrows)

    GATED: tl.constexpr = z_ptr is not None and GATE_AFTER
    for channel in range(0, group, BLOCK):
        row, c, inside = tile(first, nrows, channel, group, ROWS, BLOCK)
        v = sum_of(x_ptr, residual_ptr, row, c, x_stride, residual_stride, inside, ACC)
        gate = v
        if z_ptr is not None:
            gate = silu(operand(z_ptr, row, c, z_stride, inside, ACC))
            if not GATE_AFTER:
                v *= gate
        put_normalised(y_ptr, v, rstd[:, None], gate, weight_ptr, bias_ptr, row, c, dim, inside, GATED, ACC)


@triton.jit
def operands_of_backward(
    dy_ptr, total_ptr, rest_ptr, z_ptr, row, c, dy_stride, total_stride, rest_stride, z_stride, rstd, inside,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of a tile: s, the normalised values, dy, the gradient before any gate that comes after, and z (s if none)."""
    s = sum_of(total_ptr, rest_ptr, row, c, total_stride, rest_stride, inside, ACC)
    dy = operand(dy_ptr, row, c, dy_stride, inside, ACC)
    normal, grad, z = s * rstd, dy, s
    if z_ptr is not None:
        z = operand(z_ptr, row, c, z_stride, inside, ACC)
        if GATE_AFTER:
            grad = dy * silu(z)
        else:
            normal *= silu(z)
    return s, normal, dy, grad, z


@triton.jit
def put_gradients(
    dx_ptr, dz_ptr, dtotal_ptr, z_ptr, bias_ptr, row, c, dim, dtotal_stride, inside,
    s, normal, dy, grad, z, weight, rstd, mean, GATE_AFTER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx and dz of a tile; mean is that of weight * grad * normal over the group."""
    dv = (grad * weight - normal * mean) * rstd
    if z_ptr is not None:
        if GATE_AFTER:
            ungated = normal * weight
            if bias_ptr is not None:
                ungated += operand(bias_ptr, 0, c, 0, inside, ACC)
            dz = dy * ungated * silu_grad(z)
        else:
            dz = dv * s * silu_grad(z)
            dv *= silu(z)
        tl.store(dz_ptr + row * dim + c, rounded(dz, dz_ptr), mask=inside)
    if dtotal_ptr is not None:
        dv += operand(dtotal_ptr, row, c, dtotal_stride, inside, ACC)
    tl.store(dx_ptr + row * dim + c, rounded(dv, dx_ptr), mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, rest_ptr, weight_ptr, bias_ptr, z_ptr, rstd_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dz_ptr,
    nrows, dim, group, ngroups, dy_stride, dtotal_stride, total_stride, rest_stride, z_stride, rows_per_program,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total + rest was normalised. dx like total, dz like z; dweight, dbias (nblocks, dim): a row per program of axis 0."""
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, nrows)
    i = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * group + i
    weight = tl.load(weight_ptr + channel, mask=i < group, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK,), ACC)
    dbias = tl.zeros((BLOCK,), ACC)

    for first in range(begin, end, ROWS):
        row, c, inside = tile(first, end, 0, group, ROWS, BLOCK)
        every = first + tl.arange(0, ROWS).to(tl.int64)
        rstd = tl.load(rstd_ptr + every * ngroups + tl.program_id(1), mask=every < end, other=0.0)[:, None]
        s, normal, dy, grad, z = operands_of_backward(
            dy_ptr, total_ptr, rest_ptr, z_ptr, row, c, dy_stride, total_stride, rest_stride, z_stride, rstd, inside,
            GATE_AFTER, ACC,
        )  # fmt: skip
        dweight += tl.sum(grad * normal, axis=0)
        dbias += tl.sum(grad, axis=0)
        mean = (tl.sum(weight * grad * normal, axis=1) / group)[:, None]
        put_gradients(
            dx_ptr, dz_ptr, dtotal_ptr, z_ptr, bias_ptr, row, c, dim, dtotal_stride, inside,
            s, normal, dy, grad, z, weight, rstd, mean, GATE_AFTER, ACC,
        )  # fmt: skip

    part = tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(dweight_ptr + part, dweight, mask=i < group)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part, dbias, mask=i < group)


@triton.jit
def rms_norm_wide_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, rest_ptr, weight_ptr, bias_ptr, z_ptr, rstd_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dz_ptr,
    nrows, dim, group, ngroups, dy_stride, dtotal_stride, total_stride, rest_stride, z_stride, rows_per_program,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rms_norm_bwd_kernel for groups of any size; dweight and dbias start as zeros, and each program adds to its row."""
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, nrows)
    i = tl.arange(0, BLOCK)

    for first in range(begin, end, ROWS):
        every = first + tl.arange(0, ROWS).to(tl.int64)
        rstd = tl.load(rstd_ptr + every * ngroups + tl.program_id(1), mask=every < end, other=0.0)[:, None]
        total = tl.zeros((ROWS,), ACC)
        for channel in range(0, group, BLOCK):
            row, c, inside = tile(first, end, channel, group, ROWS, BLOCK)
            _, normal, _, grad, _ = operands_of_backward(
                dy_ptr, total_ptr, rest_ptr, z_ptr, row, c, dy_stride, total_stride, rest_stride, z_stride, rstd,
                inside, GATE_AFTER, ACC,
            )  # fmt: skip
            total += tl.sum(operand(weight_ptr, 0, c, 0, inside, ACC) * grad * normal, axis=1)
        mean = (total / group)[:, None]

        # What a lane adds to below, another lane may have stored in the tile before.
        tl.debug_barrier()
        for channel in range(0, group, BLOCK):
            row, c, inside = tile(first, end, channel, group, ROWS, BLOCK)
            s, normal, dy, grad, z = operands_of_backward(
                dy_ptr, total_ptr, rest_ptr, z_ptr, row, c, dy_stride, total_stride, rest_stride, z_stride, rstd,
                inside, GATE_AFTER, ACC,
            )  # fmt: skip
            within = channel + i < group
            part = tl.program_id(0).to(tl.int64) * dim + tl.program_id(1) * group + channel + i
            dweight = tl.load(dweight_ptr + part, mask=within, other=0.0) + tl.sum(grad * normal, axis=0)
            tl.store(dweight_ptr + part, dweight, mask=within)
            if dbias_ptr is not None:
                dbias = tl.load(dbias_ptr + part, mask=within, other=0.0) + tl.sum(grad, axis=0)
                tl.store(dbias_ptr + part, dbias, mask=within)
            weight = operand(weight_ptr, 0, c, 0, inside, ACC)
            put_gradients(
                dx_ptr, dz_ptr, dtotal_ptr, z_ptr, bias_ptr, row, c, dim, dtotal_stride, inside,
                s, normal, dy, grad, z, weight, rstd, mean, GATE_AFTER, ACC,
            )  # fmt: skip


def configuration(group: int, acc: torch.dtype) -> dict[str, object]:
    """Tile and warps for groups of this many channels: 1 to 16 rows of narrow groups, 2 rows of a chunk of wide ones."""
    block = triton.next_power_of_2(group) if group <= NARROW else 1024
    rows = 2 if group > NARROW else max(1, min(16, 1024 // block))
    if interpreted():
        rows = max(rows, min(256, (1 << 16) // block))
    # 8 numbers of each operand per thread; twice the warps for float64, whose numbers take two registers
    warps = min(16, max(1, rows * block // 256) * (2 if acc == torch.float64 else 1))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps, **register_limit(min(255, 2048 // warps))}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None, eps: float,
    group_size: int, norm_before_gate: bool, total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(y, x + residual or None, rstd); x, residual and z are (rows, dim), rstd (rows, ngroups)."""
    (nrows, dim), acc = x.shape, acc_dtype(x.dtype)
    ngroups = dim // group_size
    y = x.new_empty(nrows, dim)
    total = None if residual is None else x.new_empty(nrows, dim, dtype=total_dtype)
    rstd = x.new_empty(nrows, ngroups, dtype=acc)
    if y.numel() > 0:
        tiles = configuration(group_size, acc)
        with on_device_of(x):
            kernel = rms_norm_fwd_kernel if group_size <= NARROW else rms_norm_wide_fwd_kernel
            kernel[(triton.cdiv(nrows, tiles["ROWS"]), ngroups)](
                x, weight, bias, residual, z, y, total, rstd,
                nrows, dim, group_size, ngroups, stride(x), stride(residual), stride(z), *in_two_parts(eps),
                GATE_AFTER=norm_before_gate, ACC=element(acc), **tiles,
            )  # fmt: skip
    return y, total, rstd


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None,
    z: Tensor | None, rstd: Tensor, group_size: int, norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx in the dtype of total, dweight, dbias, dz), None where the input is None; total + rest was normalised."""
    (nrows, dim), acc = total.shape, weight.dtype
    tiles = configuration(group_size, acc)
    # Enough programs to fill the device; each sums its rows before it keeps a partial sum.
    nblocks = max(1, min(triton.cdiv(nrows, tiles["ROWS"]), 4 * multiprocessors(total.device)))
    dx = total.new_empty(nrows, dim)
    dz = None if z is None else z.new_empty(nrows, dim)
    dweight = weight.new_zeros(nblocks, dim)
    dbias = None if bias is None else weight.new_zeros(nblocks, dim)
    if dx.numel() > 0:
        with on_device_of(total):
            kernel = rms_norm_bwd_kernel if group_size <= NARROW else rms_norm_wide_bwd_kernel
            kernel[(nblocks, dim // group_size)](
                dy, dtotal, total, rest, weight, bias, z, rstd, dx, dweight, dbias, dz,
                nrows, dim, group_size, dim // group_size,
                stride(dy), stride(dtotal), stride(total), stride(rest), stride(z),
                triton.cdiv(triton.cdiv(nrows, nblocks), tiles["ROWS"]) * tiles["ROWS"],
                GATE_AFTER=norm_before_gate, ACC=element(acc), **tiles,
            )  # fmt: skip
    return dx, sum_parts(dweight, acc), None if dbias is None else sum_parts(dbias, acc), dz


def stride(rows: Tensor | None) -> int:
    """Elements from one row to the next."""
    return 0 if rows is None else rows.stride(0)


def element(acc: torch.dtype) -> tl.dtype:
    """The accumulation type in the kernel."""
    return tl.float64 if acc == torch.float64 else tl.float32


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward: small, usual and largest groups; plain, and with every option in both orders of the gate."""

    def call(dtype: torch.dtype, dim: int, full: bool, before: bool) -> None:
        x, weight = torch.empty(64, dim, dtype=dtype, device="meta"), torch.empty(dim, device="meta")
        wide = torch.empty(64, dim, device="meta")
        bias, residual, z = (weight, wide, x) if full else (None, None, None)
        y, total, rstd = forward(x, weight, bias, residual, z, 1e-5, dim, before, torch.float32)
        backward(y, total, x if total is None else total, None, weight, bias, z, rstd, dim, before)

    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 768, 4096, 16384):
            for full, before in ((False, True), (True, True), (True, False)):
                label = f"{str(dtype).removeprefix('torch.')}, {dim} channels"
                options = f", every option, gate {'after' if before else 'before'}" if full else ""
                yield label + options, partial(call, dtype, dim, full, before)
