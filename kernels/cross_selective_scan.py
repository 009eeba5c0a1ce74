"""cross_selective_scan on Triton: the kernels of selective_scan, one path after the other over the same tokens.

Every path reads and writes views of tensors whose rows lie in the order of x. What all paths share (y, dx, dz) is added up
in the kernels in the order of the paths: in place where it is of the states' dtype, else in one tensor of that dtype and
rounded by the last path. The launches of one call follow each other on a stream, so that the sums have one order.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .launch import acc_dtype, register_limit
from .selective_scan import launch_backward, launch_forward
from .selective_scan_walk import CHECKPOINT_EVERY, Launch, launch_of

Walks = list[tuple[Tensor | None, Tensor | None, bool]]  # per path: order, flags, reverse


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, walks: Walks, dt_softplus: bool, merged: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and with `save` the checkpoints of every path that `backward` takes."""
    (batch, seqlen, dim), (npaths, _, dstate) = x.shape, A.shape
    y = x.new_empty(x.shape if merged else (batch, seqlen, npaths, dim))
    slots = batch * -(-seqlen // CHECKPOINT_EVERY.value)
    checkpoints = A.new_empty(npaths, slots if save else 0, dstate, dim)
    y_sum = RunningSum(y, npaths) if merged else None
    for k in range(npaths):
        call = _launch(k, x, dt, A, B, C, z, dt_weight, walks, dt_softplus)
        before, target = (None, y[:, :, k]) if y_sum is None else y_sum.at(k)
        own = (A[k], *(None if t is None else t[k] for t in (D, dt_bias)))
        launch_forward(call, *own, None, target, before, checkpoints[k] if save else None)
    return y, checkpoints


def backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, walks: Walks, checkpoints: Tensor, dt_softplus: bool, merged: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and dt_weight; None where the input is None.

    With dt_weight, the gradient of one path's expanded dt stands in memory at a time, for two matrix products.
    """
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, ddt_weight = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (x, dt, A, B, C, D, z, dt_bias, dt_weight)
    )
    assert dx is not None and ddt is not None
    npaths = len(A)
    dx_sum, dz_sum = (None if t is None else RunningSum(t, npaths) for t in (dx, dz))
    assert dx_sum is not None
    expanded = None if dt_weight is None else torch.empty(x.shape, dtype=dt_weight.dtype, device=x.device)
    for k in range(npaths):
        call = _launch(k, x, dt, A, B, C, z, dt_weight, walks, dt_softplus)
        dx_before, dx_target = dx_sum.at(k)
        dz_before, dz_target = (None, None) if dz_sum is None else dz_sum.at(k)
        own = (A[k], *(None if t is None else t[k] for t in (D, dt_bias)))
        sums = launch_backward(
            call, dy if merged else dy[:, :, k], None, *own, checkpoints[k],
            dx_target, ddt[:, :, k] if expanded is None else expanded, dz_target, dx_before, dz_before, None,
        )  # fmt: skip
        per_token = [None if t is None else t[:, :, k] for t in (dB, dC)]
        per_path = [None if t is None else t[k] for t in (dA, dD, ddt_bias)]
        for out, of_path in zip((per_path[0], *per_token, *per_path[1:]), sums, strict=True):
            if out is not None and of_path is not None:
                out.copy_(of_path)
        if expanded is not None and dt_weight is not None and ddt_weight is not None:
            rows, low = expanded.flatten(0, 1), dt[:, :, k].flatten(0, 1).to(expanded.dtype)
            ddt[:, :, k] = (rows @ dt_weight[k]).view_as(ddt[:, :, k])
            torch.mm(rows.T, low, out=ddt_weight[k])
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, ddt_weight


class RunningSum:
    """A tensor that several paths add to, kept in the dtype of the states until the last of them."""

    def __init__(self, out: Tensor, npaths: int) -> None:
        acc = acc_dtype(out.dtype)
        self.out, self.last = out, npaths - 1
        self.sum = out if acc == out.dtype or npaths == 1 else torch.empty(out.shape, dtype=acc, device=out.device)

    def at(self, k: int) -> tuple[Tensor | None, Tensor]:
        """What path k adds to, or None for the first, and where it writes."""
        return (self.sum if k else None), (self.out if k == self.last else self.sum)


def _launch(
    k: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_weight: Tensor | None,
    walks: Walks, dt_softplus: bool,
) -> Launch:  # fmt: skip
    order, flags, reverse = walks[k]
    per_token = (t[:, :, k] for t in (dt, B, C))
    dt, B, C = per_token
    weight = None if dt_weight is None else dt_weight[k].T.contiguous()
    call = launch_of(x, dt, A[k], B, C, z, order, flags, None, dt_softplus, reverse, None, weight)
    return call._replace(options=call.options | register_limit(224))


def shipped_configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tests/kernels/test_compile.py compiles ahead of time: a label and a call on `meta` tensors, each."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "fp32, 1 state", partial(_both, fp32, dstate=1)
    yield "bf16, 1 state", partial(_both, bf16, dstate=1)
    yield "fp32", partial(_both, fp32)
    yield "bf16", partial(_both, bf16)
    yield "bf16, gate, flags", partial(_both, bf16, gate=True, flags=True)
    yield "bf16, kept apart", partial(_both, bf16, merged=False)
    yield "fp32, low-rank dt", partial(_both, fp32, rank=12)
    yield "bf16, 1 state, low-rank dt", partial(_both, bf16, dstate=1, rank=6)
    yield "bf16, low-rank dt of 64", partial(_both, bf16, rank=64)


def _both(
    dtype: torch.dtype, *, dstate: int = 16, rank: int = 0, gate: bool = False, flags: bool = False, merged: bool = True
) -> None:
    batch, seqlen, npaths, dim = 8, 3136, 3, 192

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dt = tensor(batch, seqlen, dim), tensor(batch, seqlen, npaths, rank or dim)
    dt_weight = tensor(npaths, dim, rank, dtype=torch.float32) if rank else None
    A, vector = tensor(npaths, dim, dstate, dtype=torch.float32), tensor(npaths, dim, dtype=torch.float32)
    weight = tensor(batch, seqlen, npaths, 1, dstate)
    order = tensor(seqlen, dtype=torch.int32)
    marks = tensor(batch, seqlen, dtype=torch.uint8) if flags else None
    walks: Walks = [(order, marks, False), (None, marks, False), (order, marks, True)]
    inputs = (x, dt, A, weight, weight, vector, x if gate else None, vector, dt_weight, walks)
    checkpoints = forward(*inputs, True, merged, True)[1]
    backward(x if merged else tensor(batch, seqlen, npaths, dim), *inputs, checkpoints, True, merged)
