"""One token of state-space duality, with the state updated in place: decoding with Mamba-2.

    h <- exp(dt A) h + dt x B^T        (headdim, dstate) per head
    y = (h C + D x) * silu(z)

The recurrence of `ssd` (Dao & Gu 2024, arXiv:2405.21060) at one token. There is no gradient: training walks whole
sequences.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import check_device, check_heads, check_limits, check_slots, check_step_state
from ssmkit.ops._define import acc_dtype, define, dense_rows
from ssmkit.ops._walk import step_sizes

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.ssd_step_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.ssd_step"),
    Backend("cpu", device="cpu", module="ssmkit.native.ssd_step"),
)


def ssd_step(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `ssd`; `state` is updated in place.

        dt <- clamp(softplus(dt + dt_bias), *dt_limit)            softplus where asked
        h <- exp(dt A) h + dt x B^T
        y = (h C + D x) * silu(z)

    Dao & Gu 2024, arXiv:2405.21060. Not differentiable: inputs that require a gradient are taken as constants.

    Args:
        state: h, computed in fp32 (fp64 for fp64 x) and kept in its own dtype
                                                  (slots, nheads, headdim, dstate)  float, contiguous
        x: Input                                  (batch, nheads, headdim)          fp32, bf16, fp16 or fp64
        dt: Step sizes (logits with dt_softplus)  (batch, nheads)                   as x
        A: Decay rates, negative                  (nheads,)                         float
        B, C: Input and output weights            (batch, dstate) or (batch, ngroups, dstate)  as x; head h reads group
            h // (nheads // ngroups)
        D: Skip weights                           (nheads,) or (nheads, headdim)    float
        z: Gate logits                            (batch, nheads, headdim)          as x
        dt_bias: Added to dt before softplus      (nheads,)                         float
        dt_softplus: Apply softplus to dt (above 20 it is the identity).
        dt_limit: dt is clamped into it, after softplus.
        state_indices: Slot of each row of the batch, no slot twice; a negative one leaves its y at 0 and no state is
            touched. Without it slot b belongs to row b.  (batch,)  int32 or int64
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    B, C = (weight.unsqueeze(1) if weight.ndim == 2 else weight for weight in (B, C))
    _check(state, x, dt, A, B, C, D, z, dt_bias, dt_limit, state_indices)
    acc = acc_dtype(x.dtype)
    A, dt_bias = A.to(acc), None if dt_bias is None else dt_bias.to(acc)
    D = None if D is None else (D if D.ndim == 2 else D[:, None]).to(acc).expand(*x.shape[1:])
    dt_min, dt_max = map(float, dt_limit)
    chosen = choose("ssd_step", BACKENDS, backend, x)
    if chosen == "reference":
        check_slots(state_indices, state.shape[0])
        with torch.no_grad():
            return ssd_step_ref(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, state_indices)
    return ssd_step_op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, state_indices, chosen)


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
    dt_limit: tuple[float, float],
    state_indices: Tensor | None,
) -> None:
    check_heads(x, dt, A, B, C, D, z, dt_bias, "batch")
    sizes = (*x.shape[1:], B.shape[2])
    check_step_state(state, sizes, "slots, nheads, headdim, dstate", x, state_indices)
    check_device(x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_indices=state_indices)
    check_limits(dt_limit)


def ssd_step_ref(
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
    dt_min: float,
    dt_max: float,
    state_indices: Tensor | None,
) -> Tensor:
    """The equations in float64; updates `state`."""
    slots = torch.arange(x.shape[0], device=x.device) if state_indices is None else state_indices.long()
    used = slots >= 0
    x_BHP, dt_BH = x.double(), step_sizes(dt, dt_bias, dt_softplus, (dt_min, dt_max))
    B_BHN, C_BHN = (weight.double().repeat_interleave(x.shape[1] // weight.shape[1], dim=1) for weight in (B, C))
    decay_BH, input_BHP = torch.exp(dt_BH * A.double()), dt_BH[..., None] * x_BHP
    h_BHPN = state[slots.clamp(min=0)].double()
    h_BHPN = decay_BH[..., None, None] * h_BHPN + input_BHP[..., None] * B_BHN[:, :, None]
    y = (h_BHPN * C_BHN[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.double() * x_BHP
    if z is not None:
        y = y * F.silu(z.double())
    state.index_copy_(0, slots[used], h_BHPN[used].to(state.dtype))
    return torch.where(used[:, None, None], y, 0.0).to(x.dtype)


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, state_indices: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    check_slots(state_indices, state.shape[0])
    rows = [None if t is None else dense_rows(t) for t in (x, dt, B, C, z)]
    dense = [None if t is None else t.contiguous() for t in (A, dt_bias, state_indices)]
    # One weight for all channels of a head has a stride of zero.
    D = D if D is None or D.stride(1) in (0, 1) else D.contiguous()
    return load(BACKENDS, backend).step(
        state, rows[0], rows[1], dense[0], rows[2], rows[3], D, rows[4], dense[1],
        dt_softplus, dt_min, dt_max, dense[2],
    )  # fmt: skip


ssd_step_op = define(
    "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? state_indices, str backend) -> Tensor",
    _step,
    lambda state, x, *_: x.new_empty(x.shape),
)
