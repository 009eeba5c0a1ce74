"""MHS-VM's multi-head scan: each head walks the image its own way, and its four routes are weighed by their variation.

Zhao 2024, "MHS-VM", arXiv:2406.05992, section 3. Parameter names and initialisation are those of the published code
(heads, threshold and so on stand in a dictionary `para_dict` there), so its state dicts load.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._path_scans import PathScans, init_dt_projs
from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.ss2d import depthwise
from ssmkit.ops import cross_selective_scan
from ssmkit.paths import ScanPath, column, continuous, diagonals, row, spiral

Routes = tuple[ScanPath, ...]


def _both_ways(*paths: ScanPath) -> Routes:
    return tuple(path for there in paths for path in (there, there.flip()))


# The heads in their order, by the letter of the published code: what four routes each walks.
HEADS: dict[str, Callable[[int, int], Routes]] = {
    "C": continuous,
    "X": lambda height, width: _both_ways(diagonals(height, width), diagonals(height, width, mirror=True)),
    "S": lambda height, width: _both_ways(spiral(height, width), spiral(height, width, clockwise=False)),
    "Z": lambda height, width: _both_ways(row(height, width), column(height, width)),
}
NROUTES = 4


class GFU(nn.Module):
    """Scan Route Attention, by a gated fusion unit: the sum over routes, weighed by how much the routes differ.

        cv = std_k(y_k) / (mean_k(y_k - min_k y_k) + 1e-5)          the coefficient of variation, std unbiased
        y = (sum_k y_k) * relu(cv - t)

    Args:
        t: Threshold. Where the routes vary less, the result is 0.
    Shapes:
        ys (..., routes, dim) to (..., dim)
    """

    def __init__(self, t: float = 0.0) -> None:
        super().__init__()
        self.t = t

    def forward(self, ys: Tensor) -> Tensor:
        """Fuse the routes."""
        mean, least = ys.mean(dim=-2, keepdim=True), ys.min(dim=-2, keepdim=True).values
        # A norm has gradient 0 where routes agree, and takes an empty batch without a warning.
        spread = torch.linalg.vector_norm(ys - mean, dim=-2) / math.sqrt(ys.shape[-2] - 1)
        variation = spread / ((ys - least).mean(dim=-2) + 1e-5)
        return ys.sum(dim=-2) * F.relu(variation - self.t)

    def extra_repr(self) -> str:
        """Threshold, for print()."""
        return f"t={self.t:g}"


class ScanHead(nn.Module):
    """One head: selective scans along four routes, each with parameters of its own, then a `GFU`.

    Args:
        dim_sub: Channels of the head, s.
        d_state: States per channel.
        gfu_t: Threshold of the GFU.
        pattern: Which routes. "C": snakes by rows and by columns. "X": diagonals, up and down in turn, from the top left and
            from the top right. "S": spirals to the middle from the top left and from the bottom left. "Z": rows and
            columns. Each there and back.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x (batch, height, width, dim_sub) to (batch, height, width, dim_sub), in fp32 or wider
    """

    def __init__(
        self,
        dim_sub: int,
        d_state: int = 16,
        gfu_t: float = 0.0,
        pattern: str = "C",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if pattern not in HEADS:
            raise ValueError(f"pattern must be one of {', '.join(map(repr, HEADS))}, got {pattern!r}")
        self.pattern, self.backend = pattern, backend
        self.esfusion = GFU(gfu_t)
        self.mambaeng = PathScans()
        self.mambaeng.add_path_weights(NROUTES, dim_sub, d_state, math.ceil(dim_sub / 16), device, dtype)
        init_dt_projs(self.mambaeng.dt_projs_weight, self.mambaeng.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scan and fuse."""
        height, width = x.shape[1:3]
        paths = HEADS[self.pattern](height, width)
        ys = cross_selective_scan(**self.mambaeng.scan_inputs(x), paths=paths, merge="stack", backend=self.backend)
        fused: Tensor = self.esfusion(ys)
        return fused.unflatten(1, (height, width))

    def extra_repr(self) -> str:
        """Routes, for print()."""
        return f"pattern={self.pattern!r}"


