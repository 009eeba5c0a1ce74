"""Triton kernel of ssd_step: one token of state-space duality, the state updated in place."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, in_two_parts, interpreted, on_device_of
from .math import LOG2E, clamped, rounded, silu, softplus


@triton.jit
def ssd_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, slots_ptr, y_ptr,
    nheads, headdim, dstate, nslots, per_group, x_stride, dt_stride, z_stride, B_stride, C_stride, D_strides, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P channels of one head of one row. state (slots, nheads, headdim, dstate); A (nheads,);
    x, z, y (batch, nheads, headdim); dt (batch, nheads); B, C (batch, ngroups, dstate); dt_min, dt_max in two parts."""
    ACC: tl.constexpr = A_ptr.dtype.element_ty
    b, head = (tl.program_id(0) // nheads).to(tl.int64), tl.program_id(0) % nheads
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p, channel = p < headdim, head * headdim + p
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    used = (slot >= 0) & (slot < nslots)
    row_P = (tl.minimum(tl.maximum(slot, 0), nslots - 1) * nheads * headdim + channel) * dstate

    dt = tl.load(dt_ptr + b * dt_stride + head).to(ACC)
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + head)
    if SOFTPLUS:
        dt = softplus(dt)
    low, high = tl.cast(dt_min[0], ACC) + tl.cast(dt_min[1], ACC), tl.cast(dt_max[0], ACC) + tl.cast(dt_max[1], ACC)
    dt = clamped(dt, low, high)
    decay = tl.exp2(dt * LOG2E * tl.load(A_ptr + head))
    x_P = tl.load(x_ptr + b * x_stride + channel, mask=in_p, other=0.0).to(ACC)

    y_P = tl.zeros((BLOCK_P,), ACC)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < dstate
        in_PN = in_p[:, None] & in_n[None, :]
        weight = head // per_group * dstate + n
        B_N = tl.load(B_ptr + b * B_stride + weight, mask=in_n, other=0.0).to(ACC)
        C_N = tl.load(C_ptr + b * C_stride + weight, mask=in_n, other=0.0).to(ACC)
        h_PN = tl.load(state_ptr + row_P[:, None] + n[None, :], mask=in_PN, other=0.0).to(ACC)
        h_PN = decay * h_PN + (dt * x_P)[:, None] * B_N[None, :]
        y_P += tl.sum(h_PN * C_N[None, :], axis=1)
        tl.store(state_ptr + row_P[:, None] + n[None, :], rounded(h_PN, state_ptr), mask=in_PN & used)

    if D_ptr is not None:
        y_P += tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=in_p, other=0.0) * x_P
    if z_ptr is not None:
        y_P *= silu(tl.load(z_ptr + b * z_stride + channel, mask=in_p, other=0.0).to(ACC))
    tl.store(y_ptr + b * nheads * headdim + channel, rounded(tl.where(used, y_P, 0.0), y_ptr), mask=in_p)


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, state_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """y (batch, nheads, headdim); `state` is updated in place."""
    (batch, nheads, headdim), (ngroups, dstate) = x.shape, B.shape[1:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    # a tile of about 2048 states: four warps hold sixteen of them per thread
    block_n = min(triton.next_power_of_2(max(1, dstate)), 1 << 16 if interpreted() else 256)
    block_p = min(triton.next_power_of_2(headdim), max(1, (1 << 16 if interpreted() else 2048) // block_n))
    strides = [0 if rows is None else rows.stride(0) for rows in (x, dt, z, B, C)]
    with on_device_of(x):
        ssd_step_kernel[(batch * nheads, triton.cdiv(headdim, block_p))](
            state, x, dt, A, B, C, D, z, dt_bias, state_indices, y,
            nheads, headdim, dstate, state.shape[0], nheads // ngroups, *strides,
            (0, 0) if D is None else D.stride(), in_two_parts(dt_min), in_two_parts(dt_max),
            SOFTPLUS=dt_softplus, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return y


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Usual and large states, plain and with every option."""

    def call(dtype: torch.dtype, dstate: int, full: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        acc = acc_dtype(dtype)
        x, dt = tensor(4, 8, 64, dtype=dtype), tensor(4, 8, dtype=dtype)
        B, A = tensor(4, 1, dstate, dtype=dtype), tensor(8, dtype=acc)
        D = tensor(8, 64, dtype=acc) if full else None
        slots = tensor(4, dtype=torch.int64) if full else None
        options = (D, x if full else None, A if full else None, full, 0.0, float("inf"), slots)
        step(tensor(8, 8, 64, dstate, dtype=acc), x, dt, A, B, B, *options)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for dstate in (16, 128):
            for full in (False, True):
                label = f"{str(dtype).removeprefix('torch.')}, {dstate} states{', every option' if full else ''}"
                yield label, partial(call, dtype, dstate, full)
