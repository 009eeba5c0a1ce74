"""PlainMamba's mixer and layer: selective scans along four snakes that go from neighbour to neighbour.

Yang et al. 2024, "PlainMamba", arXiv:2403.17695, section 3.2. Arguments, parameter names and initialisation are those of
the published code, so its state dicts load.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import checked_dt_rank, init_dt, s4d_real
from ssmkit.nn.rms_norm import RMSNorm
from ssmkit.nn.ss2d import depthwise
from ssmkit.nn.vim import decays
from ssmkit.ops import cross_selective_scan
from ssmkit.paths import MOVES, continuous, moves
from ssmkit.paths.kept import kept


class PlainMamba2D(nn.Module):
    """The PlainMamba mixer: x, z = in_proj(u); x = silu(conv2d(x)); y = scans of x * silu(z); out_proj(y), times gamma.

        dt, B, C = x_proj(x)                                          of the tokens, row by row
        h_p = exp(dt_p A) h_{p-1} + dt_p (B_p + direction_Bs_m) x_l   l the token that the path visits at p, m the move to it
        y_l = sum over the four paths of C_p . h_p + D x_l

    Two things are as in the published code, whose weights depend on them. Only x and the moves follow the paths: position p
    of each takes dt, B and C of token p of the rows. And the bias of dt_proj counts twice. Here the narrow dt (before
    dt_proj), B and C are put where the paths will meet them; x and y stay where they are.

    Args:
        d_model, d_state, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, bias: As in `Mamba`; the
            released models have a bias.
        conv_size: Side of the depthwise convolution, odd.
        conv_bias: Whether it has a bias.
        init_layer_scale: Start of gamma, a factor per output channel; None for none.
        default_hw_shape: Height and width of images when forward is not told.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height * width, d_model); direction_Bs (5, d_state), by the moves start, right, left, up, down
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_size: int = 7,
        conv_bias: bool = True,
        bias: bool = False,
        init_layer_scale: float | None = None,
        default_hw_shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("expand", expand), ("conv_size", conv_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, got {conv_size}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.expand = d_model, d_state, expand
        self.d_inner = int(expand * d_model)
        self.default_hw_shape, self.backend = default_hw_shape, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **place))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        self.conv2d = depthwise(self.d_inner, conv_size, bias=conv_bias, **place)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **place)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **place)
        init_dt(self.dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log = nn.Parameter(s4d_real(self.d_inner, d_state, device))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)
        self.direction_Bs = nn.Parameter(torch.empty(len(MOVES), d_state, **place))
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, hw_shape: tuple[int, int] | None = None) -> Tensor:
        """Mix the tokens of images.

        Args:
            x: Input                                       (batch, height * width, d_model)
            hw_shape: Height and width; by default default_hw_shape.
        """
        height, width = self._shape_of(x, hw_shape)
        x, z = self.in_proj(x).chunk(2, dim=2)
        x = self.conv2d(x.unflatten(1, (height, width)).movedim(3, 1))
        x = F.silu(x).movedim(1, 3).flatten(1, 2)
        y = self._scan(x, z, height, width)
        out: Tensor = self.out_proj(y)
        return out if self.gamma is None else out * self.gamma

    def _shape_of(self, x: Tensor, hw_shape: tuple[int, int] | None) -> tuple[int, int]:
        shape = self.default_hw_shape if hw_shape is None else hw_shape
        if shape is None:
            raise ValueError("hw_shape must be given, (height, width), where default_hw_shape is not")
        height, width = shape
        if x.ndim != 3 or x.shape[1] != height * width or x.shape[2] != self.d_model:
            raise ValueError(
                f"x must have shape (batch, {height * width}, {self.d_model}) for hw_shape {(height, width)}, "
                f"got {tuple(x.shape)}"
            )
        return height, width

    def _scan(self, x: Tensor, z: Tensor, height: int, width: int) -> Tensor:
        """The four scans, added up and gated."""
        paths = continuous(height, width)
        npaths = len(paths)
        position, move = _met(height, width, x.device)
        projected = self.x_proj(x).index_select(1, position.flatten()).unflatten(1, position.shape)
        dt, B, C = projected.split((self.dt_rank, self.d_state, self.d_state), dim=3)
        B = B + self.direction_Bs[move].to(B.dtype)
        return cross_selective_scan(
            x,
            dt,
            decays(self.A_log).expand(npaths, -1, -1),
            B,
            C,
            paths,
            D=self.D.expand(npaths, -1),
            z=z,
            dt_bias=(2 * self.dt_proj.bias).expand(npaths, -1),
            dt_weight=self.dt_proj.weight.expand(npaths, -1, -1),
            dt_softplus=True,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, expand={self.expand}, d_inner={self.d_inner}"


@kept
def _met(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token the positions at which the four paths visit it, and the moves that lead there.

    Both                                                   (height * width, 4)   int64
    """
    # The tables outlive the mode of their first reader, such as that of fake tensors in a trace.
    with torch.inference_mode(False), _disable_current_modes():
        paths = continuous(height, width)
        positions = [path.inverse() for path in paths]
        came = [moves(path)[position] for path, position in zip(paths, positions, strict=True)]
        return torch.stack(positions, 1).to(device), torch.stack(came, 1).to(device)


class PlainMambaLayer(nn.Module):
    """x <- x + drop_path(mamba(norm(x))), and then, where asked, x <- gelu(batch norm(depthwise convolution of x)).

    Args:
        embed_dims: Width of input and output.
        use_rms_norm: The norm is an RMSNorm in place of a LayerNorm.
        with_dwconv: Whether the convolution follows, as in the first layer of the smallest released model.
        drop_path_rate: Share of the samples for which the mixer is left out in training.
        mamba_cfg: Arguments of `PlainMamba2D`.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height * width, embed_dims)
    """

    def __init__(
        self,
        embed_dims: int,
        use_rms_norm: bool = False,
        with_dwconv: bool = False,
        drop_path_rate: float = 0.0,
        mamba_cfg: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = RMSNorm(embed_dims, **place) if use_rms_norm else nn.LayerNorm(embed_dims, **place)
        self.dw = None
        if with_dwconv:
            self.dw = nn.Sequential(
                depthwise(embed_dims, 3, bias=False, **place), nn.BatchNorm2d(embed_dims, **place), nn.GELU()
            )
        options = {**({} if mamba_cfg is None else mamba_cfg), "d_model": embed_dims}
        self.mamba = PlainMamba2D(**options, **place, backend=backend)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int] | None = None) -> Tensor:
        """Mix the tokens of images; arguments as those of `PlainMamba2D.forward`."""
        mixed: Tensor = x + self.drop_path(self.mamba(self.norm(x), hw_shape))
        if self.dw is None:
            return mixed
        shape = self.mamba.default_hw_shape if hw_shape is None else hw_shape
        assert shape is not None
        convolved: Tensor = self.dw(mixed.unflatten(1, tuple(shape)).movedim(3, 1))
        return convolved.flatten(2).mT
