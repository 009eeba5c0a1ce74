"""Causal depthwise convolution along a walk: the short filter before every scan of the Mamba family.

    v_l = bias + sum_k weight[:, width-1-k] x_{prev^k(l)}         (1)
    y_l = v_l, or silu(v_l)

prev is the walk without its pads: what stood before the first token is the initial state, what stood before a reset
is zero. The state is the last width-1 inputs, oldest first (Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.4).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import (
    FLOATS,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_flag,
    check_ndim,
    check_shape,
    check_sizes,
    parameter_dtypes,
)
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._walk import ScanOutput, flags_of, walks, with_restarts
from ssmkit.paths import ScanPath

Activation = Literal["silu"] | None


def outside_package(
    *, width: int = 4, dim: int = 8, dtype: torch.dtype = torch.float32, bent: bool = False, **_: object
) -> str | None:
    """Why the package causal-conv1d cannot take the call."""
    if not 2 <= width <= 4:
        return f"takes widths 2 to 4, got {width}"
    if dim % 8:
        return f"takes a dim that is a multiple of 8 (channels last), got {dim}"
    if dtype == torch.float64:
        return "takes float32, bfloat16 and float16, got float64"
    return "takes no resets, mask, cu_seqlens, path or reverse" if bent else None


# The package comes last: its backward adds up dweight atomically, so two runs differ in their last bits.
BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.causal_conv1d_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.causal_conv1d"),
    Backend("cpu", device="cpu", module="ssmkit.native.causal_conv1d"),
    Backend("causal_conv1d", device="cuda", module="causal_conv1d", rejects=outside_package),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    path: ScanPath | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | ScanOutput:
    """Causal depthwise convolution over the token axis, channels last.

        v_l = bias + sum_k weight[:, width-1-k] x_{prev^k(l)}         (1)
        y_l = v_l, or silu(v_l)

    The convolution of Mamba, arXiv:2312.00752, section 3.4; in older code tensors lie as (batch, dim, seqlen).

    Args:
        x: Input                                  (batch, seqlen, dim)      fp32, bf16, fp16 or fp64
        weight: Taps, that of the newest token last  (dim, width)           float, any width from 1
        bias: Added to every token                (dim,)                    float
        activation: None or "silu".
        initial_state: Inputs before the walk, oldest first  (nseq, width - 1, dim)  as x (fp32 is rounded to it); nseq
            is batch, or with cu_seqlens the number of packed sequences
        resets: Tokens before which everything counts as zero                (batch, seqlen)  bool
        mask: True at real tokens; a pad is as if it were not there, its y is 0 and it gets no gradient.
                                                  (batch, seqlen)           bool
        cu_seqlens: Offsets of sequences packed into one row of batch 1      (nseq + 1,)  int32 or int64
        reverse: Walk from the last token to the first.
        path: Order in which the tokens are visited; `reverse` walks it backwards. Its restarts act like `resets`.
        return_final_state: Return (y, final_state) instead of y.
        backend: "auto", "reference", or a name from BACKENDS; "causal_conv1d" is the package of that name.
    Returns:
        y of the shape and dtype of x; final_state (nseq, width - 1, dim), the last inputs of the walk, as x. Both are
        differentiable; sums are kept in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(x, weight, bias, activation, initial_state, resets, mask, cu_seqlens, path)
    acc = acc_dtype(x.dtype)
    weight, bias = weight.to(acc), None if bias is None else bias.to(acc)
    initial_state = None if initial_state is None else initial_state.to(x.dtype)
    if path is not None:
        reverse, resets = reverse != path.reversed, with_restarts(resets, path, x)
    order = None if path is None else path.order(x.device)
    silu = activation == "silu"

    bent = reverse or not (resets is None and mask is None and cu_seqlens is None and order is None)
    facts = {"width": weight.shape[1], "dim": x.shape[2], "dtype": x.dtype, "bent": bent}
    chosen = choose("causal_conv1d", BACKENDS, backend, x, **facts)
    if chosen == "reference":
        y, final_state = causal_conv1d_ref(
            x, weight, bias, initial_state, resets, mask, cu_seqlens, order, reverse, silu
        )
    elif chosen == "causal_conv1d":
        y, final_state = from_package(x, weight, bias, initial_state, silu)
    else:
        flags = flags_of(resets, mask)
        y, final_state = causal_conv1d_fwd(
            x, weight, bias, initial_state, order, flags, cu_seqlens, reverse, silu, chosen
        )
    return ScanOutput(y, final_state) if return_final_state else y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    path: ScanPath | None,
) -> None:
    """Refuse what no backend may see."""
    check_ndim("x", x, "batch, seqlen, dim")
    check_dtype("x", x, FLOATS)
    check_sizes(x)
    batch, seqlen, dim = x.shape
    check_taps(x, weight, bias, activation)
    check_flag("resets", resets, batch, seqlen)
    check_flag("mask", mask, batch, seqlen)
    check_device(
        x, weight=weight, bias=bias, initial_state=initial_state, resets=resets, mask=mask, cu_seqlens=cu_seqlens
    )
    nseq = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, seqlen)
        nseq = cu_seqlens.shape[0] - 1
        if path is not None:
            raise ValueError("path orders the tokens of whole rows: give either path or cu_seqlens, not both")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (nseq, weight.shape[1] - 1, dim), "nseq, width - 1, dim")
        check_dtype("initial_state", initial_state, (x.dtype, acc_dtype(x.dtype)), "like x")
    if path is not None and path.length != seqlen:
        raise ValueError(f"path must visit {seqlen} tokens like x, got {path.length}")


