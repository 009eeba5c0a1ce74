"""Vim: a plain stack of bidirectional blocks over the patches of an image, with a class token among them.

Zhu et al. 2024, "Vision Mamba", arXiv:2401.09417; sizes and names of github.com/hustvl/Vim.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkit.models.registry import register_model
from ssmkit.models.vision.backbone import VisionBackbone, check_image
from ssmkit.models.vision.common import drop_path_rates, resample_pos_embed
from ssmkit.nn.block import Block, add_norm
from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.patch_embed import PatchEmbed
from ssmkit.nn.rms_norm import RMSNorm
from ssmkit.nn.vim import BiMamba

# Deviation of a standard normal cut off at two deviations: what LeCun's initialisation divides by.
CUT_NORMAL = 0.87962566103423978

# Options of the published class that none of its released models sets, and the value that all of them have.
UNRELEASED: dict[str, Any] = {
    "bimamba": True,
    "if_bidirectional": False,
    "if_bimamba": False,
    "if_rope": False,
    "if_rope_residual": False,
    "if_abs_pos_embed": True,
    "use_double_cls_token": False,
    "flip_img_sequences_ratio": -1.0,
    "initializer_cfg": None,
    "ssm_cfg": None,
}


class BiMambaBackbone(VisionBackbone):
    """Blocks of `BiMamba`, a final norm and a head: what Vim and VideoMamba have in common.

    Args:
        embed_dim, depth, num_classes: Width, number of blocks, width of the logits (0 for no head).
        drop_path_rate: Stochastic depth of the last block, from 0 in the first linearly.
        norm_epsilon, rms_norm, residual_in_fp32: As in `MambaStack`.
        feature_blocks: Blocks whose outputs are the levels of feature maps; by default the last of each quarter.
        reduction: Pixels between neighbouring tokens, per axis.
        checkpoint_num: The first so many blocks are computed again in backward, which saves memory.
        mixer: Arguments of `BiMamba`.
    """

    no_weight_decay_names = ("pos_embed", "cls_token", "temporal_pos_embedding")

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_classes: int,
        *,
        drop_path_rate: float,
        norm_epsilon: float,
        rms_norm: bool,
        residual_in_fp32: bool,
        feature_blocks: Sequence[int] | None,
        reduction: int,
        checkpoint_num: int,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if feature_blocks is None:
            feature_blocks = sorted({max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
        outside = [index for index in feature_blocks if not 0 <= index < depth]
        if outside:
            raise ValueError(f"feature_blocks must lie in 0..{depth - 1}, got {outside[0]}")
        self.num_classes, self.num_features, self.embed_dim = num_classes, embed_dim, embed_dim
        self.residual_in_fp32, self.checkpoint_num = residual_in_fp32, checkpoint_num
        self.feature_blocks = sorted(set(feature_blocks))
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"layers.{index}"} for index in self.feature_blocks
        ]
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def norm() -> RMSNorm | nn.LayerNorm:
            if rms_norm:
                return RMSNorm(embed_dim, eps=norm_epsilon, backend=backend, **place)
            return nn.LayerNorm(embed_dim, eps=norm_epsilon, **place)

        self.layers = nn.ModuleList(
            Block(
                BiMamba(embed_dim, layer_idx=index, backend=backend, **mixer, **place),
                norm(),
                residual_in_fp32=residual_in_fp32,
            )
            for index in range(depth)
        )
        self.drop_paths = nn.ModuleList(DropPath(rate) for rate in drop_path_rates(drop_path_rate, (depth,))[0])
        self.norm_f = norm()
        self.head = nn.Linear(embed_dim, num_classes, **place) if num_classes else nn.Identity()

    def encode(self, hidden: Tensor, walks: Sequence[dict[str, Any]], levels: list[Tensor] | None = None) -> Tensor:
        """Every block and the final norm.

        Args:
            hidden: Tokens                                            (batch, seqlen, embed_dim)
            walks: Options of each block's mixer: path, path_b.
            levels: The outputs of `feature_blocks` are appended to it, as the published dense-task code takes them: what
                the mixer adds to the residual stream.
        """
        residual = None
        for index, (block, walk, drop_path) in enumerate(zip(self.layers, walks, self.drop_paths, strict=True)):
            if index < self.checkpoint_num and self.training:
                hidden, residual = checkpoint(block, hidden, residual, use_reentrant=False, **walk)
            else:
                hidden, residual = block(hidden, residual, **walk)
            if levels is not None and index in self.feature_blocks:
                levels.append(hidden)
            hidden = drop_path(hidden)
        return add_norm(self.norm_f, hidden, residual, residual_in_fp32=self.residual_in_fp32)[0]  # type: ignore[arg-type]

    @torch.no_grad()
    def init_blocks(self) -> None:
        """The published start values that concern the whole depth; step sizes keep those of `BiMamba`."""
        for name, module in self.layers.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
            if name.endswith("out_proj"):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                module.weight /= math.sqrt(len(self.layers))


class Vim(BiMambaBackbone):
    """The Vim classifier, or its feature maps.

        patches -> class token put in their middle, pos_embed added -> blocks -> norm_f -> class token -> head

    Args:
        img_size: Height and width that pos_embed is for; for images of another size it is interpolated at each call.
        patch_size, stride: Pixels of a patch, and between patches (patch_size by default), per axis.
        depth, embed_dim, d_state: Blocks, width, states per channel.
        in_chans, num_classes: Channels of the image, width of the logits; 0 for pooled features.
        drop_rate: Dropout of the tokens before the first block.
        drop_path_rate: Stochastic depth of the last block, from 0 in the first linearly.
        norm_epsilon, rms_norm, residual_in_fp32: As in `MambaStack`.
        bimamba_type, if_divide_out, init_layer_scale: As in `BiMamba`.
        if_cls_token: Whether there is a class token; the published dense-task backbones have none.
        use_middle_cls_token: Put it in the middle of the tokens; else it comes first.
        final_pool_type: Without a class token: "mean" over the tokens, or "none" for the last one.
        feature_blocks: Blocks whose outputs are the levels of feature maps; by default the last of each quarter: 5, 11, 17
            and 23 of 24.
        checkpoint_num: The first so many blocks are computed again in backward, which saves memory.
        fused_add_norm: Accepted for compatibility: both ways are the same sums.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
        unreleased: Options of the published class that no released model sets; refused but for the value they have there.
    Shapes:
        x (batch, in_chans, height, width) -> logits (batch, num_classes); maps (batch, embed_dim, rows, cols) with
        rows = 1 + (height - patch_size) // stride, and cols likewise.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        bimamba_type: Literal["v1", "v2"] = "v2",
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        if_cls_token: bool = True,
        use_middle_cls_token: bool = True,
        final_pool_type: Literal["mean", "none"] = "mean",
        feature_blocks: Sequence[int] | None = None,
        checkpoint_num: int = 0,
        fused_add_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        **unreleased: Any,
    ) -> None:
        refuse_unreleased(type(self).__name__, unreleased)
        if final_pool_type not in ("mean", "none"):
            raise ValueError(f"final_pool_type must be 'mean' or 'none', got {final_pool_type!r}")
        stride = patch_size if stride is None else stride
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            depth,
            num_classes,
            drop_path_rate=drop_path_rate,
            norm_epsilon=norm_epsilon,
            rms_norm=rms_norm,
            residual_in_fp32=residual_in_fp32,
            feature_blocks=feature_blocks,
            reduction=stride,
            checkpoint_num=checkpoint_num,
            d_state=d_state,
            bimamba_type=bimamba_type,
            if_divide_out=if_divide_out,
            init_layer_scale=init_layer_scale,
            backend=backend,
            **place,
        )
        self.in_chans, self.final_pool_type = in_chans, final_pool_type
        self.use_middle_cls_token = use_middle_cls_token
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, stride, **place)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **place)) if if_cls_token else None
        count = math.prod(self.patch_embed.grid_size) + if_cls_token
        self.pos_embed = nn.Parameter(torch.zeros(1, count, embed_dim, **place))
        self.pos_drop = nn.Dropout(drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """The published start values."""
        patches = self.patch_embed.proj
        nn.init.trunc_normal_(patches.weight, std=patches.weight[0].numel() ** -0.5 / CUT_NORMAL)
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.init_blocks()

    def class_position(self, patches: int) -> int:
        """Where among so many patches the class token stands."""
        return patches // 2 if self.use_middle_cls_token else 0

    def forward_features(self, x: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """Tokens after the final norm, the class token among them             (batch, seqlen, embed_dim)"""
        check_image("x", x, self.in_chans)
        image = self.patch_embed(x)
        grid = (image.shape[1], image.shape[2])
        tokens, at = image.flatten(1, 2), self.class_position(grid[0] * grid[1])
        if self.cls_token is not None:
            tokens = inserted(tokens, at, self.cls_token.expand(x.shape[0], -1, -1))
        pos: Tensor = self.pos_embed
        if grid != self.patch_embed.grid_size:
            pos = self._positions(pos, self.patch_embed.grid_size, grid, has_class=self.cls_token is not None)
        levels: list[Tensor] | None = None if collect is None else []
        features = self.encode(self.pos_drop(tokens + pos), [{}] * len(self.layers), levels)
        if collect is not None and levels is not None:
            patches = levels if self.cls_token is None else [without(level, at) for level in levels]
            collect.extend(level.mT.unflatten(2, grid) for level in patches)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token, or what is pooled."""
        if self.cls_token is not None:
            pooled = features[:, self.class_position(features.shape[1] - 1)]
        else:
            pooled = features.mean(1) if self.final_pool_type == "mean" else features[:, -1]
        return pooled if pre_logits else self.head(pooled)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for images of another size, or of a classifier where this has no head or no class token."""
        tensors = dict(tensors)
        if self.num_classes == 0:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        pos = tensors.get("pos_embed")
        if pos is None:
            return tensors
        has_class = "cls_token" in tensors
        old, new = square_grid(pos.shape[1] - has_class), self.patch_embed.grid_size
        if pos.shape[1] - has_class != new[0] * new[1]:
            if old is None:
                raise ValueError(
                    f"pos_embed has {pos.shape[1]} tokens, not those of a square image; img_size must fit it"
                )
            pos = self._positions(pos, old, new, has_class=has_class)
        if has_class and self.cls_token is None:
            pos = without(pos, self.class_position(pos.shape[1] - 1))
            del tensors["cls_token"]
        return tensors | {"pos_embed": pos}

    def _positions(self, pos: Tensor, old: tuple[int, int], new: tuple[int, int], *, has_class: bool) -> Tensor:
        """Position embeddings for another grid; the class token keeps its own, wherever it stands."""
        if not has_class:
            return resample_pos_embed(pos, old, new)
        at = self.class_position(old[0] * old[1])
        patches = resample_pos_embed(without(pos, at), old, new)
        return inserted(patches, self.class_position(new[0] * new[1]), pos[:, at : at + 1])


def inserted(tokens: Tensor, at: int, token: Tensor) -> Tensor:
    """Tokens (batch, seqlen, dim) with one more at a position."""
    return torch.cat((tokens[:, :at], token, tokens[:, at:]), dim=1)


def without(tokens: Tensor, at: int) -> Tensor:
    """Tokens (batch, seqlen, dim) but for the one at a position."""
    return tokens[:, 1:] if at == 0 else torch.cat((tokens[:, :at], tokens[:, at + 1 :]), dim=1)


def square_grid(count: int) -> tuple[int, int] | None:
    """(side, side) of that many tokens, or None."""
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def refuse_unreleased(model: str, options: dict[str, Any]) -> None:
    """Options of the published class that no released model needs."""
    for name, value in options.items():
        if name not in UNRELEASED:
            raise TypeError(f"{model} has no argument {name!r}")
        if value != UNRELEASED[name]:
            raise ValueError(f"{name} must be {UNRELEASED[name]!r}, as in every released model, got {value!r}")


# Official names, which spell out the options, and short ones. Stochastic depth is that of the published training, which
# has none in fine-tuning with stride 8; for the base size, whose training is not published, the published default.
LONG = "patch16_{}224_bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2"
for _size, _width, _rate in (("tiny", 192, 0.0), ("small", 384, 0.05), ("base", 768, 0.1)):
    _class_token = "middle_cls_token" if _size == "base" else "midclstok"
    _coarse, _fine = (f"vim_{_size}_{LONG.format(stride, _class_token)}" for stride in ("", "stride8_"))
    for _name in (f"vim_{_size}", _coarse):
        register_model(_name, Vim, embed_dim=_width, drop_path_rate=_rate)
    for _name in (f"vim_{_size}_stride8", *([_fine] if _size != "base" else [])):
        register_model(_name, Vim, embed_dim=_width, stride=8, drop_path_rate=0.0)
