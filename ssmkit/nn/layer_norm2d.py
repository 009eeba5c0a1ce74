"""LayerNorm over the channels of channels-first images."""

from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """nn.LayerNorm over dim 1: x and output (batch, channels, height, width). The names are weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each cell over its channels."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
