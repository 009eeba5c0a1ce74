"""`ssmkit.nn.GatedMLP` with the official arguments."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ssmkit.nn


class GatedMLP(ssmkit.nn.GatedMLP):
    """y, gate = fc1(x); fc2(y * activation(gate)).

    Args:
        in_features, hidden_features, out_features, bias, multiple_of: As in `ssmkit.nn.GatedMLP`.
        activation: Of the gate.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, hidden_features, out_features, bias, multiple_of, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
