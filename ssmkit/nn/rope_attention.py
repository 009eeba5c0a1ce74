"""Attention over the cells of an image, with positions that turn along both axes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.ops._check import check_ndim, check_shape


class RoPEAttention2D(nn.Module):
    """Softmax attention over all cells of an image; `RoPEAttention2D` of Mamba2D's official code.

        q, k, v = qkv(x);   q, k = q_norm(turn(q)), k_norm(turn(k))
        out = proj(softmax(q k^T / sqrt(head_dim)) v)

    `turn` rotates neighbouring pairs of channels: the first half of them by row * base^(-k / n), the second half by
    column * base^(-k / n), for k = 0..n-1 with n = head_dim / 4. Su et al. 2021, "RoFormer", arXiv:2104.09864. The norms
    are over head_dim and come after the turn. The attention itself is
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        dim: Channels of input and output.
        head_dim: Channels per head, a multiple of 4.
        num_heads: By default dim // head_dim, and at least 1; the inner width is num_heads * head_dim.
        rope_base: Base of the frequencies.
    Shapes:
        x and output (batch, height, width, dim)
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        num_heads: int | None = None,
        rope_base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 4 or head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        self.num_heads = max(dim // head_dim, 1) if num_heads is None else num_heads
        for name, size in (("dim", dim), ("num_heads", self.num_heads)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dim, self.head_dim, self.rope_base = dim, head_dim, rope_base
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * self.num_heads * head_dim, bias=False, **place)
        self.proj = nn.Linear(self.num_heads * head_dim, dim, bias=False, **place)
        self.q_norm = nn.LayerNorm(head_dim, **place)
        self.k_norm = nn.LayerNorm(head_dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of images (batch, height, width, dim)."""
        check_ndim("x", x, "batch, height, width, dim")
        check_shape("x", x, (*x.shape[:3], self.dim), "batch, height, width, dim")
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        angle = axial_angles(height, width, self.head_dim, self.rope_base, x)
        q, k = self.q_norm(turned(q, angle)), self.k_norm(turned(k, angle))
        # Under autocast the norms give fp32.
        q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (height, width)))

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def axial_angles(height: int, width: int, head_dim: int, base: float, like: Tensor) -> Tensor:
    """By how much each pair of channels turns at each cell, (height * width, head_dim / 2) in fp32, fp64 like `like`."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    count = head_dim // 4
    frequency = base ** (-torch.arange(count, device=like.device, dtype=wide) / count)
    row, col = (torch.arange(size, device=like.device, dtype=wide)[:, None] * frequency for size in (height, width))
    return torch.cat((row[:, None].expand(-1, width, -1), col.expand(height, -1, -1)), dim=-1).flatten(0, 1)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the channels of x (batch, cells, heads, head_dim), each turned by its angle."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.to(angle.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
