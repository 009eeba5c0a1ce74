"""Mamba2D: two stages of two-dimensional scans, then two of attention.

Baty et al. 2024, "Mamba2D", arXiv:2412.16146, in the second version of its code; sizes Nano, Tiny and Small as released.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.models.registry import register_model
from ssmkit.models.vision.backbone import VisionBackbone, check_image
from ssmkit.models.vision.common import drop_path_rates
from ssmkit.nn.layer_norm2d import LayerNorm2d
from ssmkit.nn.mamba2d import Mamba2DBlock


class Mamba2DBackbone(VisionBackbone):
    """Mamba2D, the classifier and its feature maps.

        stem (conv 7, stride 4; norm) -> blocks, norm -> conv 3, stride 2 -> blocks, norm -> ...    four stages
        head: mean over the cells, norm, fc1, GELU, norm, fc2

    Args:
        in_chans, num_classes: Channels of the image, width of the logits.
        n_blocks, embed_dim: Blocks and channels of each stage.
        token_mixer: Mixer of each stage, as in `ssmkit.nn.Mamba2DBlock`.
        drop_path_rate: Stochastic depth of the last block, from 0 in the first linearly.
        head_dropout: Dropout before fc2.
        res_scale_init_values: Start of each stage's factors on the residual path; None for no factors.
        inter_flip: Every second block of a stage scans from the bottom right corner.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x (batch, in_chans, height, width) -> logits (batch, num_classes); level i of the maps has (height + 1) // 4 rows,
        halved i times and rounded up, and as many columns of the width.
    """

    head_name = "head.fc2"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        n_blocks: Sequence[int] = (3, 3, 9, 3),
        embed_dim: Sequence[int] = (64, 128, 320, 512),
        token_mixer: Sequence[str] = ("2D_local", "2D_local", "RopeAttention", "RopeAttention"),
        drop_path_rate: float = 0.0,
        head_dropout: float = 0.0,
        res_scale_init_values: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        inter_flip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        per_stage = {"embed_dim": embed_dim, "token_mixer": token_mixer, "res_scale_init_values": res_scale_init_values}
        for name, given in per_stage.items():
            if len(given) != len(n_blocks):
                raise ValueError(
                    f"{name} must have one entry per stage, {len(n_blocks)} like n_blocks, got {len(given)}"
                )
        self.in_chans, self.num_classes = in_chans, num_classes
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        conv = nn.Conv2d(in_chans, embed_dim[0], 7, stride=4, padding=2, **place)
        norm = nn.Sequential(OrderedDict[str, nn.Module](norm=LayerNorm2d(embed_dim[0], **place)))
        stem = nn.Sequential(OrderedDict[str, nn.Module](conv=conv, post_norm=norm))
        self.ds = nn.ModuleDict({"stem": stem})
        for stage in range(1, len(n_blocks)):
            conv = nn.Conv2d(embed_dim[stage - 1], embed_dim[stage], 3, stride=2, padding=1, **place)
            self.ds[f"ds{stage}"] = nn.Sequential(OrderedDict[str, nn.Module](conv=conv))
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, tuple(n_blocks))):
            dim = embed_dim[stage]
            blocks: list[nn.Module] = [
                Mamba2DBlock(
                    dim,
                    token_mixer[stage],  # type: ignore[arg-type]
                    drop_path=rate,
                    res_scale_init_value=res_scale_init_values[stage],
                    scan_start="BR" if inter_flip and index % 2 else "TL",
                    backend=backend,
                    **place,
                )
                for index, rate in enumerate(rates)
            ]
            self.stages.append(nn.Sequential(*blocks, nn.LayerNorm(dim, **place)))
        self.norm = nn.LayerNorm(embed_dim[-1], **place)
        self.head = MlpHead(embed_dim[-1], num_classes, head_dropout=head_dropout, **place)
        self.num_features = self.head.fc1.out_features
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(embed_dim)
        ]

    def forward_features(self, x: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """The last stage's map, normalised                            (batch, channels, height / 32, width / 32)"""
        check_image("x", x, self.in_chans)
        for down, stage in zip(self.ds.values(), self.stages, strict=True):
            x = stage(down(x).movedim(1, -1)).movedim(-1, 1)
            if collect is not None:
                collect.append(x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; with `pre_logits`, what fc2 reads."""
        logits: Tensor = self.head(self.norm(features.mean((2, 3))), pre_logits)
        return logits

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published classifier holds all but its norm and head in `backbone`, which may be compiled."""
        return {name.removeprefix("backbone.").removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


class MlpHead(nn.Module):
    """fc2(dropout(norm(gelu(fc1(x))))): (batch, dim) to (batch, n_classes)."""

    def __init__(
        self,
        dim: int,
        n_classes: int = 1000,
        mlp_ratio: int = 4,
        head_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, mlp_ratio * dim, **place)
        self.norm = nn.LayerNorm(mlp_ratio * dim, **place)
        self.head_dropout = nn.Dropout(head_dropout)
        self.fc2 = nn.Linear(mlp_ratio * dim, n_classes, **place) if n_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of pooled features; with `pre_logits`, what fc2 reads."""
        hidden = self.head_dropout(self.norm(F.gelu(self.fc1(x))))
        return hidden if pre_logits else self.fc2(hidden)


register_model("mamba2d_nano", Mamba2DBackbone, n_blocks=(3, 3, 9, 3), embed_dim=(32, 64, 160, 256))
register_model(
    "mamba2d_tiny",
    Mamba2DBackbone,
    n_blocks=(3, 3, 9, 3),
    embed_dim=(64, 128, 320, 512),
    drop_path_rate=0.175,
    head_dropout=0.15,
)
register_model(
    "mamba2d_small",
    Mamba2DBackbone,
    n_blocks=(3, 12, 14, 3),
    embed_dim=(96, 192, 384, 576),
    drop_path_rate=0.4,
    head_dropout=0.4,
)
