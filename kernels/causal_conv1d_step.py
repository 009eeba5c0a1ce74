"""Triton kernel of causal_conv1d_step: the next tokens of a causal convolution, the state updated in place."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, on_device_of, register_limit
from .math import rounded, silu


@triton.jit(do_not_specialize=["seqlen"])
def causal_conv1d_step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, seen_ptr, slots_ptr, y_ptr,
    seqlen, dim, nslots, state_len, x_batch_stride, x_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of one row. x, y (batch, seqlen, dim); state (slots, state_len, dim)."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    used = in_d & (slot >= 0) & (slot < nslots)
    x_ptr += b * x_batch_stride + d
    y_ptr += b * seqlen * dim + d
    state_ptr += tl.minimum(tl.maximum(slot, 0), nslots - 1) * state_len * dim + d
    # In a ring, entry start + i holds the i-th oldest input.
    zero = tl.full((), 0, tl.int64)  # indices that begin with it have 64 bits
    start = zero
    if seen_ptr is not None:
        start += tl.maximum(tl.load(seen_ptr + b), 0) % state_len

    for t in range(seqlen):
        v_D = tl.zeros((BLOCK_D,), ACC)
        if bias_ptr is not None:
            v_D += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(ACC)
        for j in range(WIDTH):
            token = zero + t + j + 1 - WIDTH
            entry = state_len + token
            if seen_ptr is not None:
                entry = (start + entry) % state_len
            w_D = tl.load(weight_ptr + d * WIDTH + j, mask=in_d, other=0.0).to(ACC)
            x_D = tl.load(x_ptr + token * x_stride, mask=used & (token >= 0), other=0.0).to(ACC)
            x_D += tl.load(state_ptr + entry * dim, mask=used & (token < 0), other=0.0).to(ACC)
            v_D += w_D * x_D
        if SILU:
            v_D = silu(v_D)
        v_D = tl.where(used, v_D, 0.0)
        tl.store(y_ptr + (zero + t) * dim, rounded(v_D, y_ptr), mask=in_d)

    # All threads have read what they need before any writes it.
    tl.debug_barrier()
    if seen_ptr is not None:
        for t in range(tl.maximum(seqlen - state_len, 0), seqlen):
            x_D = tl.load(x_ptr + (zero + t) * x_stride, mask=used, other=0.0).to(ACC)
            tl.store(state_ptr + (start + t) % state_len * dim, rounded(x_D, state_ptr), mask=used)
    else:
        for entry in range(state_len):
            token = zero + entry + seqlen - state_len
            x_D = tl.load(x_ptr + token * x_stride, mask=used & (token >= 0), other=0.0).to(ACC)
            from_D = state_ptr + (zero + entry + seqlen) * dim
            x_D += tl.load(from_D, mask=used & (token < 0), other=0.0).to(ACC)
            tl.debug_barrier()
            tl.store(state_ptr + (zero + entry) * dim, rounded(x_D, state_ptr), mask=used)


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
    silu: bool,
) -> Tensor:
    """y like x; `state` is updated in place."""
    batch, dim = x.shape[0], x.shape[-1]
    seqlen = x.shape[1] if x.ndim == 3 else 1
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    block_d = min(1024 if interpreted() else 256, triton.next_power_of_2(dim))
    with on_device_of(x):
        causal_conv1d_step_kernel[(batch, triton.cdiv(dim, block_d))](
            x, state, weight, bias, cache_seqlens, state_indices, y,
            seqlen, dim, state.shape[0], state.shape[1], x.stride(0), x.stride(1) if x.ndim == 3 else 0,
            WIDTH=weight.shape[1], SILU=silu, ACC=tl.float64 if acc_dtype(x.dtype) == torch.float64 else tl.float32,
            BLOCK_D=block_d, num_warps=2, **register_limit(128),
        )  # fmt: skip
    return y


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """One token and a line of state; several tokens, a ring and slots."""

    def call(dtype: torch.dtype, ring: bool) -> None:
        tensor = partial(torch.empty, device="meta")
        x = tensor(4, 3, 1536, dtype=dtype) if ring else tensor(4, 1536, dtype=dtype)
        numbers = tensor(4, dtype=torch.int64) if ring else None
        step(x, tensor(8, 8 if ring else 3, 1536), tensor(1536, 4), tensor(1536), numbers, numbers, True)

    for dtype in (torch.float32, torch.bfloat16):
        for ring in (False, True):
            yield f"{str(dtype).removeprefix('torch.')}, {'a ring' if ring else 'a line'}", partial(call, dtype, ring)
