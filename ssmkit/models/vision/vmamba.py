"""VMamba: four stages of VSS blocks, each at half the resolution of the one before.

Liu et al. 2024, "VMamba: Visual State Space Model", arXiv:2401.10166; sizes and names of github.com/MzeroMiko/VMamba.
Its first release is registered as vanilla_vmamba_*; the later ones say their SS2D's ratio and the depth of their third
stage, as in vmamba_tiny_s1l8.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkit.models.registry import register_model
from ssmkit.models.vision.backbone import VisionBackbone, check_image
from ssmkit.models.vision.common import drop_path_rates, trunc_normal_linear_init
from ssmkit.nn.ss2d import ForwardType, Permute, released_layout
from ssmkit.nn.vss_block import VSSBlock

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class VMamba(VisionBackbone):
    """The VMamba classifier, or its feature maps.

    Args:
        patch_size: Pixels that a token of the first stage covers, per axis.
        in_chans: Channels of the image.
        num_classes: Width of the logits; 0 for pooled features.
        depths: Blocks of each stage.
        dims: Width of each stage; a number is that of the first, and each further stage is twice as wide.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_conv, ssm_conv_bias, ssm_drop_rate, ssm_init, forward_type, mlp_ratio,
            mlp_drop_rate, gmlp, post_norm, use_checkpoint: Of `VSSBlock`.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer: "ln" or "ln2d", which tells channels-last and channels-first builds apart where images are copied
            between them. Here they are one: weights of both load.
        downsample_version: Between stages. "v1": patch merging, LayerNorm and projection of 2 x 2 tokens; "v2": a
            convolution of 2 x 2, step 2; "v3": one of 3 x 3, step 2.
        patchembed_version: "v1": one convolution; "v2": two of step patch_size / 2, with LayerNorm and GELU between.
        out_norms: Levels whose feature maps get a LayerNorm of their own, outnorm0, ..., as in the published backbones
            for detection and segmentation. Those have no classifier: num_classes must be 0. `load_official` takes the
            weights of a whole detector then, or those of a classifier, without its head and with the new norms as they are.
        img_size: Accepted for compatibility: images may have any size.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x (batch, in_chans, height, width) -> logits (batch, num_classes)
    """

    head_name = "classifier.head"

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: Literal["v0", "v1", "v2"] = "v0",
        forward_type: str | ForwardType = "v2",
        mlp_ratio: float = 4.0,
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        post_norm: bool = False,
        drop_path_rate: float = 0.1,
        norm_layer: Literal["ln", "ln2d"] = "ln",
        downsample_version: Literal["v1", "v2", "v3"] = "v2",
        patchembed_version: Literal["v1", "v2"] = "v1",
        use_checkpoint: bool = False,
        out_norms: Sequence[int] = (),
        img_size: int | tuple[int, int] = 224,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, word, known in (
            ("norm_layer", norm_layer, ("ln", "ln2d")),
            ("downsample_version", downsample_version, tuple(DOWNSAMPLES)),
            ("patchembed_version", patchembed_version, tuple(PATCH_EMBEDS)),
        ):
            if word not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {word!r}")
        depths = tuple(depths)
        widths = tuple(dims * 2**stage for stage in range(len(depths))) if isinstance(dims, int) else tuple(dims)
        if not depths or len(widths) != len(depths):
            raise ValueError(f"dims must hold one width for each of {len(depths)} stages, got {len(widths)}")
        if out_norms and num_classes:
            raise ValueError(f"a backbone with out_norms has no classifier: num_classes must be 0, got {num_classes}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, widths[-1]
        levels = range(-len(depths), len(depths))
        if any(level not in levels for level in out_norms):
            raise ValueError(f"out_norms must hold levels {levels[0]}..{levels[-1]}, got {tuple(out_norms)}")
        self.out_norms = sorted({level % len(depths) for level in out_norms})
        self.feature_info = [
            {
                "num_chs": width,
                "reduction": patch_size * 2**level,
                "module": f"outnorm{level}" if level in self.out_norms else f"layers.{level}.blocks",
            }
            for level, width in enumerate(widths)
        ]

        self.patch_embed = PATCH_EMBEDS[patchembed_version](in_chans, widths[0], patch_size, **place)
        self.layers = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [
                VSSBlock(
                    widths[stage],
                    rate,
                    ssm_d_state=ssm_d_state,
                    ssm_ratio=ssm_ratio,
                    ssm_dt_rank=ssm_dt_rank,
                    ssm_conv=ssm_conv,
                    ssm_conv_bias=ssm_conv_bias,
                    ssm_drop_rate=ssm_drop_rate,
                    ssm_init=ssm_init,
                    forward_type=forward_type,
                    mlp_ratio=mlp_ratio,
                    mlp_drop_rate=mlp_drop_rate,
                    gmlp=gmlp,
                    use_checkpoint=use_checkpoint,
                    post_norm=post_norm,
                    backend=backend,
                    **place,
                )
                for rate in rates
            ]
            last = stage == len(depths) - 1
            shrink = nn.Identity() if last else DOWNSAMPLES[downsample_version](*widths[stage : stage + 2], **place)
            self.layers.append(Stage(nn.Sequential(*blocks), shrink))
        for level in self.out_norms:
            self.add_module(f"outnorm{level}", nn.LayerNorm(widths[level], **place))
        if not self.out_norms:
            head = nn.Linear(widths[-1], num_classes, **place) if num_classes else nn.Identity()
            self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(widths[-1], **place), head=head))
        self.apply(trunc_normal_linear_init)

    def forward_features(self, x: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """The last stage's map after the classifier's norm, if there is one; with a list, every stage's goes there.

        Maps are (batch, channels, height, width), in the memory format torch.channels_last.
        """
        check_image("x", x, self.in_chans)
        x = self.patch_embed(x)
        for level, layer in enumerate(self.layers):
            x = layer.get_submodule("blocks")(x)
            features = self.get_submodule(f"outnorm{level}")(x) if level in self.out_norms else x
            if collect is not None:
                collect.append(features.permute(TO_FIRST))
            x = layer.get_submodule("downsample")(x)
        if not self.out_norms:
            features = self.get_submodule("classifier.norm")(x)
        return features.permute(TO_FIRST)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean over the positions, classified."""
        pooled = features.mean((2, 3))
        if pre_logits or not self.num_classes:
            return pooled
        logits: Tensor = self.get_classifier()(pooled)
        return logits

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names and shapes of every release to those of the published checkpoints."""
        if any(name.startswith("backbone.") for name in tensors):  # of a detector or segmenter
            parts = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
            tensors = {name.removeprefix("backbone."): tensor for name, tensor in parts.items()}
        own = self.state_dict()
        renames = [*RENAMED, *(MERGING if "layers.0.downsample.norm.weight" in own else ())]
        adapted = {}
        for name, tensor in tensors.items():
            for pattern, new in renames:
                name = re.sub(pattern, new, name)
            adapted[name] = tensor
        adapted = released_layout(adapted, own)
        if not self.out_norms:
            return adapted
        kept = {name: tensor for name, tensor in adapted.items() if not name.startswith("classifier.")}
        return {name: tensor for name, tensor in own.items() if name.startswith("outnorm")} | kept


# Names of the first release, and those of patch merging in the last one.
RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
MERGING = ((r"\.downsample\.1\.", ".downsample.norm."), (r"\.downsample\.2\.", ".downsample.reduction."))


class Stage(nn.Module):
    """Blocks, and what leads to the next stage."""

    def __init__(self, blocks: nn.Module, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.downsample = blocks, downsample

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, channels) to the input of the next stage."""
        y: Tensor = self.downsample(self.blocks(x))
        return y


