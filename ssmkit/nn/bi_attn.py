"""BiAttn, a gate per channel: how LocalMamba and EfficientVMamba weigh their branches.

Huang et al. 2024, "LocalMamba", arXiv:2403.09338, section 4.2. Arguments and parameter names are those of the published code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiAttn(nn.Module):
    """x times sigmoid(channel_select(gelu(global_reduce(mean of norm(x) over the tokens)))).

    Args:
        in_channels: Channels of the tokens.
        act_ratio: Channels between, as a share of in_channels, rounded down.
        act_fn, gate_fn: Activation between, and that of the gate.
    Shapes:
        x and output (batch, ..., in_channels)
    """

    def __init__(
        self,
        in_channels: int,
        act_ratio: float = 0.125,
        act_fn: Callable[[], nn.Module] = nn.GELU,
        gate_fn: Callable[[], nn.Module] = nn.Sigmoid,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reduced = int(in_channels * act_ratio)
        if reduced < 1:
            raise ValueError(f"act_ratio * in_channels must be at least 1, got {act_ratio} * {in_channels}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(in_channels, **place)
        self.global_reduce = nn.Linear(in_channels, reduced, **place)
        self.act_fn = act_fn()
        self.channel_select = nn.Linear(reduced, in_channels, **place)
        self.gate_fn = gate_fn()

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels."""
        return x * self.gates(x, range(1, x.ndim - 1))

    def gates(self, x: Tensor, over: Sequence[int]) -> Tensor:
        """The factors of x from its means over some axes, which have size 1 in the result."""
        # The norm's weight and bias commute with the mean, after which there is less to multiply.
        mean = F.layer_norm(x, self.norm.normalized_shape, eps=self.norm.eps).mean(tuple(over), keepdim=True)
        mean = torch.addcmul(self.norm.bias, mean, self.norm.weight).to(x.dtype)
        return self.gate_fn(self.channel_select(self.act_fn(self.global_reduce(mean))))
