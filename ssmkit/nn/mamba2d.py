"""Mamba2D layer: a recurrence over both axes of an image at once, and beside it a convolutional path.

Baty et al. 2024, "Mamba2D", arXiv:2412.16146. Arguments, parameter names and initialisation are those of the official
code's `M2DBlock` and `ResBlock` in its second version, so official state dicts load.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import checked_dt_rank, init_dt, s4d_real
from ssmkit.nn.mlp import MLP
from ssmkit.nn.rope_attention import RoPEAttention2D
from ssmkit.ops import grid_scan
from ssmkit.ops._check import check_ndim, check_shape

STARTS = {"TL": "top_left", "TR": "top_right", "BL": "bottom_left", "BR": "bottom_right"}


class Mamba2D(nn.Module):
    """The Mamba2D mixer, `M2DBlock` in the official code.

        x = gelu(in_proj(u));  dt_top, dt_left, B_top, B_left, C = x_proj(x)          dt through dt_projT and dt_projL
        h_ij = 1/2 (a_left h_{i,j-1} + b_left + a_top h_{i-1,j} + b_top)              one side alone along the borders
        y = out_proj(gelu(C . h + D x)),  and with local_path  + local_path(local_norm(u))

    with a = exp(dt A) and b = dt B x per side; see `ssmkit.ops.grid_scan`. There is no gate and no convolution before the
    scan.

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N.
        expand_factor: Inner width is expand_factor * d_model.
        dt_rank: Rank of either side's step sizes; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor;
            both sides start with the same.
        dt_init, dt_scale: The dt_proj weights start uniform in +-dt_scale / sqrt(dt_rank) ("random"), or there
            ("constant").
        double_scans: Must be False; the official code cannot be made with it either.
        local_path: Whether to add the convolutional path, `SepConv`.
        scan_start: The corner where the scan starts: "TL", "TR", "BL" or "BR", top or bottom, left or right.
        recomp: Accepted for compatibility; backward always makes the states again, tile by tile.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model); one row or one column of cells will do.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand_factor: int = 1,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        double_scans: bool = False,
        local_path: bool = False,
        scan_start: Literal["TL", "TR", "BL", "BR"] = "TL",
        recomp: str = "partial",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("expand_factor", expand_factor)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if double_scans:
            raise ValueError("double_scans must be False: add two layers, one with scan_start='BR'")
        if scan_start not in STARTS:
            raise ValueError(f"scan_start must be one of {', '.join(STARTS)}, got {scan_start!r}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.d_inner = d_model, d_state, expand_factor * d_model
        self.scan_start = scan_start
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.local_norm = nn.LayerNorm(d_model, **place) if local_path else None
        self.local_path = SepConv(d_model, **place) if local_path else None
        self.in_proj = nn.Linear(d_model, self.d_inner, **place)
        self.x_proj = nn.Linear(self.d_inner, 2 * self.dt_rank + 3 * d_state, bias=False, **place)
        self.dt_projT = nn.Linear(self.dt_rank, self.d_inner, **place)
        self.dt_projL = nn.Linear(self.dt_rank, self.d_inner, **place)
        self.AT_log = nn.Parameter(s4d_real(self.d_inner, d_state, device))
        self.AL_log = nn.Parameter(s4d_real(self.d_inner, d_state, device))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, **place)
        for parameter in (self.AT_log, self.AL_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for proj in (self.dt_projT, self.dt_projL):
            init_dt(proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        with torch.no_grad():
            self.dt_projL.bias.copy_(self.dt_projT.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of images (batch, height, width, d_model)."""
        check_image(x, self.d_model)
        y = self.out_proj(F.gelu(self.scan(F.gelu(self.in_proj(x)))))
        if self.local_path is None or self.local_norm is None:
            return y
        return y + self.local_path(self.local_norm(x))

    def scan(self, x: Tensor) -> Tensor:
        """The recurrence alone, over (batch, height, width, d_inner)."""
        return grid_scan(**self.scan_inputs(x), start=STARTS[self.scan_start], backend=self.backend)

    def scan_inputs(self, x: Tensor) -> dict[str, Any]:
        """What `grid_scan` takes, made of its x."""
        ranks, states = [self.dt_rank] * 2, [self.d_state] * 3
        dt_top, dt_left, B_top, B_left, C = self.x_proj(x).split([*ranks, *states], dim=-1)
        return {
            "x": x,
            "dt_top": F.linear(dt_top, self.dt_projT.weight),
            "dt_left": F.linear(dt_left, self.dt_projL.weight),
            "A_top": rates(self.AT_log),
            "A_left": rates(self.AL_log),
            "B_top": B_top,
            "B_left": B_left,
            "C": C,
            "D": self.D,
            "dt_bias_top": self.dt_projT.bias,
            "dt_bias_left": self.dt_projL.bias,
            "dt_softplus": True,
        }

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, scan_start={self.scan_start}"


class SepConv(nn.Module):
    """The convolutional path: pwconv2(act2(dwconv(act1(pwconv1(x))))), 3 x 3 per channel at twice the width.

    Its layers have no biases but those of the activations. Yu et al. 2022, "MetaFormer baselines", arXiv:2210.13452.

    Args:
        dim: Channels of input and output.
        expansion_ratio: Channels between, in multiples of dim.
    Shapes:
        x and output (batch, height, width, dim)
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        between = expansion_ratio * dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pwconv1 = nn.Linear(dim, between, bias=False, **place)
        self.act1 = StarReLU(**place)
        self.dwconv = nn.Conv2d(between, between, 3, padding=1, groups=between, bias=False, **place)
        self.act2 = StarReLU(**place)
        self.pwconv2 = nn.Linear(between, dim, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each cell with its neighbours."""
        x = self.act1(self.pwconv1(x))
        x = self.dwconv(x.movedim(-1, 1)).movedim(1, -1)
        return self.pwconv2(self.act2(x))


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias, with two learned numbers. arXiv:2210.13452."""

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        x = F.relu(x)
        return torch.addcmul(self.bias, self.scale * x, x)


class Scale(nn.Module):
    """x * scale, one learned factor per channel: (..., dim)."""

    def __init__(
        self,
        dim: int,
        init_value: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), init_value, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        return x * self.scale


class Mamba2DBlock(nn.Module):
    """A residual block of Mamba2D, `ResBlock` in the official code.

        x = res_scale1 * x + token_mixer(norm1(x));   x = res_scale2 * x + MLP(norm2(x))

    Args:
        embed_dim: Channels.
        token_mixer: "2D" is `Mamba2D`, "2D_local" the same with its local path, "RopeAttention" `RoPEAttention2D`.
        mlp_expand_factor: Width between of the MLP, in multiples of embed_dim.
        drop_path: Share of the samples that training leaves without each branch.
        res_scale_init_value: Start of the factors of x; without one there are no factors.
        scan_start, recomp: As in `Mamba2D`.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, embed_dim)
    """

    def __init__(
        self,
        embed_dim: int = 64,
        token_mixer: Literal["2D", "2D_local", "RopeAttention"] = "2D",
        mlp_expand_factor: int = 4,
        drop_path: float = 0.0,
        res_scale_init_value: float | None = None,
        scan_start: Literal["TL", "TR", "BL", "BR"] = "TL",
        recomp: str = "partial",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if token_mixer not in ("2D", "2D_local", "RopeAttention"):
            raise ValueError(f"token_mixer must be '2D', '2D_local' or 'RopeAttention', got {token_mixer!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(embed_dim, **place)
        self.token_mixer: nn.Module = (
            RoPEAttention2D(embed_dim, **place)
            if token_mixer == "RopeAttention"
            else Mamba2D(
                embed_dim,
                local_path=token_mixer == "2D_local",
                scan_start=scan_start,
                recomp=recomp,
                backend=backend,
                **place,
            )
        )
        self.norm2 = nn.LayerNorm(embed_dim, **place)
        self.MLP = MLP(embed_dim, mlp_expand_factor * embed_dim, **place)
        self.drop_path = DropPath(drop_path)
        self.res_scale1, self.res_scale2 = (
            nn.Identity() if res_scale_init_value is None else Scale(embed_dim, res_scale_init_value, **place)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Both branches."""
        x = self.res_scale1(x) + self.drop_path(self.token_mixer(self.norm1(x)))
        return self.res_scale2(x) + self.drop_path(self.MLP(self.norm2(x)))


def rates(A_log: Tensor) -> Tensor:
    """Decay rates -exp(A_log), in fp32 or wider."""
    return -torch.exp(A_log.to(torch.float64 if A_log.dtype == torch.float64 else torch.float32))


def check_image(x: Tensor, channels: int) -> None:
    """Layers over images take them channels last."""
    check_ndim("x", x, "batch, height, width, channels")
    check_shape("x", x, (*x.shape[:3], channels), "batch, height, width, channels")
