"""What every launcher needs: the right device, sizes of blocks and grids, and sums over blocks in a fixed order."""

import contextlib
import math
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import rounded

# Grid axes 1 and 2 end at 65535 programs on NVIDIA; axis 0 at 2^31 - 1.
MAX_GRID_YZ = 65535


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, where an operation costs the same however large its block."""
    return bool(triton.knobs.runtime.interpret)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 where there is no GPU, since the interpreter runs one program after another."""
    if device.type != "cuda":
        return 1
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@cache
def warp_size(device: torch.device) -> int:
    """Lanes per warp: 32, or 64 on AMD's CDNA. Asked of the target that is compiled for, so only when compiling."""
    return triton.runtime.driver.active.get_current_target().warp_size


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stride(x: Tensor) -> int:
    """Elements from one token of flat rows to the next; where rows have one token, from one row to the next."""
    return x.stride(1 if x.shape[1] > 1 else 0)


def in_two_parts(value: float) -> tuple[float, float]:
    """A number as fp32, and what that leaves out: Triton hands floats to kernels in fp32. Infinity leaves out nothing."""
    high = float(np.float32(value))
    return high, value - high if math.isfinite(high) else 0.0


def register_limit(registers: int) -> dict[str, int]:
    """Stated where it can be: left to itself, ptxas would rather spill a little than keep fewer programs resident."""
    if interpreted() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": registers}


@triton.jit(do_not_specialize=["nparts"])
def sum_parts_kernel(parts_ptr, out_ptr, nparts, size, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order; parts (nparts, size) in the dtype of the sum."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for _ in range(nparts):
        total += tl.load(parts_ptr + i, mask=mask, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + i, rounded(total, out_ptr), mask=mask)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first axis of a contiguous tensor, always in the same order, rounded to `dtype` at the end."""
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if out.numel() == 0:
        return out
    block = min(1 << 16, triton.next_power_of_2(out.numel())) if interpreted() else 256
    with on_device_of(parts):
        sum_parts_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, len(parts), out.numel(), BLOCK=block, num_warps=4
        )
    return out


def shipped_configurations():
    """What tests/kernels/test_compile.py compiles ahead of time: a label and a call on `meta` tensors, each."""
    for dtype in (torch.float32, torch.bfloat16):
        parts = torch.empty(8, 1024, device="meta")
        yield f"sum to {dtype}", lambda parts=parts, dtype=dtype: sum_parts(parts, dtype)
