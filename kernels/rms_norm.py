"""Triton kernels of rms_norm.

    s = x + residual;  v = s (* silu(z));  y = v / sqrt(mean(v^2) + eps) * weight + bias (* silu(z))

One program holds ROWS rows of one group of channels. Backward programs take the rows block by block and keep the partial
sums of dweight and dbias in registers; the blocks are added in order afterwards.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, multiprocessors, on_device_of, sum_parts
from .math import rounded, silu, silu_grad


@triton.jit
def tile(first, nrows, group, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, channels and mask of a tile of the group given by program axis 1."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    i = tl.arange(0, BLOCK)
    return row[:, None], (tl.program_id(1) * group + i)[None, :], (row < nrows)[:, None] & (i < group)[None, :]


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, z_ptr, y_ptr, total_ptr, rstd_ptr,
    nrows, dim, group, ngroups, x_stride, residual_stride, z_stride, eps,
    GATE_AFTER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, residual, z (nrows, dim) with row strides; y, total (nrows, dim); rstd (nrows, ngroups)."""
    row, c, inside = tile(tl.program_id(0).to(tl.int64) * ROWS, nrows, group, ROWS, BLOCK)
    v = tl.load(x_ptr + row * x_stride + c, mask=inside, other=0.0).to(ACC)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + row * residual_stride + c, mask=inside, other=0.0).to(ACC)
        tl.store(total_ptr + row * dim + c, rounded(v, total_ptr), mask=inside)
    if z_ptr is not None:
        gate = silu(tl.load(z_ptr + row * z_stride + c, mask=inside, other=0.0).to(ACC))
        if not GATE_AFTER:
            v *= gate

    every = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rstd = 1.0 / tl.sqrt(tl.where(every < nrows, tl.sum(v * v, axis=1) / group + eps, 1.0))
    y = v * rstd[:, None] * tl.load(weight_ptr + c, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0)
    if z_ptr is not None and GATE_AFTER:
        y *= gate

    tl.store(y_ptr + row * dim + c, rounded(y, y_ptr), mask=inside)
    tl.store(rstd_ptr + every * ngroups + tl.program_id(1), rstd, mask=every < nrows)


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
        row, c, inside = tile(first, end, group, ROWS, BLOCK)
        every = first + tl.arange(0, ROWS).to(tl.int64)
        v = tl.load(total_ptr + row * total_stride + c, mask=inside, other=0.0).to(ACC)
        if rest_ptr is not None:
            v += tl.load(rest_ptr + row * rest_stride + c, mask=inside, other=0.0).to(ACC)
        grad = tl.load(dy_ptr + row * dy_stride + c, mask=inside, other=0.0).to(ACC)
        rstd = tl.load(rstd_ptr + every * ngroups + tl.program_id(1), mask=every < end, other=0.0)[:, None]
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_stride + c, mask=inside, other=0.0).to(ACC)
        if z_ptr is not None and GATE_AFTER:
            ungated = v * rstd * weight
            if bias_ptr is not None:
                ungated += tl.load(bias_ptr + c, mask=inside, other=0.0)
            tl.store(dz_ptr + row * dim + c, rounded(grad * ungated * silu_grad(z), dz_ptr), mask=inside)
            grad *= silu(z)

        normal = v * rstd
        if z_ptr is not None and not GATE_AFTER:
            normal *= silu(z)
        dweight += tl.sum(grad * normal, axis=0)
        dbias += tl.sum(grad, axis=0)
        grad *= weight
        dv = (grad - normal * (tl.sum(grad * normal, axis=1) / group)[:, None]) * rstd

        if z_ptr is not None and not GATE_AFTER:
            tl.store(dz_ptr + row * dim + c, rounded(dv * v * silu_grad(z), dz_ptr), mask=inside)
            dv *= silu(z)
        if dtotal_ptr is not None:
            dv += tl.load(dtotal_ptr + row * dtotal_stride + c, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + row * dim + c, rounded(dv, dx_ptr), mask=inside)

    part = tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(dweight_ptr + part, dweight, mask=i < group)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part, dbias, mask=i < group)


def configuration(group: int, acc: torch.dtype) -> dict[str, object]:
    """Tile and warps for groups of this many channels: a tile of 1 to 16 rows with about 2048 numbers."""
    block = triton.next_power_of_2(group)
    rows = max(1, min(16, 2048 // block))
    if interpreted():
        rows = max(rows, min(256, (1 << 16) // block))
    # 16 numbers of each operand per thread; twice the warps for float64, whose numbers take two registers
    warps = max(1, min(16, rows * block // 512)) * (2 if acc == torch.float64 else 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, warps)}


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
            rms_norm_fwd_kernel[(triton.cdiv(nrows, tiles["ROWS"]), ngroups)](
                x, weight, bias, residual, z, y, total, rstd,
                nrows, dim, group_size, ngroups, stride(x), stride(residual), stride(z), eps,
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
            rms_norm_bwd_kernel[(nblocks, dim // group_size)](
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