def one_convolution(in_chans: int, dim: int, patch_size: int, **place: Any) -> nn.Module:
    """Images to tokens, channels last: a convolution, LayerNorm."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim, patch_size, patch_size, **place), Permute(*TO_LAST), nn.LayerNorm(dim, **place)
    )


def two_convolutions(in_chans: int, dim: int, patch_size: int, **place: Any) -> nn.Module:
    """Images to tokens, channels last: convolution, LayerNorm, GELU, and the first two again."""
    step = patch_size // 2
    if patch_size != 2 * step or not step:
        raise ValueError(f"patch_size must be even with patchembed_version 'v2', got {patch_size}")
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, step + 1, step, padding=1, **place),
        Permute(*TO_LAST),
        nn.LayerNorm(dim // 2, **place),
        Permute(*TO_FIRST),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, step + 1, step, padding=1, **place),
        Permute(*TO_LAST),
        nn.LayerNorm(dim, **place),
    )


class PatchMerging(nn.Module):
    """2 x 2 tokens to one: side by side, normalised, projected. Odd sizes are padded with zeros below and on the right.

    Liu et al. 2021, "Swin Transformer", arXiv:2103.14030, section 3.1. x (batch, height, width, dim)
    """

    def __init__(self, dim: int, out_dim: int, **place: Any) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **place)
        self.norm = nn.LayerNorm(4 * dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height / 2, width / 2, out_dim), sizes rounded up."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Columns vary slowest: (even row, even column), (odd, even), (even, odd), (odd, odd).
        merged = rearrange(x, "b (h row) (w col) c -> b h w (col row c)", row=2, col=2)
        y: Tensor = self.reduction(self.norm(merged))
        return y


def strided(side: int, padding: int, dim: int, out_dim: int, **place: Any) -> nn.Module:
    """A convolution of step 2 and LayerNorm, channels last."""
    return nn.Sequential(
        Permute(*TO_FIRST),
        nn.Conv2d(dim, out_dim, side, 2, padding=padding, **place),
        Permute(*TO_LAST),
        nn.LayerNorm(out_dim, **place),
    )


PATCH_EMBEDS: dict[str, Callable[..., nn.Module]] = {"v1": one_convolution, "v2": two_convolutions}
DOWNSAMPLES: dict[str, Callable[..., nn.Module]] = {
    "v1": PatchMerging,
    "v2": partial(strided, 2, 0),
    "v3": partial(strided, 3, 1),
}

FIRST: dict[str, Any] = {"forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1", "patchembed_version": "v1"}
LATER: dict[str, Any] = {
    "ssm_d_state": 1,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}
# blocks of the third stage, width, ratio of SS2D, stochastic depth
SIZES: dict[str, tuple[int, int, float, float]] = {
    "vanilla_vmamba_tiny": (9, 96, 2.0, 0.2),
    "vanilla_vmamba_small": (27, 96, 2.0, 0.3),
    "vanilla_vmamba_base": (27, 128, 2.0, 0.5),
    "vmamba_tiny_s2l5": (5, 96, 2.0, 0.2),
    "vmamba_small_s2l15": (15, 96, 2.0, 0.3),
    "vmamba_base_s2l15": (15, 128, 2.0, 0.6),
    "vmamba_tiny_s1l8": (8, 96, 1.0, 0.2),
    "vmamba_small_s1l20": (20, 96, 1.0, 0.3),
    "vmamba_base_s1l20": (20, 128, 1.0, 0.5),
}
for _name, (_third, _dim, _ratio, _rate) in SIZES.items():
    register_model(
        _name,
        VMamba,
        depths=(2, 2, _third, 2),
        dims=_dim,
        ssm_ratio=_ratio,
        drop_path_rate=_rate,
        **(FIRST if _name.startswith("vanilla") else LATER),
    )
