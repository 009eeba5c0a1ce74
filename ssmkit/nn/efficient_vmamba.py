"""EfficientVMamba's atrous scan, over four sub-grids of the image, and the block that puts a convolution beside it.

Pei et al. 2024, "EfficientVMamba", arXiv:2403.09977, sections 3.2 and 3.3. Arguments, parameter names and initialisation are
those of the published code (`SS2D` and `VSSBlock` there), so its state dicts load.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkit.nn.bi_attn import BiAttn
from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.local_mamba import pad_image
from ssmkit.nn.mlp import MLP
from ssmkit.nn.ss2d import SS2D, ForwardType, depthwise
from ssmkit.ops import cross_selective_scan
from ssmkit.paths import column, row

# The first row and column of each sub-grid, in the order of their parameters.
SUB_GRIDS = (0, 0), (1, 0), (0, 1), (1, 1)


class AtrousSS2D(SS2D):
    """`SS2D` whose path k walks every second row and column only, so that each token is scanned once.

        y_ij = selective_scan(x, dt_k, A_k, B_k, C_k, D_k) along sub-grid k, of rows i = k mod 2 and columns j = k // 2

    Sub-grids of the even rows are walked by rows, those of the odd rows by columns. Images with an odd side get a row or
    column of zeros, after the convolution and its activation; as published, they take part in the scans.

    Args:
        d_model: Width of input and output.
        step_size: Distance between neighbours in a sub-grid; 2, for which there are parameters.
        ss2d: Further arguments of `SS2D`, but for forward_type and channel_first.
    Shapes:
        x and output (batch, height, width, d_model); parameters as those of `SS2D`
    """

    def __init__(
        self,
        d_model: int = 96,
        step_size: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ss2d: Any,
    ) -> None:
        if step_size != 2:
            raise ValueError(f"step_size must be 2, of which there are four sub-grids, got {step_size}")
        super().__init__(d_model, forward_type=ForwardType(fp32=True), device=device, dtype=dtype, **ss2d)

    def scan(self, x: Tensor) -> Tensor:
        """The scans of all sub-grids, each in its place.               x and result (batch, height, width, d_inner)"""
        height, width = x.shape[1:3]
        x = pad_image(x, height + height % 2, width + width % 2)
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for k, (i, j) in enumerate(SUB_GRIDS):
            grid = x[:, i::2, j::2]
            path = (column if i else row)(*grid.shape[1:3])
            inputs = self.scan_inputs(grid, slice(k, k + 1))
            scanned = cross_selective_scan(**inputs, paths=(path,), backend=self.backend)
            y[:, i::2, j::2] = scanned.view(grid.shape)
        return y[:, :height, :width]


class EVSSBlock(nn.Module):
    """y = norm(x); x <- x + drop_path(se(op(y)) + se(conv_branch(y))); x <- x + drop_path(mlp(norm2(x))) if there is an MLP.

    op is an `AtrousSS2D`, conv_branch a depthwise convolution, batch norm, GELU and a projection, se one `BiAttn`, which
    weighs the channels of either.

    Args:
        hidden_dim: Width of input and output.
        drop_path: Share of the samples for which a branch is left out in training.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate: Of `AtrousSS2D`, there
            d_state, ssm_ratio, dt_rank, act_layer, d_conv, conv_bias, dropout.
        mlp_ratio: Width within the MLP is int(mlp_ratio * hidden_dim); 0 leaves it out, as in the released models.
        mlp_drop_rate: Dropout of the MLP.
        use_checkpoint: Compute the block again in backward in place of keeping what it needs.
        step_size: Of `AtrousSS2D`.
        backend: Handed to the op: "auto", "reference" or a backend's name.
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
        mlp_ratio: float = 0.0,
        mlp_drop_rate: float = 0.0,
        use_checkpoint: bool = False,
        step_size: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be at least 0, got {mlp_ratio}")
        self.use_checkpoint = use_checkpoint
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(hidden_dim, **place)
        self.op = AtrousSS2D(
            hidden_dim,
            step_size,
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            act_layer=ssm_act_layer,
            d_conv=ssm_conv,
            conv_bias=ssm_conv_bias,
            dropout=ssm_drop_rate,
            backend=backend,
            **place,
        )
        self.conv_branch = nn.Sequential(
            depthwise(hidden_dim, 3, **place),
            nn.BatchNorm2d(hidden_dim, **place),
            nn.GELU(),
            nn.Conv2d(hidden_dim, hidden_dim, 1, **place),
        )
        self.se = BiAttn(hidden_dim, **place)
        self.drop_path = DropPath(drop_path)
        self.norm2 = self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(hidden_dim, **place)
            self.mlp = MLP(hidden_dim, int(hidden_dim * mlp_ratio), drop=mlp_drop_rate, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images, then their channels if there is an MLP."""
        if self.use_checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._mix, x, use_reentrant=False)
            return out
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        convolved = self.conv_branch(normed.movedim(3, 1)).movedim(1, 3)
        x = x + self.drop_path(self.se(self.op(normed)) + self.se(convolved))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x
