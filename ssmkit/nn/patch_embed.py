"""Images to patch tokens."""

from typing import Any

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One strided convolution: every patch becomes a token.

    Args:
        img_size: Height and width the grid is stated for; other sizes pass as well.
        patch_size: Height and width of a patch.
        in_chans: Channels of the image.
        embed_dim: Channels of a token.
        stride: Step between patches; patch_size by default.
        bias: Whether the convolution has one.
    Shapes:
        x (batch, in_chans, height, width) -> (batch, rows, cols, embed_dim)
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        stride: int | tuple[int, int] | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        self.stride = self.patch_size if stride is None else pair(stride)
        self.grid_size = self.grid_of(*pair(img_size))
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, bias=bias, **place)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if height < self.patch_size[0] or width < self.patch_size[1]:
            raise ValueError(
                f"an image must be at least one patch of {self.patch_size[0]} x {self.patch_size[1]}, "
                f"got {height} x {width}: scale it up, or take a smaller patch_size"
            )
        rows, cols = (
            (size - p) // s + 1 for size, p, s in zip((height, width), self.patch_size, self.stride, strict=True)
        )
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of an image."""
        self.grid_of(*x.shape[-2:])
        tokens: Tensor = self.proj(x)
        return tokens.movedim(1, -1)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A size for both axes."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
