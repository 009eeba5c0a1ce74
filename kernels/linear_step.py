"""Triton kernel of linear_step: y = x weight^T + bias for few rows of x, the weight read once for all of them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_dtype, interpreted, on_device_of
from .math import rounded


@triton.jit
def linear_step_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    batch, in_features, out_features, x_stride, weight_stride,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of x, BLOCK_O of the weight. x (batch, in_features), y (batch, out_features)."""
    blocks = tl.cdiv(out_features, BLOCK_O)
    r = tl.program_id(0).to(tl.int64) // blocks * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0).to(tl.int64) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_r, in_o = r < batch, o < out_features

    sums_ROI = tl.zeros((ROWS, BLOCK_O, BLOCK_I), ACC)
    for first in range(0, in_features, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        in_i = i < in_features
        x_RI = tl.load(x_ptr + (r * x_stride)[:, None] + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0.0)
        w_OI = tl.load(
            weight_ptr + (o * weight_stride)[:, None] + i[None, :], mask=in_o[:, None] & in_i[None, :], other=0.0
        )
        sums_ROI += x_RI.to(ACC)[:, None, :] * w_OI.to(ACC)[None, :, :]
    y_RO = tl.sum(sums_ROI, axis=2)
    if bias_ptr is not None:
        y_RO += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(ACC)[None, :]

    at = (r * out_features)[:, None] + o[None, :]
    tl.store(y_ptr + at, rounded(y_RO, y_ptr), mask=in_r[:, None] & in_o[None, :])


def step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (batch, out_features) in the dtype of x; both inputs with dense rows."""
    (batch, in_features), out_features = x.shape, weight.shape[0]
    y = x.new_empty((batch, out_features))
    if y.numel() == 0:
        return y
    # The sums of one program are 64 registers a thread at most.
    rows = min(triton.next_power_of_2(batch), 4 if x.dtype == torch.float64 else 8)
    block_o, block_i = (128, 128) if interpreted() else (8, 128)
    with on_device_of(x):
        linear_step_kernel[(triton.cdiv(out_features, block_o) * triton.cdiv(batch, rows),)](
            x, weight, bias, y,
            batch, in_features, out_features, x.stride(0), weight.stride(0),
            ACC=tl.float64 if acc_dtype(x.dtype) == torch.float64 else tl.float32,
            ROWS=rows, BLOCK_O=block_o, BLOCK_I=block_i, num_warps=4,
        )  # fmt: skip
    return y


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """One row and eight."""

    def call(dtype: torch.dtype, batch: int) -> None:
        tensor = partial(torch.empty, device="meta", dtype=dtype)
        step(tensor(batch, 768), tensor(3072, 768), tensor(3072))

    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            yield f"{str(dtype).removeprefix('torch.')}, batch {batch}", partial(call, dtype, batch)
