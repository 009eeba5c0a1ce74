"""Mamba-ND: Mamba layers over images and clips, each of which walks the tokens in another order.

Li et al. 2024, "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", arXiv:2402.05892. Parameter names
are those of the published backbones, `layers.{i}.norm` and `layers.{i}.mixer`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import Mamba
from ssmkit.paths import ScanPath, clip, column, row

# Axes of a clip from the slowest to the fastest, for one pair of layers (forwards and backwards) after another.
CLIP_ORDERS = {
    "alternating": ("thw", "twh", "wht"),
    "frames": ("thw", "twh", "thw"),
    "one": ("thw", "thw", "thw"),
}
# How many of the slowest of these axes keep to themselves: each of their values is a sequence of its own.
FACTORIZATIONS: dict[str | None, tuple[int, int, int]] = {None: (0, 0, 0), "hw_t": (1, 1, 0), "h_w_t": (2, 2, 2)}


class MambaNDLayer(nn.Module):
    """x = norm(x); x + mixer(x), the mixer walking a path. What is added up are normalised tokens, as published.

    Args:
        dim: Channels.
        norm_eps: Of the LayerNorm.
        drop, drop_path: Dropout and stochastic depth of the mixer's output.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
        mixer: Further arguments of `Mamba`.
    Shapes:
        hidden and output (batch, seqlen, dim)
    """

    def __init__(
        self,
        dim: int,
        *,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        **mixer: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer = Mamba(dim, backend=backend, **mixer, **place)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **place)
        self.dropout, self.drop_path = nn.Dropout(drop), DropPath(drop_path)

    def forward(self, hidden: Tensor, path: ScanPath | None = None) -> Tensor:
        """Mix the tokens in the order of `path`, by default as they lie."""
        hidden = self.norm(hidden)
        return hidden + self.drop_path(self.dropout(self.mixer(hidden, path=path)))


class MambaND(nn.Module):
    """Layers that alternate through the orders of an image or of a clip.

    Layer i of an image walks the rows, the rows backwards, the columns, the columns backwards, and again from the rows. Of
    a clip it walks the first of three orders forwards, backwards, then the second and the third, six layers in all.

    Args:
        dim, depth: Channels, number of layers.
        drop_path_rate: Stochastic depth of the last layer, from 0 in the first linearly.
        clip_order: "alternating" as in the released models (frame by frame by rows, frame by frame by columns, all frames of
            a place); "frames" keeps to frames, "one" to their rows.
        factorization: What is one sequence in a clip. None: all of it. "hw_t": each frame; in the third order the whole.
            "h_w_t": each row of a frame, each column, each place over time.
        layer: Further arguments of `MambaNDLayer`.
    Shapes:
        x and output (batch, height, width, dim) or (batch, frames, height, width, dim)
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        drop_path_rate: float = 0.0,
        clip_order: str = "alternating",
        factorization: str | None = None,
        **layer: Any,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("clip_order", clip_order, tuple(CLIP_ORDERS)),
            ("factorization", factorization, tuple(FACTORIZATIONS)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if factorization is not None and clip_order != "alternating":
            raise ValueError(f"factorization goes with the alternating orders of a clip, got clip_order {clip_order!r}")
        self.dim, self.clip_order, self.factorization = dim, clip_order, factorization
        steps = max(depth - 1, 1)
        self.layers = nn.ModuleList(
            MambaNDLayer(dim, drop_path=drop_path_rate * index / steps, **layer) for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run every layer."""
        if x.ndim not in (4, 5) or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (batch, [frames,] height, width, {self.dim}), got {tuple(x.shape)}")
        orders = alternating_paths(x.shape[1:-1], self.clip_order, self.factorization)
        hidden = x.flatten(1, -2)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, orders[index % len(orders)])
        return hidden.view(x.shape)

    def extra_repr(self) -> str:
        """Options, for print()."""
        return f"dim={self.dim}, clip_order={self.clip_order!r}, factorization={self.factorization!r}"


def alternating_paths(
    shape: Sequence[int], clip_order: str = "alternating", factorization: str | None = None
) -> tuple[ScanPath, ...]:
    """The orders that the layers take in turn, over an image (height, width) or a clip (frames, height, width)."""
    if len(shape) == 2:
        height, width = shape
        there = [row(height, width), column(height, width)]
    else:
        frames, height, width = shape
        turns = zip(CLIP_ORDERS[clip_order], FACTORIZATIONS[factorization], strict=True)
        there = [clip(frames, height, width, order, restarts=order[:apart]) for order, apart in turns]
    return tuple(path for forwards in there for path in (forwards, forwards.flip()))
