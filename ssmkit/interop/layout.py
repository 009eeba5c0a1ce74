"""From the layout and conventions of mamba_ssm and causal_conv1d to those of ssmkit's ops."""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from ssmkit.nn._walk import walk_of


def channels_last(x: Tensor | None) -> Tensor | None:
    """(batch, dim, seqlen) as (batch, seqlen, dim), a view; (batch, dim) as it is."""
    return None if x is None else x.transpose(1, 2) if x.ndim == 3 else x


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The narrowest dtype that holds all the real tensors: official kernels widen each input by itself."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None and not t.is_complex()])


def widen(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Real tensors in `dtype`, complex ones as they are."""
    return [t if t is None or t.is_complex() else t.to(dtype) for t in tensors]


def activation_of(activation: str | None) -> Literal["silu"] | None:
    """None or "silu", which is also called "swish"; True and False mean "silu" and None in older code."""
    if activation not in (None, False, True, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return "silu" if activation else None


def walk_of_seq_idx(seq_idx: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Resets and mask of x (batch, seqlen, ...): every change of number is a reset, negative numbers are pads.

    An initial state reaches the tokens of number 0 only, so a row that begins with another one drops it.
    """
    if seq_idx is None:
        return None, None
    resets, mask = walk_of(seq_idx, x, None, None)
    first = mask & (mask.cumsum(1) == 1)
    return resets | (first & (seq_idx > 0)), mask


def early_end(cu_seqlens: Tensor, seq_idx: Tensor | None, seqlen: int) -> int | None:
    """The last offset, where tokens that it leaves out follow: padding or sequences of other numbers. None elsewhere.

    The states of what follows are not asked for.
    """
    if seq_idx is None or seq_idx.shape != (1, seqlen) or cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        return None
    end = int(cu_seqlens[-1])
    if not 0 <= end < seqlen:
        return None
    rest = seq_idx[:, end:]
    return None if bool(torch.isin(rest[rest >= 0], seq_idx[:, :end]).any()) else end
