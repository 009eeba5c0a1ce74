"""ssd_noncausal: bound by its matrix products on a CPU, four multiply-adds per token, channel and state with those of y."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import ssd_noncausal
from ssmkit.testing import ssd_noncausal_inputs

from . import Bench, Prepared, Rival, compiled_anew, register


def torch_sum(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    """The equations in plain torch: heads as a batch of two matrix products."""
    assert dt_softplus
    times = x.shape[2] // B.shape[2]
    B, C = (weight.repeat_interleave(times, dim=2).transpose(1, 2) for weight in (B, C))
    weight = F.softplus(dt + dt_bias) * -A
    values = x.transpose(1, 2) * weight.to(x.dtype).transpose(1, 2)[..., None]
    y = C @ (B.mT @ values)
    return y.transpose(1, 2) + D[:, None].to(x.dtype) * x


def vssd_layer(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    """The steps of VSSD's layer for one group, written here: weights and D repeated, B and C given to every head."""
    assert dt_softplus
    batch, seqlen, _, headdim = x.shape
    weight = F.softplus(dt + dt_bias).transpose(1, 2) * -A.view(1, -1, 1)
    values = x.transpose(1, 2)
    scaled = values * weight.unsqueeze(-1).repeat(1, 1, 1, headdim)
    keys, queries = (t.view(batch, 1, seqlen, -1) for t in (B, C))
    y = queries @ (keys.transpose(-2, -1) @ scaled)
    y = y + values * D.view(1, -1, 1, 1).repeat(batch, 1, seqlen, 1)
    return y.transpose(1, 2).contiguous()


def compiled(inputs: dict[str, Any]) -> Prepared:
    """The plain form through torch.compile."""
    call = compiled_anew(torch_sum)
    return Prepared(lambda: call(**inputs))


def products(batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, mode: str) -> float:
    """Multiply-adds: two products of tokens x states x channels forward, four more backward."""
    return batch * seqlen * nheads * headdim * dstate * (2 if mode == "fwd" else 6)


def bytes_moved(
    batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, dtype: torch.dtype, mode: str
) -> float:
    """Forward x twice and y, B, C and dt once; backward x and dy, dx, B, C, dt and their gradients besides."""
    wide, narrow = (3, 1) if mode == "fwd" else (3 + 4, 1 + 3)
    return batch * seqlen * (wide * nheads * headdim + narrow * (2 * dstate + nheads)) * dtype.itemsize


register(
    Bench(
        op=ssd_noncausal,
        inputs=ssd_noncausal_inputs,
        shapes={
            "VSSD-Tiny, first stage": {"batch": 1, "seqlen": 3136, "nheads": 2, "headdim": 64, "dstate": 64},
            "VSSD-Tiny, third stage": {"batch": 8, "seqlen": 196, "nheads": 8, "headdim": 64, "dstate": 64},
            "VSSD-Micro, 448x448, second stage": {"batch": 1, "seqlen": 3136, "nheads": 4, "headdim": 48, "dstate": 48},
        },
        bytes_moved=bytes_moved,
        products=products,
        parameters=("A", "D", "dt_bias"),
        rivals={
            "torch": torch_sum,
            "torch.compile": Rival(prepare=compiled),
            "VSSD's layer": vssd_layer,
        },
    )
)
