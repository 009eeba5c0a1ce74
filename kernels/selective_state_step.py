"""Triton kernel of selective_state_step: one token of the selective scan, the state updated in place."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, on_device_of
from .math import LOG2E, rounded, silu, softplus


@triton.jit
def selective_state_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, slots_ptr, y_ptr,
    dim, dstate, nslots, per_group_B, per_group_C, x_stride, dt_stride, z_stride, B_stride, C_stride,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one row. state (slots, dim, dstate); x, dt, z, y (batch, dim); A (dim, dstate)."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < dim
    in_DN = in_d[:, None] & (n < dstate)[None, :]
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    used = (slot >= 0) & (slot < nslots)
    state_DN = (tl.minimum(tl.maximum(slot, 0), nslots - 1) * dim + d)[:, None] * dstate + n[None, :]

    x_D = tl.load(x_ptr + b * x_stride + d, mask=in_d, other=0.0).to(ACC)
    dt_D = tl.load(dt_ptr + b * dt_stride + d, mask=in_d, other=0.0).to(ACC)
    A_DN = tl.load(A_ptr + d[:, None] * dstate + n[None, :], mask=in_DN, other=0.0)
    B_DN = tl.load(B_ptr + b * B_stride + (d // per_group_B)[:, None] * dstate + n[None, :], mask=in_DN, other=0.0)
    C_DN = tl.load(C_ptr + b * C_stride + (d // per_group_C)[:, None] * dstate + n[None, :], mask=in_DN, other=0.0)
    h_DN = tl.load(state_ptr + state_DN, mask=in_DN, other=0.0).to(ACC)

    if dt_bias_ptr is not None:
        dt_D += tl.load(dt_bias_ptr + d, mask=in_d, other=0.0)
    if SOFTPLUS:
        dt_D = softplus(dt_D)
    h_DN = tl.exp2((dt_D * LOG2E)[:, None] * A_DN) * h_DN + (dt_D * x_D)[:, None] * B_DN.to(ACC)
    y_D = tl.sum(h_DN * C_DN.to(ACC), axis=1)
    if D_ptr is not None:
        y_D += tl.load(D_ptr + d, mask=in_d, other=0.0) * x_D
    if z_ptr is not None:
        y_D *= silu(tl.load(z_ptr + b * z_stride + d, mask=in_d, other=0.0).to(ACC))

    tl.store(state_ptr + state_DN, rounded(h_DN, state_ptr), mask=in_DN & used)
    tl.store(y_ptr + b * dim + d, rounded(tl.where(used, y_D, 0.0), y_ptr), mask=in_d)


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, state_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """y (batch, dim); `state` is updated in place."""
    (batch, dim), dstate = x.shape, A.shape[1]
    y = x.new_empty(batch, dim)
    if y.numel() == 0:
        return y
    block_n = triton.next_power_of_2(max(1, dstate))
    # a tile of about 512 states: four warps hold four of each operand per thread
    block_d = max(1, (1 << 16 if interpreted() else 512) // block_n)
    block_d = min(block_d, triton.next_power_of_2(dim))
    strides = [0 if rows is None else rows.stride(0) for rows in (x, dt, z, B, C)]
    with on_device_of(x):
        selective_state_step_kernel[(batch, triton.cdiv(dim, block_d))](
            state, x, dt, A, B, C, D, z, dt_bias, state_indices, y,
            dim, dstate, state.shape[0], dim // B.shape[1], dim // C.shape[1], *strides,
            SOFTPLUS=dt_softplus, ACC=tl.float64 if acc_dtype(x.dtype) == torch.float64 else tl.float32,
            BLOCK_D=block_d, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return y


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Usual and large states, plain and with every option."""

    def call(dtype: torch.dtype, dstate: int, full: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        x, B = tensor(4, 256, dtype=dtype), tensor(4, 1, dstate, dtype=dtype)
        D = tensor(256) if full else None
        slots = tensor(4, dtype=torch.int64) if full else None
        state, A = tensor(8, 256, dstate), tensor(256, dstate)
        step(state, x, x, A, B, B, D, x if full else None, D, full, slots)

    for dtype in (torch.float32, torch.bfloat16):
        for dstate in (16, 128):
            for full in (False, True):
                label = f"{str(dtype).removeprefix('torch.')}, {dstate} states{', every option' if full else ''}"
                yield label, partial(call, dtype, dstate, full)
