"""VSSBlock, VMamba's residual block: SS2D, then an MLP.

Liu et al. 2024, "VMamba", arXiv:2401.10166, figure 3. Arguments and parameter names are those of the published code.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.mlp import MLP
from ssmkit.nn.ss2d import SS2D, ForwardType, released_layout


class VSSBlock(nn.Module):
    """x <- x + drop_path(SS2D(norm(x))); x <- x + drop_path(mlp(norm2(x))).

    Args:
        hidden_dim: Width of input and output.
        drop_path: Share of the samples for which a branch is left out in training.
        channel_first: Images come and go as (batch, hidden_dim, height, width), see `SS2D`.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate, ssm_init: Of `SS2D`,
            there d_state, ssm_ratio, dt_rank, act_layer, d_conv, conv_bias, dropout, initialize. An ssm_ratio of 0 leaves
            SS2D out.
        forward_type: Of `SS2D`.
        mlp_ratio: Width within the MLP is int(mlp_ratio * hidden_dim); 0 leaves it out, as in the first models.
        mlp_drop_rate: Dropout of the MLP.
        gmlp: The MLP is fc2(x * gelu(z)), with x and z the halves of fc1.
        use_checkpoint: Compute the block again in backward in place of keeping what it needs.
        post_norm: Normalise the output of each branch in place of its input.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, hidden_dim)
    """

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        channel_first: bool = False,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_act_layer: Callable[[], nn.Module] = nn.SiLU,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: Literal["v0", "v1", "v2"] = "v0",
        forward_type: str | ForwardType = "v2",
        mlp_ratio: float = 4.0,
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        use_checkpoint: bool = False,
        post_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, ratio in (("ssm_ratio", ssm_ratio), ("mlp_ratio", mlp_ratio)):
            if ratio < 0:
                raise ValueError(f"{name} must be at least 0, got {ratio}")
        self.channel_first, self.use_checkpoint, self.post_norm = channel_first, use_checkpoint, post_norm
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        # The branches that there are, in their order: names of the norm and of what it stands before.
        self.branches: list[tuple[str, str]] = []
        if ssm_ratio > 0:
            self.branches.append(("norm", "op"))
            self.norm = nn.LayerNorm(hidden_dim, **place)
            self.op = SS2D(
                hidden_dim,
                d_state=ssm_d_state,
                ssm_ratio=ssm_ratio,
                dt_rank=ssm_dt_rank,
                act_layer=ssm_act_layer,
                d_conv=ssm_conv,
                conv_bias=ssm_conv_bias,
                dropout=ssm_drop_rate,
                initialize=ssm_init,
                forward_type=forward_type,
                backend=backend,
                **place,
            )
        if mlp_ratio > 0:
            self.branches.append(("norm2", "mlp"))
            self.norm2 = nn.LayerNorm(hidden_dim, **place)
            made = GeluGatedMLP if gmlp else MLP
            self.mlp = made(hidden_dim, int(hidden_dim * mlp_ratio), drop=mlp_drop_rate, **place)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images, then their channels."""
        x = x.movedim(1, 3) if self.channel_first else x
        again = self.use_checkpoint and torch.is_grad_enabled()
        x = checkpoint(self._mix, x, use_reentrant=False) if again else self._mix(x)
        return x.movedim(3, 1) if self.channel_first else x

    def _mix(self, x: Tensor) -> Tensor:
        for name, branch in self.branches:
            norm, mix = getattr(self, name), getattr(self, branch)
            x = x + self.drop_path(norm(mix(x)) if self.post_norm else mix(norm(x)))
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        given = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        state_dict.update(released_layout(given, own))
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeluGatedMLP(nn.Module):
    """fc2(x * gelu(z)) with x, z = fc1(x); arguments as those of `MLP`, but dropout only after fc2."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, in_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., in_features)."""
        x, z = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(x * F.gelu(z)))
