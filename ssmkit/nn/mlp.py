"""MLPs: gated as in hybrid language models, plain as in vision backbones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.linear import project


class GatedMLP(nn.Module):
    """y, gate = fc1(x); fc2(y * silu(gate)). Names are those of official checkpoints.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.

    Args:
        in_features: Width of input and, unless out_features is given, of output.
        hidden_features: Width of y and gate, rounded up to multiple_of; by default 8/3 of in_features.
        multiple_of: The hidden width is a multiple of it.
        bias: Whether the projections have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wanted = int(8 * in_features / 3) if hidden_features is None else hidden_features
        for name, size in (("in_features", in_features), ("hidden_features", wanted), ("multiple_of", multiple_of)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        hidden = -(-wanted // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(
            hidden, in_features if out_features is None else out_features, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y, gate = project(self.fc1, x).chunk(2, dim=-1)
        return project(self.fc2, y * F.silu(gate))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with the names of vision backbones.

    Args:
        in_features: Width of input.
        hidden_features: Width between; by default in_features.
        out_features: Width of output; by default in_features.
        drop: Dropout after the activation and after fc2.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        for name, size in (("in_features", in_features), ("hidden_features", hidden), ("out_features", out)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.fc1 = nn.Linear(in_features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
