"""The next tokens of a causal convolution, its state updated in place: decoding, roll-outs, control loops.

    v_t = bias + sum_k weight[:, width-1-k] x_{t-k},  y_t = v_t or silu(v_t)

Equation (1) of `causal_conv1d`, where x_{t-k} of earlier calls comes from the state. There is no gradient: training
walks whole sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_row_indices, check_slots, check_step_state
from ssmkit.ops._define import define
from ssmkit.ops.causal_conv1d import Activation, check_taps

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.causal_conv1d_step_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.causal_conv1d_step"),
    Backend("cpu", device="cpu", module="ssmkit.native.causal_conv1d_step"),
)


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next token, or tokens, of `causal_conv1d`; `state` is updated in place.

        v_t = bias + sum_k weight[:, width-1-k] x_{t-k},  y_t = v_t or silu(v_t)

    In older code: `causal_conv1d_update`, with tensors as (batch, dim, seqlen). Not differentiable: inputs that require
    a gradient are taken as constants.

    Args:
        x: Next input                             (batch, dim) or (batch, seqlen, dim)  fp32, bf16, fp16 or fp64
        state: The inputs before, oldest first, kept in its own dtype  (slots, state_len, dim)  float, contiguous;
            state_len is width - 1 or more
        weight: Taps, that of the newest token last  (dim, width)           float
        bias: Added to every token                (dim,)                    float
        activation: None or "silu".
        cache_seqlens: Tokens that each row has seen. With it the state is a ring: the input of token t is entry
            t % state_len, and nothing is moved. The caller counts.   (batch,)  int32 or int64
        state_indices: Slot of each row of the batch, no slot twice; a negative one leaves its y at 0 and no state is
            touched. Without it slot b belongs to row b.              (batch,)  int32 or int64
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x.
    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    _check(x, state, weight, bias, activation, cache_seqlens, state_indices)
    silu = activation == "silu"
    chosen = choose("causal_conv1d_step", BACKENDS, backend, x)
    if chosen == "reference":
        check_indices(state, cache_seqlens, state_indices)
        with torch.no_grad():
            return causal_conv1d_step_ref(x, state, weight, bias, cache_seqlens, state_indices, silu)
    return causal_conv1d_step_op(x, state, weight, bias, cache_seqlens, state_indices, silu, chosen)


def _check(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape (batch, dim) or (batch, seqlen, dim), got {tuple(x.shape)}")
    check_dtype("x", x, FLOATS)
    check_taps(x, weight, bias, activation)
    batch, dim = x.shape[0], x.shape[-1]
    check_step_state(state, (*state.shape[1:2], dim), "slots, state_len, dim", x, state_indices)
    if state.shape[1] < weight.shape[1] - 1:
        raise ValueError(f"state must hold at least width - 1 = {weight.shape[1] - 1} inputs, got {state.shape[1]}")
    if cache_seqlens is not None and state.shape[1] == 0:
        raise ValueError("state must have an entry to be a ring: leave cache_seqlens out where the width is 1")
    check_row_indices("cache_seqlens", cache_seqlens, batch)
    check_device(x, state=state, weight=weight, bias=bias, cache_seqlens=cache_seqlens, state_indices=state_indices)


def check_indices(state: Tensor, cache_seqlens: Tensor | None, state_indices: Tensor | None) -> None:
    """The values that can be seen without waiting for a GPU; there the kernels skip slots that are not there."""
    check_slots(state_indices, state.shape[0])
    if cache_seqlens is not None and cache_seqlens.device.type == "cpu" and cache_seqlens.numel():
        least = int(cache_seqlens.min())
        if least < 0:
            raise ValueError(f"cache_seqlens must not be negative, got {least}")


def causal_conv1d_step_ref(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
    silu: bool,
) -> Tensor:
    """The equation in float64; updates `state`."""
    x_BTD = (x.unsqueeze(1) if x.ndim == 2 else x).double()
    (batch, seqlen, _), (_, state_len, _), width = x_BTD.shape, state.shape, weight.shape[1]
    slots = torch.arange(batch, device=x.device) if state_indices is None else state_indices.long()
    used = slots >= 0
    held_BSD = state[slots.clamp(min=0)].double()
    # Entry (start + i) % state_len is the i-th oldest.
    start = torch.zeros_like(slots) if cache_seqlens is None else cache_seqlens.long()
    ring_BS = (start[:, None] + torch.arange(state_len, device=x.device)) % max(state_len, 1)
    rows = torch.arange(batch, device=x.device)[:, None]
    line_BRD = torch.cat([held_BSD[rows, ring_BS], x_BTD], dim=1)

    taps_TW = torch.arange(seqlen, device=x.device)[:, None] + torch.arange(width, device=x.device)
    v_BTD = torch.einsum("btwd,dw->btd", line_BRD[:, taps_TW + state_len - width + 1], weight.double())
    if bias is not None:
        v_BTD = v_BTD + bias.double()
    y = F.silu(v_BTD) if silu else v_BTD
    if cache_seqlens is not None:
        ring_BS = (ring_BS + seqlen) % max(state_len, 1)
    held_BSD[rows, ring_BS] = line_BRD[:, seqlen:]
    state.index_copy_(0, slots[used], held_BSD[used].to(state.dtype))
    return torch.where(used[:, None, None], y, 0.0).view(x.shape).to(x.dtype)


def _step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, cache_seqlens: Tensor | None,
    state_indices: Tensor | None, silu: bool, backend: str,
) -> Tensor:  # fmt: skip
    check_indices(state, cache_seqlens, state_indices)
    x = x if x.stride(-1) == 1 else x.contiguous()
    dense = (None if t is None else t.contiguous() for t in (weight, bias, cache_seqlens, state_indices))
    return load(BACKENDS, backend).step(x, state, *dense, silu)


causal_conv1d_step_op = define(
    "causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
    "Tensor? state_indices, bool silu, str backend) -> Tensor",
    _step,
    lambda x, *_: x.new_empty(x.shape),
)