def check_taps(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> None:
    """Refuse a filter that does not fit x, whose last axis is the channels."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if weight.ndim != 2:
        way_out = "; take the weight of a depthwise nn.Conv1d as weight.squeeze(1)" if weight.ndim == 3 else ""
        raise ValueError(f"weight must have shape (dim, width), got {tuple(weight.shape)}{way_out}")
    check_shape("weight", weight, (x.shape[-1], weight.shape[1]), "dim, width")
    if weight.shape[1] < 1:
        raise ValueError("weight must have at least one tap, got width 0")
    check_dtype("weight", weight, *parameter_dtypes(x))
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],), "dim")
        check_dtype("bias", bias, *parameter_dtypes(x))


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    order: Tensor | None,
    reverse: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Equation (1) in float64 over a table of the rows under the taps. Returns y and the final state."""
    batch, seqlen, dim = x.shape
    tokens, width = batch * seqlen, weight.shape[1]
    restart = [False] * tokens if resets is None else resets.flatten().tolist()
    real = [True] * tokens if mask is None else mask.flatten().tolist()
    sequences = walks(batch, seqlen, cu_seqlens, order, reverse)

    # Rows of tokens, then of initial states, then one of zeros.
    entries = len(sequences) * (width - 1) if initial_state is not None else 0
    zero = tokens + entries
    taps, last = [[zero] * width for _ in range(tokens)], []
    for sequence, rows in enumerate(sequences):
        window = [tokens + sequence * (width - 1) + i if entries else zero for i in range(width - 1)]
        for row in rows:
            if restart[row]:
                window = [zero] * (width - 1)
            if real[row]:
                taps[row] = [*window, row]
                window = taps[row][1:]
        last.append(window)

    states = x.new_zeros(0, dim) if initial_state is None else initial_state.reshape(entries, dim)
    x_RD = torch.cat([x.reshape(tokens, dim), states, x.new_zeros(1, dim)]).double()
    table_TW = torch.tensor(taps, dtype=torch.int64, device=x.device).view(tokens, width)
    v_TD = torch.einsum("twd,dw->td", x_RD[table_TW], weight.double())  # (1)
    if bias is not None:
        v_TD = v_TD + bias.double()
    y_TD = F.silu(v_TD) if silu else v_TD
    if mask is not None:
        y_TD = torch.where(mask.reshape(tokens, 1), y_TD, 0.0)
    table = torch.tensor(last, dtype=torch.int64, device=x.device).view(len(sequences), width - 1)
    return y_TD.view(batch, seqlen, dim).to(x.dtype), x_RD[table].to(x.dtype)


def from_package(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """The call as the package causal-conv1d takes it: (batch, dim, seqlen), which here are views, channels last."""
    from causal_conv1d import causal_conv1d_fn

    y, final_state = causal_conv1d_fn(
        flat_rows(x).transpose(1, 2),
        weight,
        bias,
        initial_states=None if initial_state is None else initial_state.contiguous().transpose(1, 2),
        return_final_states=True,
        activation="silu" if silu else None,
    )
    return y.transpose(1, 2), final_state.transpose(1, 2)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, silu: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = _for_kernels(x, weight, bias, initial_state, order, flags, cu_seqlens)
    return load(BACKENDS, backend).forward(*tensors, reverse, silu)


def _for_kernels(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The layout that kernels rely on: x in flat rows, the rest dense, offsets in int64."""
    *dense, cu_seqlens = (None if t is None else t.contiguous() for t in tensors)
    return (flat_rows(x), *dense, None if cu_seqlens is None else cu_seqlens.to(torch.int64))


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, order: Tensor | None,
    flags: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, silu: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, dim = x.shape
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(nseq, weight.shape[1] - 1, dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = causal_conv1d_bwd(dy, dfinal_state, *tensors, *ctx.options)
    return (*gradients(grads, tensors[:4]), *[None] * 6)


def _backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, silu: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = _for_kernels(x, weight, bias, initial_state, order, flags, cu_seqlens)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    outputs = load(BACKENDS, backend).backward(flat_rows(dy), dfinal_state, *tensors, reverse, silu)
    return present(outputs, x)


def _backward_fake(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, order: Tensor | None, flags: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, silu: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? order, Tensor? flags, Tensor? cu_seqlens, "
    "bool reverse, bool silu, str backend"
)
causal_conv1d_bwd = define(
    f"causal_conv1d_bwd(Tensor dy, Tensor? dfinal_state, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
causal_conv1d_fwd = define(
    f"causal_conv1d_fwd({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
