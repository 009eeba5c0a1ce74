"""Selective scans of the same tokens along several paths, added up: what VMamba calls cross scan, scan and cross merge.

    h_p = exp(dt_kl A_k) * h_{p-1} + dt_kl B_kl x_l         (2a) with (4), first order in dt for B; l = path_k[p]
    y_l = sum_k (C_kl . h_p + D_k x_l)                      (2b), then y_l * silu(z_l) if gated

Numbers follow Gu & Dao 2023, "Mamba", arXiv:2312.00752; the sum over paths is that of Liu et al. 2024, "VMamba",
arXiv:2401.10166.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_flag,
    check_ndim,
    check_shape,
    check_sizes,
    parameter_dtypes,
)
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, path_rows, present
from ssmkit.ops._walk import checkpoint_slots, flags_of, with_restarts
from ssmkit.ops.selective_scan import CHECKPOINT_EVERY, selective_scan_ref
from ssmkit.paths import ScanPath

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.cross_selective_scan_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.cross_selective_scan"),
    Backend("cpu", device="cpu", module="ssmkit.native.cross_selective_scan"),
)
MERGES = ("sum", "stack")


def cross_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Sequence[ScanPath],
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_softplus: bool = False,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
    merge: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Selective state-space scans of the same tokens along several paths, each with parameters of its own.

        dt_kl <- dt_weight_k dt_kl                                  where dt_weight is given
        dt_kl <- softplus(dt_kl + dt_bias_k)                        where asked
        h_p = exp(dt_kl A_k) * h_{p-1} + dt_kl B_kl x_l             (2a) with (4); path k visits l at its position p
        y_l = (sum_k C_kl . h_p + D_k x_l) * silu(z_l)              (2b)

    Numbers follow Gu & Dao 2023, "Mamba", arXiv:2312.00752; the paths of VMamba are `ssmkit.paths.cross`. It is the sum
    of `selective_scan(x, dt[:, :, k], A[k], B[:, :, k], ..., path=paths[k])` over k. Every tensor has its tokens in the
    order of x, whatever the paths: nothing is rearranged, and one projection makes dt, B and C of all paths.

    Args:
        x: Input, shared by all paths             (batch, seqlen, dim)           fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, seqlen, npaths, dim)   as x; with dt_weight their low-rank form,
            (batch, seqlen, npaths, rank)
        A: Decay rates, negative                  (npaths, dim, dstate)          fp32 (fp64 with x)
        B, C: Input and output weights, (batch, seqlen, npaths, dstate) or (batch, seqlen, npaths, ngroups, dstate), as x;
            channel d reads group d // (dim // ngroups)
        paths: Order in which each path visits the tokens; its restarts act like `resets` for that path.
        D: Skip weights                           (npaths, dim)                  float
        z: Gate logits                            (batch, seqlen, dim)           as x
        dt_bias: Added to dt before softplus      (npaths, dim)                  float
        dt_weight: What expands dt from its low-rank form, in fp32 (fp64) inside the kernels: no tensor of the step sizes
            of all paths is made. A path's ddt is, for a while, in backward on a GPU. (npaths, dim, rank)  float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        resets: Tokens that drop the state before them, on every path            (batch, seqlen)  bool
        mask: True at real tokens; a pad leaves the states untouched, its y is 0 and it gets no gradient.
                                                  (batch, seqlen)                bool
        merge: "sum" adds up the outputs of the paths; "stack" keeps them apart, each gated by z.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape of x, or with "stack" (batch, seqlen, npaths, dim), in the dtype of x. States, and sums over paths,
        are kept in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    paths = tuple(paths)
    check(x, dt, A, B, C, paths, D, z, dt_bias, dt_weight, resets, mask, merge)
    acc = acc_dtype(x.dtype)
    A = A.to(acc)
    B, C = (weight.unsqueeze(3) if weight.ndim == 4 else weight for weight in (B, C))
    D, dt_bias, dt_weight = (None if given is None else given.to(acc) for given in (D, dt_bias, dt_weight))
    orders = [path.order(x.device) for path in paths]
    plain = flags_of(resets, mask)
    flags = [
        plain if path.restarts(x.device) is None else flags_of(with_restarts(resets, path, x), mask) for path in paths
    ]
    walks = (*_stacked(orders), *_stacked(flags), [path.reversed for path in paths])

    merged = merge == "sum"
    tensors = (x, dt, A, B, C, D, z, dt_bias, dt_weight)
    chosen = choose("cross_selective_scan", BACKENDS, backend, x)
    if chosen == "reference":
        return cross_selective_scan_ref(*tensors, resets, mask, paths, dt_softplus, merged)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = cross_selective_scan_fwd(*tensors, *walks, dt_softplus, merged, save, chosen)
    return y


def _stacked(tables: list[Tensor | None]) -> tuple[Tensor | None, list[int]]:
    """The tables that are there in one tensor, and for each of all its place in it or -1. Often one serves all."""
    there = [table for table in tables if table is not None]
    if not there:
        return None, [-1] * len(tables)
    if all(table is there[0] for table in there):
        return there[0].unsqueeze(0), [-1 if table is None else 0 for table in tables]
    places = iter(range(len(there)))
    return torch.stack(there), [-1 if table is None else next(places) for table in tables]


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: tuple[ScanPath, ...],
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    merge: str,
) -> None:
    """Refuse what no backend may see."""
    check_ndim("x", x, "batch, seqlen, dim")
    check_dtype("x", x, FLOATS)
    check_sizes(x)
    batch, seqlen, dim = x.shape
    npaths = len(paths)
    if not npaths:
        raise ValueError("paths must hold at least one ScanPath, got none")
    for k, path in enumerate(paths):
        if path.length != seqlen:
            raise ValueError(f"paths[{k}] must visit {seqlen} tokens like x, got {path.length}")
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}; got {merge!r}")
    check_ndim("A", A, "npaths, dim, dstate")
    dstate = A.shape[2]
    check_shape("A", A, (npaths, dim, dstate), "npaths, dim, dstate")
    if dt_weight is None:
        check_shape("dt", dt, (batch, seqlen, npaths, dim), "batch, seqlen, npaths, dim")
    else:
        check_ndim("dt_weight", dt_weight, "npaths, dim, rank")
        rank = dt_weight.shape[2]
        check_shape("dt_weight", dt_weight, (npaths, dim, rank), "npaths, dim, rank")
        check_shape("dt", dt, (batch, seqlen, npaths, rank), "batch, seqlen, npaths, rank of dt_weight")
        if rank < 1:
            raise ValueError("dt_weight must have a rank of at least 1, got 0")
    if z is not None:
        check_shape("z", z, x.shape, "batch, seqlen, dim")
    for name, weight in (("B", B), ("C", C)):
        middle = tuple(weight.shape[3:-1]) if weight.ndim == 5 else ()
        check_shape(name, weight, (batch, seqlen, npaths, *middle, dstate), "batch, seqlen, npaths, [ngroups,] dstate")
        ngroups = middle[0] if middle else 1
        if ngroups < 1 or dim % ngroups:
            raise ValueError(f"{name} has {ngroups} groups, which must divide dim {dim}")
    for name, tensor in (("dt", dt), ("z", z), ("B", B), ("C", C)):
        if tensor is not None:
            check_dtype(name, tensor, (x.dtype,), "like x")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_shape(name, vector, (npaths, dim), "npaths, dim")
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias), ("dt_weight", dt_weight)):
        if tensor is not None:
            check_dtype(name, tensor, *parameter_dtypes(x))
    check_flag("resets", resets, batch, seqlen)
    check_flag("mask", mask, batch, seqlen)
    check_device(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, dt_weight=dt_weight, resets=resets, mask=mask)


def cross_selective_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    paths: Sequence[ScanPath],
    dt_softplus: bool,
    merged: bool,
) -> Tensor:
    """One scan per path by the reference of `selective_scan`, in float64, then their sum."""
    x_BLD = x.double()
    if dt_weight is not None:
        dt = torch.einsum("blkr,kdr->blkd", dt.double(), dt_weight.double())
    y_BLKD = []
    for k, path in enumerate(paths):
        y, _ = selective_scan_ref(
            x_BLD, dt[:, :, k], A[k], B[:, :, k], C[:, :, k], None if D is None else D[k], z,
            None if dt_bias is None else dt_bias[k], None, with_restarts(resets, path, x), mask, None,
            path.order(x.device), dt_softplus, path.reversed,
        )  # fmt: skip
        y_BLKD.append(y)
    stacked = torch.stack(y_BLKD, dim=2)
    return (stacked.sum(2) if merged else stacked).to(x.dtype)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, orders: Tensor | None, orders_at: list[int],
    flags: Tensor | None, flags_at: list[int], reverses: list[bool], dt_softplus: bool, merged: bool, save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = _for_kernels(x, dt, A, B, C, D, z, dt_bias, dt_weight)
    walks = _walks(orders, orders_at, flags, flags_at, reverses)
    return load(BACKENDS, backend).forward(*tensors, walks, dt_softplus, merged, save)


def _for_kernels(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The layout that kernels rely on: tokens in flat rows, of each path dense, parameters dense."""
    x, dt, A, B, C, D, z, dt_bias, dt_weight = tensors
    x, z = (None if t is None else flat_rows(t) for t in (x, z))
    dt, B, C = (None if t is None else path_rows(t) for t in (dt, B, C))
    A, D, dt_bias, dt_weight = (None if t is None else t.contiguous() for t in (A, D, dt_bias, dt_weight))
    return x, dt, A, B, C, D, z, dt_bias, dt_weight


