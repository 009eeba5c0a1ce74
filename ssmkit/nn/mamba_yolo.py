"""Mamba-YOLO's blocks: ODSSBlock of its backbone, XSSBlock of its neck, and what they are made of.

Wang et al. 2024, "Mamba YOLO", arXiv:2406.05835, section 3. Images are channels first, as in the published code, whose
arguments, parameter names and start values these are (`ODSSBlock` is its `VSSBlock`), so its state dicts load.
"""

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.layer_norm2d import LayerNorm2d
from ssmkit.nn.ss2d import SS2D, ForwardType, depthwise

# The published training sets these on every batch norm of its networks.
BATCH_NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.03}


class YOLOSS2D(SS2D):
    """`SS2D` of channels-first images with GELU after the convolution and in the gate, and start values of its own.

    A = -1 for every state, the weights and biases of the step sizes drawn from a normal distribution of spread 1.

    Args:
        d_model: Width of input and output.
        ss2d: Further arguments of `SS2D`, but for those of the start values, act_layer, forward_type and channel_first.
    Shapes:
        x and output (batch, d_model, height, width); parameters as those of `SS2D`. in_proj.weight and out_proj.weight may
        come as those of convolutions of one cell, (out, in, 1, 1), as published.
    """

    def __init__(
        self,
        d_model: int = 96,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ss2d: Any,
    ) -> None:
        kind: dict[str, Any] = {"act_layer": nn.GELU, "forward_type": ForwardType(fp32=True), "channel_first": True}
        super().__init__(d_model, device=device, dtype=dtype, **kind, **ss2d)
        nn.init.zeros_(self.A_logs)
        nn.init.normal_(self.dt_projs_weight)
        nn.init.normal_(self.dt_projs_bias)