class MHSM(nn.Module):
    """Multi-head scan module: y_proj(cat_norm(the heads of x_ssproj(x), side by side)).

    Args:
        d_model: Width of input and output; each head has d_model // head_num channels.
        d_state: States per channel.
        head_num: 3 (C, X and S of `ScanHead`) or 4 (Z as well).
        gfu_t: Threshold of the heads' GFU.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model). A state dict holds x_ssproj.weight under x_ssproj_W as well, as the
        published ones do.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        head_num: int = 3,
        gfu_t: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if head_num not in (3, 4):
            raise ValueError(f"head_num must be 3 or 4, got {head_num}")
        if d_model < head_num:
            raise ValueError(f"d_model must be at least head_num, {head_num}, got {d_model}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.head_num, self.dim_sub = d_model, head_num, d_model // head_num
        self.x_ssproj = nn.Linear(d_model, head_num * self.dim_sub, bias=False, **place)
        self.x_ssproj_W = self.x_ssproj.weight
        for pattern in list(HEADS)[:head_num]:
            head = ScanHead(self.dim_sub, d_state, gfu_t, pattern, **place, backend=backend)
            self.add_module(f"scanhead_{pattern}", head)
        self.cat_norm = nn.LayerNorm(head_num * self.dim_sub, **place)
        self.y_proj = nn.Linear(head_num * self.dim_sub, d_model, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images."""
        parts = zip(HEADS, self.x_ssproj(x).split(self.dim_sub, dim=3), strict=False)
        y = torch.cat([getattr(self, f"scanhead_{pattern}")(part) for pattern, part in parts], dim=3)
        out: Tensor = self.y_proj(self.cat_norm(y.to(self.cat_norm.weight.dtype)))
        return out

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, head_num={self.head_num}"


class VSSGate(nn.Module):
    """x, z = in_proj(u); out_norm(mhs(silu(conv2d(x)))) * silu(z). There is no projection behind it.

    Args:
        d_model: Width of input and output, and within.
        bias, conv_bias: Whether in_proj, and the convolution, have a bias.
        d_conv: Side of the depthwise convolution, odd.
        d_state, head_num, gfu_t: Of `MHSM`.
        dropout: Of the output.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model)
    """

    def __init__(
        self,
        d_model: int,
        bias: bool = False,
        d_conv: int = 3,
        conv_bias: bool = True,
        d_state: int = 16,
        head_num: int = 3,
        gfu_t: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd and at least 1, got {d_conv}")
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, got {d_state}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=bias, **place)
        self.conv2d = depthwise(d_model, d_conv, bias=conv_bias, **place)
        self.mhs = MHSM(d_model, d_state, head_num, gfu_t, **place, backend=backend)
        self.out_norm = nn.LayerNorm(d_model, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images."""
        if x.ndim != 4 or x.shape[3] != self.d_model:
            raise ValueError(f"x must have shape (batch, height, width, {self.d_model}), got {tuple(x.shape)}")
        x, z = self.in_proj(x).chunk(2, dim=3)
        x = F.silu(self.conv2d(x.movedim(3, 1))).movedim(1, 3)
        out: Tensor = self.dropout(self.out_norm(self.mhs(x)) * F.silu(z))
        return out


class MHSBlock(nn.Module):
    """x <- x + drop_path(self_attention(ln_1(x))), the block of MHS-VM (`VSSBlock` in the published code).

    Args:
        hidden_dim: Width of input and output.
        drop_path: Share of the samples for which the branch is left out in training.
        attn_drop_rate, d_state, head_num, gfu_t: Of `VSSGate`, there dropout, d_state, head_num, gfu_t.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, hidden_dim)
    """

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        attn_drop_rate: float = 0.0,
        d_state: int = 16,
        head_num: int = 3,
        gfu_t: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ln_1 = nn.LayerNorm(hidden_dim, **place)
        self.self_attention = VSSGate(
            hidden_dim,
            d_state=d_state,
            head_num=head_num,
            gfu_t=gfu_t,
            dropout=attn_drop_rate,
            backend=backend,
            **place,
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images."""
        mixed: Tensor = x + self.drop_path(self.self_attention(self.ln_1(x)))
        return mixed