def _walks(
    orders: Tensor | None, orders_at: list[int], flags: Tensor | None, flags_at: list[int], reverses: list[bool]
) -> list[tuple[Tensor | None, Tensor | None, bool]]:
    """Per path the order, the flags and whether it runs backwards, as `selective_scan` takes them."""
    tables = [
        [None if given is None or at < 0 else given[at].contiguous() for at in places]
        for given, places in ((orders, orders_at), (flags, flags_at))
    ]
    return list(zip(*tables, reverses, strict=True))


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, orders: Tensor | None, orders_at: list[int],
    flags: Tensor | None, flags_at: list[int], reverses: list[bool], dt_softplus: bool, merged: bool, save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, seqlen, dim), (npaths, _, dstate) = x.shape, A.shape
    slots = checkpoint_slots(batch, seqlen, batch, CHECKPOINT_EVERY, packed=False) if save else 0
    y = x.new_empty(x.shape) if merged else x.new_empty(batch, seqlen, npaths, dim)
    return y, A.new_empty(npaths, slots, dstate, dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, orders, orders_at, flags, flags_at, reverses, dt_softplus, merged, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        walks = (orders, orders_at, flags, flags_at, reverses)
        output = cross_selective_scan_fwd(*tensors, *walks, dt_softplus, merged, True, backend)
    ctx.save_for_backward(*tensors, orders, flags, output[1])
    ctx.walks = (orders_at, flags_at, reverses)
    ctx.options = (dt_softplus, merged, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 18
    *tensors, orders, flags, checkpoints = ctx.saved_tensors
    orders_at, flags_at, reverses = ctx.walks
    walks = (orders, orders_at, flags, flags_at, reverses)
    grads = cross_selective_scan_bwd(dy, *tensors, *walks, checkpoints, *ctx.options)
    return (*gradients(grads, tensors), *[None] * 9)


def _backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, orders: Tensor | None, orders_at: list[int],
    flags: Tensor | None, flags_at: list[int], reverses: list[bool], checkpoints: Tensor, dt_softplus: bool,
    merged: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = _for_kernels(x, dt, A, B, C, D, z, dt_bias, dt_weight)
    walks = _walks(orders, orders_at, flags, flags_at, reverses)
    dy = flat_rows(dy) if merged else path_rows(dy)
    return present(load(BACKENDS, backend).backward(dy, *tensors, walks, checkpoints, dt_softplus, merged), x)


def _backward_fake(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_weight: Tensor | None, orders: Tensor | None, orders_at: list[int],
    flags: Tensor | None, flags_at: list[int], reverses: list[bool], checkpoints: Tensor, dt_softplus: bool,
    merged: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_weight)
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in inputs)


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? dt_weight, "
    "Tensor? orders, int[] orders_at, Tensor? flags, int[] flags_at, bool[] reverses"
)
cross_selective_scan_bwd = define(
    f"cross_selective_scan_bwd(Tensor dy, {_INPUTS}, Tensor checkpoints, bool dt_softplus, bool merged, str backend) -> "
    f"({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
cross_selective_scan_fwd = define(
    f"cross_selective_scan_fwd({_INPUTS}, bool dt_softplus, bool merged, bool save, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
