"""GrootVL's layer for images: a scan over the tree that joins the most alike of neighbouring cells.

Xiao et al. 2024, "MambaTree: Tree Topology is All You Need in State Space Model", arXiv:2406.02395. Parameter names and
initialisation are those of the official `Tree_SSM` and `GrootVLayer`, so official state dicts load.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mamba import checked_dt_rank, init_dt, s4d_real
from ssmkit.nn.mamba2d import check_image, rates
from ssmkit.nn.mlp import MLP
from ssmkit.ops import minimum_spanning_tree, tree_scan
from ssmkit.ops.minimum_spanning_tree import Tree, grid_edges

EPS = 1e-8  # least length of a cell's features: with none, it is as unlike any as can be


class TreeSSM(nn.Module):
    """The tree-scan mixer of images, with one state per channel; `Tree_SSM` in the official code.

        x, z = in_proj(u);   x = silu(conv2d(x));   dt, B, C = x_proj(x);   dt = softplus(dt_proj(dt))
        h_i = sum_j dt_j B_j x_j  prod of exp(dt A) along the path from j to i in the tree of x
        y = out_norm(h_norm(h) C + D x) * silu(z);   out_proj(y)

    The tree is the minimum spanning tree of the neighbours in the image (up, down, left, right), weighted by
    exp(-cos(x_i, x_j)); each image has one, which all channels share and through whose choice no gradient flows. See
    `ssmkit.ops.tree_scan`. Steps, decays and states are fp32 whatever the layer's dtype (fp64 in a float64 layer).

    Args:
        d_model: Width of input and output.
        d_state: Must be 1.
        ssm_ratio: Inner width is ssm_ratio * d_model.
        dt_rank: Rank of the step sizes; "auto" is ceil(d_model / 16).
        d_conv: Cells a side of the depthwise convolution, an odd number.
        conv_bias, bias: Whether the convolution and the in and out projections have a bias.
        dropout: Of the output.
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor.
        dt_init, dt_scale: dt_projs_weight starts uniform in +-dt_scale / sqrt(dt_rank) ("random"), or there ("constant").
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        conv_bias: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim = int(ssm_ratio * d_model)
        for name, size in (("d_model", d_model), ("ssm_ratio * d_model", dim), ("d_conv", d_conv)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if d_state != 1:
            raise ValueError(f"d_state must be 1, got {d_state}: a tree scan has one state per channel")
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, so that the image keeps its size, got {d_conv}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_inner = d_model, dim
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * dim, bias=bias, **place)
        self.conv2d = nn.Conv2d(dim, dim, d_conv, padding=d_conv // 2, groups=dim, bias=conv_bias, **place)
        x_proj = nn.Linear(dim, self.dt_rank + 2, bias=False, **place)
        dt_proj = nn.Linear(self.dt_rank, dim, **place)
        init_dt(dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        # Official code stacks what belongs to a path, of which there is one here.
        self.x_proj_weight = nn.Parameter(x_proj.weight.detach()[None])
        self.dt_projs_weight = nn.Parameter(dt_proj.weight.detach()[None])
        self.dt_projs_bias = nn.Parameter(dt_proj.bias.detach()[None])
        self.A_logs = nn.Parameter(s4d_real(dim, 1, device))
        self.Ds = nn.Parameter(torch.ones(dim, device=device))
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.h_norm = nn.LayerNorm(dim, **place)
        self.out_norm = nn.LayerNorm(dim, **place)
        self.out_proj = nn.Linear(dim, d_model, bias=bias, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of images (batch, height, width, d_model)."""
        check_image(x, self.d_model)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.movedim(-1, 1)).movedim(1, -1))
        out: Tensor = self.dropout(self.out_proj(self.scan(x) * F.silu(z)))
        return out

    def scan(self, x: Tensor) -> Tensor:
        """What stands between the convolution and the gate, over (batch, height, width, d_inner)."""
        height, width = x.shape[1:3]
        tree = likeness_tree(x, backend=self.backend)
        A = rates(self.A_logs)[:, 0]
        tokens = x.flatten(1, 2)
        dt, B, C = F.linear(tokens, self.x_proj_weight[0]).split((self.dt_rank, 1, 1), dim=-1)
        dt = F.linear(dt, self.dt_projs_weight[0])
        tokens, B, C, dt = (part.to(A.dtype) for part in (tokens, B, C, dt))
        dt = F.softplus(dt + self.dt_projs_bias[0].to(A.dtype))
        h = tree_scan(torch.exp(dt * A), dt * B * tokens, tree, backend=self.backend)
        y = torch.addcmul(self.Ds.to(A.dtype) * tokens, normed(self.h_norm, h), C)
        return normed(self.out_norm, y).to(x.dtype).unflatten(1, (height, width))

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"


class GrootVLayer(nn.Module):
    """A residual block of GrootV: x = x + TreeSSM(norm1(x)); x = x + mlp(norm2(x)).

    Args:
        channels: Channels.
        mlp_ratio: Width between of the MLP, in multiples of channels.
        drop: Dropout of the MLP.
        drop_path: Share of the samples that training leaves without each branch.
        layer_scale: Start of factors gamma1 and gamma2 per channel on the branches; None for no factors.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, channels)
    """

    def __init__(
        self,
        channels: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        # Named norm1.0 and norm2.0: official code may put changes of layout beside the norm.
        self.norm1, self.norm2 = (nn.Sequential(nn.LayerNorm(channels, eps=1e-6, **place)) for _ in range(2))
        self.TreeSSM = TreeSSM(channels, backend=backend, **place)
        self.mlp = MLP(channels, int(mlp_ratio * channels), drop=drop, **place)
        self.drop_path = DropPath(drop_path)
        for name in ("gamma1", "gamma2"):
            start = None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale, **place))
            self.register_parameter(name, start)

    def forward(self, x: Tensor) -> Tensor:
        """Both branches."""
        for gamma, branch, norm in ((self.gamma1, self.TreeSSM, self.norm1), (self.gamma2, self.mlp, self.norm2)):
            y = branch(norm(x))
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x


@torch.no_grad()
def likeness_tree(x: Tensor, *, backend: str = "auto") -> Tree:
    """The tree that joins the most alike neighbours of each image: weights exp(-cos) of cells one above or beside another.

    Args:
        x: Features (batch, height, width, channels); compared in fp32, fp64 if they are that
    Returns:
        One tree over the height * width cells for each image, for `ssmkit.ops.tree_scan`.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1).clamp(min=EPS)
    cosines = []
    for axis in (1, 2):
        count = max(x.shape[axis] - 1, 0)
        ends = [(x.narrow(axis, at, count), length.narrow(axis, at, count)) for at in (0, min(1, x.shape[axis]))]
        (first, first_length), (second, second_length) = ends
        cosines.append(((first * second).sum(-1) / (first_length * second_length)).flatten(1))
    weights = torch.exp(-torch.cat(cosines, dim=1))
    height, width = x.shape[1:3]
    edges = edges_of(grid_edges, height, width, device=x.device)
    return minimum_spanning_tree(weights, edges, height * width, backend=backend)


def edges_of(make: Callable[..., Tensor], *sizes: int, device: torch.device) -> Tensor:
    """make(*sizes, device); on a GPU the same tensor again, because a new one is waited for when it is checked."""
    if device.type in ("cpu", "meta") or torch.compiler.is_compiling() or active_fake_mode() is not None:
        return make(*sizes, device)
    return _edges_on(make, sizes, device)


@lru_cache(maxsize=64)
def _edges_on(make: Callable[..., Tensor], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return make(*sizes, device)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm of x in the dtype of x, whatever that of its weights."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
