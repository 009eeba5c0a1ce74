"""From the layout and conventions of mamba_ssm and causal_conv1d to those of ssmkit's ops."""

import weakref
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ssmkit.nn._walk import walk_of

# Of offsets on a GPU: the numbers that they were compared with, the versions of both, and `early_end`.
_ENDS = WeakIdKeyDictionary()


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


def _told_by_both(cu_seqlens: Tensor, seq_idx: Tensor, seqlen: int) -> bool:
    return seq_idx.shape == (1, seqlen) and cu_seqlens.ndim == 1 and cu_seqlens.shape[0] > 0


def early_end(cu_seqlens: Tensor, seq_idx: Tensor | None, seqlen: int) -> int | None:
    """The last offset, where tokens that it leaves out follow: padding or sequences of other numbers. None elsewhere.

    The states of what follows are not asked for. Values on a GPU, which have to be waited for, are read once for each pair
    of tensors; none are while compiling, when the answer is None.
    """
    if torch.compiler.is_compiling():
        return None
    if seq_idx is None or not _told_by_both(cu_seqlens, seq_idx, seqlen):
        return None
    # What happened to a tensor of inference mode since, or to memory shared with NumPy, leaves no trace.
    if any(t.device.type == "cpu" or t.is_inference() for t in (cu_seqlens, seq_idx)):
        return _early_end(cu_seqlens, seq_idx, seqlen)
    seen, versions = _ENDS.get(cu_seqlens), (cu_seqlens._version, seq_idx._version)
    if seen is None or seen[0]() is not seq_idx or seen[1] != versions:
        seen = _ENDS[cu_seqlens] = (weakref.ref(seq_idx), versions, _early_end(cu_seqlens, seq_idx, seqlen))
    return seen[2]


def _early_end(cu_seqlens: Tensor, seq_idx: Tensor, seqlen: int) -> int | None:
    end = int(cu_seqlens[-1])
    if not 0 <= end < seqlen:
        return None
    rest = seq_idx[:, end:]
    return None if bool(torch.isin(rest[rest >= 0], seq_idx[:, :end]).any()) else end


def mix_packed(
    forward: Callable[..., Tensor],
    u: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    inference_params: Any,
    options: dict[str, Tensor | None],
) -> Tensor:
    """A layer's `forward` over u (batch, seqlen, d_model), with tokens after the last offset where seq_idx tells of them."""
    seqlen = u.shape[1]
    flags = {name: flag for name, flag in options.items() if name in ("resets", "mask") and flag is not None}
    given = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "inference_params": inference_params, **options}
    if cu_seqlens is None or seq_idx is None or not _told_by_both(cu_seqlens, seq_idx, seqlen):
        return forward(u, **given)
    if torch.compiler.is_compiling() and inference_params is None and options.get("state") is None:
        # Whether anything follows is not known: it is one more sequence, be it an empty one.
        head = torch.arange(seqlen, device=u.device) < cu_seqlens[-1]
        resets, real = walk_of(torch.where(head, -1, seq_idx), u, flags.get("resets"), None)
        mask = real | head
        walk = {"resets": resets, "mask": mask & flags["mask"] if "mask" in flags else mask}
        return forward(u, cu_seqlens=F.pad(cu_seqlens, (0, 1), value=seqlen), **walk)
    end = early_end(cu_seqlens, seq_idx, seqlen)
    if end is None:
        return forward(u, **given)
    given |= {"seq_idx": None} | {name: flag[:, :end] for name, flag in flags.items()}
    rest = forward(u[:, end:], seq_idx=seq_idx[:, end:], **{name: flag[:, end:] for name, flag in flags.items()})
    return torch.cat([forward(u[:, :end], **given), rest], dim=1)