class LSBlock(nn.Module):
    """Local spatial block: x + fc3(gelu(fc2(norm(fc1(x))))), fc1 a depthwise convolution, fc2 and fc3 of one cell.

    Args:
        in_features: Channels of input and output.
        drop: Dropout of the branch.
    Shapes:
        x and output (batch, in_features, height, width)
    """

    def __init__(
        self,
        in_features: int,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = depthwise(in_features, 3, **place)
        self.norm = nn.BatchNorm2d(in_features, **BATCH_NORM, **place)
        self.fc2 = nn.Conv2d(in_features, in_features, 1, **place)
        self.act = nn.GELU()
        self.fc3 = nn.Conv2d(in_features, in_features, 1, **place)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        out: Tensor = x + self.drop(self.fc3(self.act(self.fc2(self.norm(self.fc1(x))))))
        return out


class RGBlock(nn.Module):
    """Residual gated block: x, v = fc1(u); fc2(gelu(dwconv(x) + x) * v).

    Args:
        in_features: Channels of input and output.
        hidden_features: x and v have int(2 / 3 * hidden_features) channels each; by default in_features.
        drop: Dropout before fc2 and after it.
    Shapes:
        u and output (batch, in_features, height, width); fc1 and fc2 are convolutions of one cell.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(2 * (in_features if hidden_features is None else hidden_features) / 3)
        if hidden < 1:
            raise ValueError(f"hidden_features must be at least 2, got {hidden_features}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(in_features, 2 * hidden, 1, **place)
        self.dwconv = depthwise(hidden, 3, **place)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, in_features, 1, **place)
        self.drop = nn.Dropout(drop)

    def forward(self, u: Tensor) -> Tensor:
        """Mix the channels."""
        x, v = self.fc1(u).chunk(2, dim=1)
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(x) + x) * v)))


def _projection(in_channels: int, hidden_dim: int, *, bias: bool, **place: Any) -> nn.Sequential:
    """Another number of channels, batch norm, SiLU."""
    conv = nn.Conv2d(in_channels, hidden_dim, 1, bias=bias, **place)
    return nn.Sequential(conv, nn.BatchNorm2d(hidden_dim, **BATCH_NORM, **place), nn.SiLU())


class Branches(nn.Module):
    """What the two blocks share: y <- y + drop_path(scans(norm(lsblock(y)))); y <- y + drop_path(mlp(norm2(y))).

    As published, what is added to is y, not lsblock(y). Arguments as those of `ODSSBlock`.
    """

    def __init__(self, hidden_dim: int, drop_path: float, mlp_ratio: float, mlp_drop_rate: float, **place: Any) -> None:
        super().__init__()
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be at least 0, got {mlp_ratio}")
        self.norm = nn.Sequential(OrderedDict(norm=LayerNorm2d(hidden_dim, eps=1e-6, **place)))
        self.drop_path = DropPath(drop_path)
        self.lsblock = LSBlock(hidden_dim, **place)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = nn.Sequential(OrderedDict(norm=LayerNorm2d(hidden_dim, eps=1e-6, **place)))
            self.mlp = RGBlock(hidden_dim, int(hidden_dim * mlp_ratio), mlp_drop_rate, **place)

    def add(self, y: Tensor, scans: nn.Module) -> Tensor:
        """y with both branches added."""
        y = y + self.drop_path(scans(self.norm(self.lsblock(y))))
        return y if self.mlp is None else y + self.drop_path(self.mlp(self.norm2(y)))


class ODSSBlock(Branches):
    """y = proj_conv(u); y <- y + drop_path(op(norm(lsblock(y)))); y <- y + drop_path(mlp(norm2(y))).

    proj_conv is a convolution of one cell, batch norm and SiLU, op a `YOLOSS2D`, lsblock an `LSBlock`, mlp an `RGBlock`. As
    published, what is added to is y, not lsblock(y).

    Args:
        in_channels, hidden_dim: Channels of input, of output.
        drop_path: Share of the samples for which a branch is left out in training.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_conv, ssm_conv_bias, ssm_drop_rate: Of `YOLOSS2D`, there d_state, ssm_ratio,
            dt_rank, d_conv, conv_bias, dropout.
        mlp_ratio: The RGBlock has int(mlp_ratio * hidden_dim) hidden features; 0 leaves it out.
        mlp_drop_rate: Dropout of the RGBlock.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        (batch, in_channels, height, width) to (batch, hidden_dim, height, width)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_dim: int,
        drop_path: float = 0.0,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        mlp_ratio: float = 4.0,
        mlp_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(hidden_dim, drop_path, mlp_ratio, mlp_drop_rate, **place)
        self.proj_conv = _projection(in_channels, hidden_dim, bias=True, **place)
        self.op = YOLOSS2D(
            hidden_dim,
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            d_conv=ssm_conv,
            conv_bias=ssm_conv_bias,
            dropout=ssm_drop_rate,
            backend=backend,
            **place,
        )

    def forward(self, u: Tensor) -> Tensor:
        """Mix the tokens of images, then their channels."""
        return self.add(self.proj_conv(u), self.op)


class XSSBlock(Branches):
    """`ODSSBlock` with n scans in a row: y = in_proj(u); y <- y + drop_path(ss2d(norm(lsblock(y)))); then the RGBlock.

    in_proj is a convolution of one cell without bias, batch norm and SiLU where the number of channels changes, and nothing
    where it does not.

    Args:
        in_channels, hidden_dim: Channels of input, of output.
        n: How many `YOLOSS2D` stand in a row.
        mlp_ratio, drop_path, ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_conv, ssm_conv_bias, ssm_drop_rate, mlp_drop_rate,
            backend: As in `ODSSBlock`.
    Shapes:
        (batch, in_channels, height, width) to (batch, hidden_dim, height, width)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_dim: int,
        n: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        mlp_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(hidden_dim, drop_path, mlp_ratio, mlp_drop_rate, **place)
        changes = in_channels != hidden_dim
        self.in_proj = _projection(in_channels, hidden_dim, bias=False, **place) if changes else nn.Identity()
        self.ss2d = nn.Sequential(
            *(
                YOLOSS2D(
                    hidden_dim,
                    d_state=ssm_d_state,
                    ssm_ratio=ssm_ratio,
                    dt_rank=ssm_dt_rank,
                    d_conv=ssm_conv,
                    conv_bias=ssm_conv_bias,
                    dropout=ssm_drop_rate,
                    backend=backend,
                    **place,
                )
                for _ in range(n)
            )
        )

    def forward(self, u: Tensor) -> Tensor:
        """Mix the tokens of images, then their channels."""
        return self.add(self.in_proj(u), self.ss2d)
