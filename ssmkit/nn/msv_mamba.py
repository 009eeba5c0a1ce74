"""MSVMamba's multi-scale scan and its block: one route at full resolution, three over a coarse image.

Shi et al. 2024, "Multi-Scale VMamba", arXiv:2405.14174, section 3. Arguments, parameter names and initialisation are those
of the published code for its first models (`SS2D` with sscore_type "multiscale_4scan_12", and `VSSBlock`, there), so their
state dicts load.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkit.nn._path_scans import PathScans, init_dt_projs
from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import checked_dt_rank
from ssmkit.nn.ss2d import depthwise
from ssmkit.ops import cross_selective_scan, selective_scan
from ssmkit.paths import column, row

COARSE, FINE = slice(0, 1), slice(1, 2)  # sets of parameters


class SEModule(nn.Module):
    """x times sigmoid(fc(relu(fc(mean of x over the positions)))), without biases: squeeze and excitation.

    Hu et al. 2017, "Squeeze-and-Excitation Networks", arXiv:1709.01507.

    Args:
        channels: Of the image.
        reduction: Channels between are channels // reduction.
    Shapes:
        x and output (batch, height, width, channels)
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reduced = channels // reduction
        if reduced < 1:
            raise ValueError(f"channels must be at least reduction, {reduction}, got {channels}")
        place: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            nn.Linear(channels, reduced, **place), nn.ReLU(), nn.Linear(reduced, channels, **place), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels."""
        return x * self.fc(x.mean((1, 2), keepdim=True))


class MS2D(PathScans):
    """The multi-scale mixer: x, z = in_proj(u); out_proj(se(fine + upsampled coarse) * silu(z)).

        x_0 = silu(conv2d(x)), x_1 = silu(conv2d_b1(x)), of every second row and column
        fine = out_norm(scan of x_0 by rows), with the second set of parameters
        coarse = sum over the three routes of out_norm(scan of x_1), with the first set

    The coarse routes (rows backwards, columns, columns backwards) are one sequence: each starts from the state in which the
    one before it ended. Upsampling is bilinear.

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N; 1 in the released models.
        ssm_ratio: Inner width is int(ssm_ratio * d_model).
        dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor: As in `Mamba`.
        act_layer: Activation after the convolutions, and of the gate.
        d_conv: Side of the depthwise convolution at full resolution, odd; that of the coarse one is 7.
        conv_bias, bias: Whether the convolutions, and the in and out projections, have a bias.
        dropout: Of the output.
        add_se: Whether there is an `SEModule`, as in the released models.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model). By sets: x_proj_weight (2, R + 2 N, d_inner), dt_projs_weight
        (2, d_inner, R), dt_projs_bias (2, d_inner), A_logs (2 * d_inner, N), Ds (2 * d_inner,).
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        add_se: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner = int(ssm_ratio * d_model)
        for name, size in (("d_model", d_model), ("d_state", d_state), ("ssm_ratio * d_model", self.d_inner)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd and at least 1, got {d_conv}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.backend = d_model, d_state, backend
        inner = self.d_inner
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **place)
        self.act = act_layer()
        self.conv2d = depthwise(inner, d_conv, bias=conv_bias, **place)
        self.conv2d_b1 = depthwise(inner, 7, stride=2, bias=conv_bias, **place)
        self.add_path_weights(2, inner, d_state, self.dt_rank, **place)
        init_dt_projs(self.dt_projs_weight, self.dt_projs_bias, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.out_norm = nn.LayerNorm(inner, **place)
        self.se = SEModule(inner, **place) if add_se else nn.Identity()
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images."""
        if x.ndim != 4 or x.shape[3] != self.d_model:
            raise ValueError(f"x must have shape (batch, height, width, {self.d_model}), got {tuple(x.shape)}")
        x, z = self.in_proj(x).chunk(2, dim=3)
        x = x.movedim(3, 1)
        fine = self.scan_fine(self.act(self.conv2d(x)).movedim(1, 3))
        coarse = self.scan_coarse(self.act(self.conv2d_b1(x)).movedim(1, 3))
        coarse = F.interpolate(coarse.movedim(3, 1), size=fine.shape[1:3], mode="bilinear", align_corners=False)
        y = self.se(fine + coarse.movedim(1, 3)) * self.act(z)
        out: Tensor = self.dropout(self.out_proj(y))
        return out

    def scan_fine(self, x: Tensor) -> Tensor:
        """The scan by rows, normalised.                        x and result (batch, height, width, d_inner)"""
        inputs = self.scan_inputs(x, FINE)
        y = cross_selective_scan(**inputs, paths=(row(*x.shape[1:3]),), backend=self.backend)
        return self._normed(y, x)

    def scan_coarse(self, x: Tensor) -> Tensor:
        """The three other routes, each normalised, added up.   x and result (batch, height, width, d_inner)"""
        size = x.shape[1:3]
        inputs = self.scan_inputs(x, COARSE)
        tokens = inputs["x"]
        dt = F.linear(inputs["dt"][:, :, 0], inputs["dt_weight"][0].to(tokens.dtype)).to(tokens.dtype)
        state: Tensor | None = None
        total: Tensor | None = None
        for path in (row(*size).flip(), column(*size), column(*size).flip()):
            y, state = selective_scan(
                tokens,
                dt,
                inputs["A"][0],
                inputs["B"][:, :, 0],
                inputs["C"][:, :, 0],
                D=inputs["D"][0],
                dt_bias=inputs["dt_bias"][0],
                dt_softplus=True,
                initial_state=state,
                path=path,
                return_final_state=True,
                backend=self.backend,
            )
            normed = self._normed(y, x)
            total = normed if total is None else total + normed
        assert total is not None
        return total

    def _normed(self, y: Tensor, like: Tensor) -> Tensor:
        """out_norm of tokens, as an image."""
        normed: Tensor = self.out_norm(y.to(self.out_norm.weight.dtype))
        return normed.to(like.dtype).view(like.shape)

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}"


class ConvFFN(nn.Module):
    """y = linear1(x); linear2(gelu(y + dwc(y))): an MLP that looks at the eight cells around each.

    Args:
        channels: Of input and output.
        expansion: Channels between are expansion * channels.
        drop: Dropout after linear1 and after linear2.
    Shapes:
        x and output (batch, channels, height, width); linear1 and linear2 are convolutions of one cell.
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 2,
        drop: float = 0.2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear1 = nn.Conv2d(channels, expansion * channels, 1, **place)
        self.dwc = depthwise(expansion * channels, 3, **place)
        self.linear2 = nn.Conv2d(expansion * channels, channels, 1, **place)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels."""
        x = self.drop(self.linear1(x))
        return self.drop(self.linear2(F.gelu(x + self.dwc(x))))


class MSVSSBlock(nn.Module):
    """x <- x + drop_path(op(norm(x))); x <- x + drop_path(convFFN(norm2(x))), with op an `MS2D`.

    Args:
        hidden_dim: Width of input and output.
        drop_path: Share of the samples for which a branch is left out in training.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate, add_se: Of `MS2D`, there
            d_state, ssm_ratio, dt_rank, act_layer, d_conv, conv_bias, dropout, add_se.
        ffn_dropout: Dropout of the `ConvFFN`; none in the released models.
        use_checkpoint: Compute the block again in backward in place of keeping what it needs.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, hidden_dim)
    """

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_act_layer: Callable[[], nn.Module] = nn.SiLU,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        add_se: bool = True,
        ffn_dropout: float = 0.0,
        use_checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(hidden_dim, **place)
        self.op = MS2D(
            hidden_dim,
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            act_layer=ssm_act_layer,
            d_conv=ssm_conv,
            conv_bias=ssm_conv_bias,
            dropout=ssm_drop_rate,
            add_se=add_se,
            backend=backend,
            **place,
        )
        self.drop_path = DropPath(drop_path)
        self.convFFN = ConvFFN(hidden_dim, drop=ffn_dropout, **place)
        self.norm2 = nn.LayerNorm(hidden_dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images, then their channels."""
        if self.use_checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._mix, x, use_reentrant=False)
            return out
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        x = x + self.drop_path(self.convFFN(self.norm2(x).movedim(3, 1)).movedim(1, 3))
        return x
