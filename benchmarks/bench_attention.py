"""Causal softmax attention at the widths of `ssd`, for contrast: another function, so a subject of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Bench, register


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, causal, over (batch, seqlen, nheads, channels)."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


def attention_inputs(
    batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """q and k as wide as C and B of `ssd`, v as wide as its x."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": dstate, "k": dstate, "v": headdim}
    return {
        name: torch.randn(batch, seqlen, nheads, size, generator=generator).to(device, dtype)
        for name, size in sizes.items()
    }


def products(batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, mode: str) -> float:
    """Half of the two products of all pairs of tokens; backward has five."""
    pairs = batch * nheads * seqlen * (seqlen + 1) / 2
    forward = pairs * (dstate + headdim)
    return forward if mode == "fwd" else forward + pairs * (3 * dstate + 2 * headdim)


register(
    Bench(
        name="attention",
        op=attention,
        inputs=attention_inputs,
        shapes={
            "width of Mamba2-130M, 1024 tokens": {
                "batch": 1, "seqlen": 1024, "nheads": 24, "headdim": 64, "dstate": 128,
            },
            "width of Mamba2-130M, 4096 tokens": {
                "batch": 1, "seqlen": 4096, "nheads": 24, "headdim": 64, "dstate": 128,
            },
            "224x224 image, 12 heads of 32": {"batch": 4, "seqlen": 197, "nheads": 12, "headdim": 32, "dstate": 64},
        },
        fmas=products,
        reference=attention,
    )
)  # fmt: skip
