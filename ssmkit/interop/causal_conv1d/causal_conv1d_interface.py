"""causal_conv1d_fn, causal_conv1d_update and their references, with tensors as (batch, dim, seqlen)."""

from functools import partial

import torch
from torch import Tensor

from ssmkit.interop.layout import activation_of, channels_last, walk_of_seq_idx
from ssmkit.ops import causal_conv1d, causal_conv1d_step
from ssmkit.ops._check import check_ndim, check_slots


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssmkit.ops.causal_conv1d` on (batch, dim, seqlen).

    Channels-last x (a transposed (batch, seqlen, dim)) is read in place, any other is copied once. Unlike the package it
    takes any width, any dim, float64, and seq_idx together with initial and final states.

    Args:
        x: Input                                   (batch, dim, seqlen)
        weight, bias: Taps, that of the newest token last  (dim, width), (dim,)
        seq_idx: Number of each token's sequence; a change cuts, a negative number is a pad   (batch, seqlen) int
        initial_states: Inputs before the first    (batch, dim, width - 1)
        return_final_states: Return (out, final_states).
        final_states_out: Where the final states are written  (batch, dim, width - 1)
        activation: None, "silu" or "swish".
        backend: Handed to the op.
    Returns:
        out (batch, dim, seqlen), channels last in memory.
    """
    check_ndim("x", x, "batch, dim, seqlen")
    if final_states_out is not None and not return_final_states:
        raise ValueError(
            "final_states_out is written only with return_final_states=True; set it, or leave the buffer out"
        )
    rows = x.transpose(1, 2)
    resets, mask = walk_of_seq_idx(seq_idx, rows)
    out, final = causal_conv1d(
        rows,
        weight,
        bias,
        activation=activation_of(activation),
        initial_state=None if initial_states is None else initial_states.transpose(1, 2).to(x.dtype),
        resets=resets,
        mask=mask,
        return_final_state=True,
        backend=backend,
    )
    out, final = out.transpose(1, 2), final.transpose(1, 2)
    if not return_final_states:
        return out
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`ssmkit.ops.causal_conv1d_step` on (batch, dim) or (batch, dim, seqlen); conv_state is updated in place.

    A channels-last conv_state is updated where it lies; of any other the slots in use are copied out and back.

    Args:
        x: Next inputs                             (batch, dim) or (batch, dim, seqlen)
        conv_state: The inputs before              (slots, dim, state_len), state_len at least width - 1
        weight, bias: Taps, that of the newest token last  (dim, width), (dim,)
        activation: None, "silu" or "swish".
        cache_seqlens: Tokens seen by each row; with it the state is a ring    (batch,) int
        conv_state_indices: Slot of each row, negative for none, whose output is 0    (batch,) int
        backend: Handed to the op.
    """
    check_ndim("conv_state", conv_state, "slots, dim, state_len")
    rows, state = channels_last(x), conv_state.transpose(1, 2)
    assert rows is not None
    step = partial(
        causal_conv1d_step,
        weight=weight,
        bias=bias,
        activation=activation_of(activation),
        cache_seqlens=cache_seqlens,
        backend=backend,
    )
    if state.is_contiguous():
        out = step(rows, state, state_indices=conv_state_indices)
    elif conv_state_indices is None:
        held = state.contiguous()
        out = step(rows, held)
        state.copy_(held)
    else:
        check_slots(conv_state_indices, len(state))
        used = conv_state_indices >= 0
        slots = conv_state_indices[used].long()
        held = state.new_zeros(len(used), *state.shape[1:])
        held[used] = state[slots]
        places = torch.arange(len(used), device=x.device)
        out = step(rows, held, state_indices=torch.where(used, places, -1))
        state[slots] = held[used]
    return out.transpose(1, 2) if x.ndim == 3 else out


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` without seq_idx, by the float64 reference."""
    return causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation, backend="reference"
    )


causal_conv1d_update_ref = partial(causal_conv1d_update, backend="reference")
