"""One token of the selective scan, with the state updated in place: decoding, roll-outs, control loops.

    h <- exp(dt A) * h + dt B x
    y = (C . h + D x) * silu(z)

The recurrence of `selective_scan` (Gu & Dao 2023, arXiv:2312.00752) at one token. There is no gradient: training walks
whole sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_ndim,
    check_shape,
    check_slots,
    check_step_state,
    parameter_dtypes,
)
from ssmkit.ops._define import acc_dtype, define
from ssmkit.ops._walk import step_sizes

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.selective_state_step_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.selective_state_step"),
    Backend("cpu", device="cpu", module="ssmkit.native.selective_state_step"),
)


def selective_state_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `selective_scan`; `state` is updated in place.

        dt <- softplus(dt + dt_bias)        where asked
        h <- exp(dt A) * h + dt B x
        y = (C . h + D x) * silu(z)

    Gu & Dao 2023, "Mamba", arXiv:2312.00752. Not differentiable: inputs that require a gradient are taken as constants.

    Args:
        state: h, computed in fp32 (fp64 for fp64 x) and kept in its own dtype  (slots, dim, dstate)  float, contiguous
        x: Input                                  (batch, dim)               fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, dim)               as x
        A: Decay rates, negative                  (dim, dstate)              float
        B, C: Input and output weights            (batch, dstate) or (batch, ngroups, dstate)  as x; channel d reads
            group d // (dim // ngroups)
        D: Skip weights                           (dim,)                     float
        z: Gate logits                            (batch, dim)               as x
        dt_bias: Added to dt before softplus      (dim,)                     float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        state_indices: Slot of each row of the batch, no slot twice; a negative one leaves its y at 0 and no state is
            touched. Without it slot b belongs to row b.  (batch,)  int32 or int64
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x.
    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_indices)
    acc = acc_dtype(x.dtype)
    A = A.to(acc)
    D, dt_bias = None if D is None else D.to(acc), None if dt_bias is None else dt_bias.to(acc)
    B, C = (weight.unsqueeze(1) if weight.ndim == 2 else weight for weight in (B, C))
    chosen = choose("selective_state_step", BACKENDS, backend, x)
    if chosen == "reference":
        check_slots(state_indices, state.shape[0])
        with torch.no_grad():
            return selective_state_step_ref(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices)
    return selective_state_step_op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices, chosen)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    check_ndim("x", x, "batch, dim")
    check_dtype("x", x, FLOATS)
    batch, dim = x.shape
    check_ndim("A", A, "dim, dstate")
    dstate = A.shape[1]
    check_shape("A", A, (dim, dstate), "dim, dstate")
    check_step_state(state, (dim, dstate), "slots, dim, dstate", x, state_indices)
    check_dtype("A", A, *parameter_dtypes(x))
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None:
            check_shape(name, tensor, (batch, dim), "batch, dim")
            check_dtype(name, tensor, (x.dtype,), "like x")
    for name, weight in (("B", B), ("C", C)):
        ngroups = weight.shape[1] if weight.ndim == 3 else 1
        middle = (ngroups,) if weight.ndim == 3 else ()
        check_shape(name, weight, (batch, *middle, dstate), "batch, [ngroups,] dstate")
        check_dtype(name, weight, (x.dtype,), "like x")
        if ngroups < 1 or dim % ngroups:
            raise ValueError(f"{name} has {ngroups} groups, which must divide dim {dim}")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_shape(name, vector, (dim,), "dim")
            check_dtype(name, vector, *parameter_dtypes(x))
    check_device(x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_indices=state_indices)


def selective_state_step_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_indices: Tensor | None,
) -> Tensor:
    """The equations in float64; updates `state`."""
    slots = torch.arange(x.shape[0], device=x.device) if state_indices is None else state_indices.long()
    used = slots >= 0
    x_BD, dt_BD, A_DN = x.double(), step_sizes(dt, dt_bias, dt_softplus), A.double()
    B_BDN, C_BDN = (weight.double().repeat_interleave(x.shape[1] // weight.shape[1], dim=1) for weight in (B, C))
    h_BDN = state[slots.clamp(min=0)].double()
    h_BDN = torch.exp(dt_BD[..., None] * A_DN) * h_BDN + (dt_BD * x_BD)[..., None] * B_BDN
    y = (C_BDN * h_BDN).sum(-1)
    if D is not None:
        y = y + D.double() * x_BD
    if z is not None:
        y = y * F.silu(z.double())
    state.index_copy_(0, slots[used], h_BDN[used].to(state.dtype))
    return torch.where(used[:, None], y, 0.0).to(x.dtype)


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, state_indices: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    check_slots(state_indices, state.shape[0])
    rows = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, dt, z)]
    weights = [t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (B, C)]
    dense = [None if t is None else t.contiguous() for t in (A, D, dt_bias, state_indices)]
    return load(BACKENDS, backend).step(
        state, rows[0], rows[1], dense[0], *weights, dense[1], rows[2], dense[2], dt_softplus, dense[3]
    )


selective_state_step_op = define(
    "selective_state_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? state_indices, str backend) -> Tensor",
    _step,
    lambda state, x, *_: x.new_empty(x.shape),
)
