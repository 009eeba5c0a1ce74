"""VSSD layer: state-space duality without an order, beside it a depthwise convolution over the image.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", arXiv:2407.18559. Arguments, parameter names and
initialisation are those of the official `Mamba2` and `VMAMBA2Block` of that code, so official state dicts load.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import initial_dt_bias
from ssmkit.nn.mlp import MLP
from ssmkit.ops import ssd, ssd_noncausal
from ssmkit.ops._check import check_limits, check_shape


class VSSD(nn.Module):
    """The VSSD mixer.

        z, xBC, dt = in_proj(u);   x, B, C = silu(conv2d(xBC));   dt = softplus(dt + dt_bias)
        S = sum_l dt_l exp(A_log) x_l B_l^T;   y_l = S C_l + D x_l             one state for all tokens, without an order
        out = out_proj(norm(y) * z)                                            a LayerNorm, and z as it is

    dt does not pass the convolution. See `ssmkit.ops.ssd_noncausal`.

    Args:
        d_model: Width of input and output.
        d_conv: Cells a side of the convolution, an odd number.
        expand: Inner width is expand * d_model.
        headdim: Channels per head, P; it divides the inner width.
        ngroups: Groups of heads that share B and C; -1 gives each head its own. Head h reads group h % ngroups, in the
            causal forms h // (nheads // ngroups).
        A_init_range: exp(A_log) starts uniform in this range.
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor.
        dt_limit: Step sizes are clamped into it, in the causal forms alone.
        bias, conv_bias: Whether the in and out projections and the convolution have a bias.
        chunk_size: Accepted for compatibility; the op knows its chunk.
        linear_attn_duality: False, the default of the official class though not of its models, scans the tokens row by
            row as Mamba-2 does.
        d_state: States per channel, N.
        ssd_positve_dA: False turns the sign of the state. Spelt as in the official code.
        bidirection: In the causal form the second half of the heads, and of the groups, scans backwards.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        u and output (batch, H * W, d_model), row after row
    """

    def __init__(
        self,
        d_model: int,
        d_conv: int = 3,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        linear_attn_duality: bool = True,
        d_state: int = 64,
        *,
        ssd_positve_dA: bool = True,
        bidirection: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_conv": d_conv, "expand": expand, "headdim": headdim, "d_state": d_state}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, so that the image keeps its size, got {d_conv}")
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim:
            raise ValueError(f"headdim must divide the inner width {self.d_inner}, got {headdim}")
        self.nheads = self.d_inner // headdim
        self.ngroups = self.nheads if ngroups == -1 else ngroups
        if self.ngroups < 1 or self.nheads % self.ngroups:
            raise ValueError(f"ngroups must divide the number of heads {self.nheads}, or be -1, got {ngroups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be (low, high) with 0 < low <= high, got {tuple(A_init_range)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        check_limits(dt_limit)
        if bidirection and (linear_attn_duality or self.ngroups % 2):
            raise ValueError("bidirection needs linear_attn_duality=False and an even number of groups")
        self.d_model, self.headdim, self.d_state = d_model, headdim, d_state
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.linear_attn_duality, self.ssd_positve_dA = linear_attn_duality, ssd_positve_dA
        self.bidirection = bidirection
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.conv_dim = self.d_inner + 2 * self.ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=bias, **place)
        self.conv2d = nn.Conv2d(
            self.conv_dim, self.conv_dim, d_conv, padding=d_conv // 2, groups=self.conv_dim, bias=conv_bias, **place
        )
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device).to(dtype))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = nn.LayerNorm(self.d_inner, **place)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)

    def forward(self, u: Tensor, H: int, W: int) -> Tensor:
        """Mix the tokens of images with H rows and W columns."""
        check_tokens("u", u, H, W, self.d_model)
        z, xBC, dt = self.in_proj(u).split((self.d_inner, self.conv_dim, self.nheads), dim=-1)
        xBC = F.silu(convolve(self.conv2d, xBC, H, W))
        x, B, C = xBC.split((self.d_inner, *[self.ngroups * self.d_state] * 2), dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        B, C = (weight.unflatten(-1, (self.ngroups, self.d_state)) for weight in (B, C))
        y = self.mix(x, dt, B, C).flatten(2)
        return self.out_proj(self.norm(y) * z)

    def mix(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The duality alone, over heads (batch, tokens, nheads, headdim)."""
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_log.to(wide))
        common: dict[str, Any] = {"dt_softplus": True, "backend": self.backend}
        if self.linear_attn_duality:
            A = A if self.ssd_positve_dA else -A
            everywhere = ssd_noncausal(
                x, dt, A, B, C, D=self.D, dt_bias=self.dt_bias, interleaved_groups=True, **common
            )  # fmt: skip
            assert isinstance(everywhere, Tensor)
            return everywhere
        outputs, count = [], 2 if self.bidirection else 1
        for part in range(count):
            h, g = (slice(part * size // count, (part + 1) * size // count) for size in (self.nheads, self.ngroups))
            y = ssd(
                x[:, :, h], dt[..., h], A[h], B[:, :, g], C[:, :, g], D=self.D[h], dt_bias=self.dt_bias[h],
                dt_limit=self.dt_limit, reverse=part == 1, **common,
            )  # fmt: skip
            assert isinstance(y, Tensor)
            outputs.append(y)
        return outputs[0] if count == 1 else torch.cat(outputs, dim=2)

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}"


class StandardAttention(nn.Module):
    """Softmax attention over all tokens: to_out(softmax(q k^T / sqrt(dim_head)) v), with q, k, v = to_qkv(x).

    Args:
        dim: Channels of input and output.
        heads, dim_head: Number of heads, and channels of each.
        dropout: Of the attention's weights.
    Shapes:
        x and output (batch, tokens, dim)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.heads, self.dim_head, self.dropout = heads, dim_head, dropout
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(heads * dim_head, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """Mix the tokens; H and W are taken like those of `VSSD`."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(y.transpose(1, 2).flatten(2))


class VSSDBlock(nn.Module):
    """A block of VSSD, `VMAMBA2Block` in the official code.

        x = x + cpe1(x);   x = x + attn(norm1(x));   x = x + cpe2(x);   x = x + mlp(norm2(x))

    with two depthwise convolutions cpe1 and cpe2, 3 x 3, that tell positions.

    Args:
        dim: Channels.
        input_resolution: Height and width where `forward` is given none.
        num_heads: Heads of the mixer.
        mlp_ratio: Width between of the MLP, in multiples of dim.
        drop: Dropout of the MLP, and of the weights of "standard" attention.
        drop_path: Share of the samples that training leaves without each of the two branches.
        ssd_expansion, ssd_ngroups, ssd_chunk_size: `expand`, `ngroups` and `chunk_size` of `VSSD`.
        linear_attn_duality, d_state, ssd_positve_dA, bidirection: As in `VSSD`.
        attn_type: "mamba2" for `VSSD`, "standard" for `StandardAttention` (the published models' last stage).
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, H * W, dim), row after row
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int],
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        ssd_expansion: int = 2,
        ssd_ngroups: int = 1,
        ssd_chunk_size: int = 256,
        linear_attn_duality: bool = True,
        d_state: int = 64,
        *,
        attn_type: Literal["mamba2", "standard"] = "mamba2",
        ssd_positve_dA: bool = True,
        bidirection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if attn_type not in ("mamba2", "standard"):
            raise ValueError(f"attn_type must be 'mamba2' or 'standard', got {attn_type!r}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.input_resolution = (input_resolution[0], input_resolution[1])
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **place)
        self.norm1 = nn.LayerNorm(dim, **place)
        self.attn: nn.Module = (
            StandardAttention(dim, num_heads, dim // num_heads, drop, **place)
            if attn_type == "standard"
            else VSSD(
                dim,
                expand=ssd_expansion,
                headdim=ssd_expansion * dim // num_heads,
                ngroups=ssd_ngroups,
                chunk_size=ssd_chunk_size,
                linear_attn_duality=linear_attn_duality,
                d_state=d_state,
                ssd_positve_dA=ssd_positve_dA,
                bidirection=bidirection,
                backend=backend,
                **place,
            )
        )
        self.drop_path = DropPath(drop_path)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **place)
        self.norm2 = nn.LayerNorm(dim, **place)
        self.mlp = MLP(dim, int(dim * mlp_ratio), drop=drop, **place)

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Both branches over tokens of images with H rows and W columns, input_resolution if not given."""
        if (H is None) != (W is None):
            raise ValueError(f"H and W must be given together, got H={H} and W={W}")
        height, width = self.input_resolution if H is None or W is None else (H, W)
        check_tokens("x", x, height, width, self.cpe1.in_channels)
        x = x + convolve(self.cpe1, x, height, width)
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        x = x + convolve(self.cpe2, x, height, width)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def convolve(conv: nn.Conv2d, x: Tensor, H: int, W: int) -> Tensor:
    """A convolution that keeps the image's size, over its tokens (batch, H * W, channels)."""
    image: Tensor = conv(x.unflatten(1, (H, W)).movedim(-1, 1))
    return image.movedim(1, -1).flatten(1, 2)


def check_tokens(name: str, x: Tensor, H: int, W: int, channels: int) -> None:
    """Tokens of images of H x W cells."""
    check_shape(name, x, (x.shape[0], H * W, channels), "batch, H * W, d_model")
