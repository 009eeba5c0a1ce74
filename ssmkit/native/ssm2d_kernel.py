"""ssm2d_kernel on the CPU: thin calls into csrc/cpu/ssm2d_kernel.cpp. The op layer has checked everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkit.native import DTYPES, library


def forward(A: Tensor, B: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(h, v), each (height, width, ngroups, dstate)."""
    h, v = (torch.empty(height, width, *A.shape[1:], dtype=A.dtype) for _ in range(2))
    library().ssm2d_kernel_forward(
        *_described(A, height, width), A.data_ptr(), B.data_ptr(), (h.data_ptr(), v.data_ptr())
    )
    return h, v


def backward(dh: Tensor, dv: Tensor, A: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dB)"""
    dA, dB = torch.empty_like(A), A.new_empty(2, *A.shape[1:])
    library().ssm2d_kernel_backward(
        *_described(A, *h.shape[:2]),
        A.data_ptr(),
        tuple(t.data_ptr() for t in (dh, dv, h, v)),
        (dA.data_ptr(), dB.data_ptr()),
    )
    return dA, dB


def _described(A: Tensor, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Modes and sizes in the order of csrc/bindings/ssm2d_kernel.cpp."""
    return (DTYPES[A.dtype], torch.get_num_threads()), (height, width, A.shape[1] * A.shape[2])
