"""VideoMamba: Vim's blocks over all patches of a clip, or of an image, with the class token in front.

Li et al. 2024, "VideoMamba: State Space Model for Efficient Video Understanding", arXiv:2403.06977; sizes and names of
github.com/OpenGVLab/VideoMamba, those of its image models with "_image" behind.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit import paths
from ssmkit.models.registry import register_model
from ssmkit.models.vision.common import resample_pos_embed
from ssmkit.models.vision.vim import BiMambaBackbone, Vim, refuse_unreleased, square_grid, without
from ssmkit.models.weights import read_file, unwrapped
from ssmkit.nn.patch_embed import pair

SPATIAL, TEMPORAL = "thw", "hwt"
# The orders that the paper compares. Weights are released for the first alone.
SCAN_ORDERS = {
    "spatial": "frame by frame, row by row",
    "temporal": "all frames of a place, then the next place",
    "spatial forwards, temporal backwards": "one direction of each",
    "spatial and temporal": "both directions of both, at twice the cost",
    "spatial, then temporal": "spatial in the first half of the layers, temporal in the second",
    "temporal, then spatial": "the other way round",
    "alternating": "spatial and temporal layers in turn",
}


def axes_of(order: str, layer: int, depth: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes, slowest first, of the forward and of the backward walks of a layer."""
    if order == "spatial forwards, temporal backwards":
        return (SPATIAL,), (TEMPORAL,)
    if order == "spatial and temporal":
        return (SPATIAL, TEMPORAL), (SPATIAL, TEMPORAL)
    late = layer >= (depth + 1) // 2
    temporal = {
        "spatial": False,
        "temporal": True,
        "spatial, then temporal": late,
        "temporal, then spatial": not late,
        "alternating": layer % 2 == 1,
    }[order]
    axes = (TEMPORAL if temporal else SPATIAL,)
    return axes, axes


class VideoMamba(BiMambaBackbone):
    """The VideoMamba classifier of clips, or its feature maps.

        patches of frames -> pos_embed and temporal_pos_embedding added, class token put in front -> blocks -> norm_f ->
        class token -> head

    Args:
        img_size, num_frames: Height and width, and frames, that the position embeddings are for; for clips of other sizes
            they are interpolated at each call.
        patch_size: Pixels of a patch, per axis.
        depth, embed_dim, in_chans, num_classes: Blocks, width, channels of a frame, width of the logits.
        drop_rate, fc_drop_rate: Dropout of the tokens before the first block, and of what the head reads.
        drop_path_rate: Stochastic depth of the last block, from 0 in the first linearly.
        norm_epsilon, rms_norm, residual_in_fp32: As in `MambaStack`.
        kernel_size: Frames of a tubelet, which becomes one token.
        scan_order: One of SCAN_ORDERS: the order in which the scans visit the tokens. All but "spatial" are the paper's
            comparison; their code is not released. "spatial forwards, temporal backwards" and "spatial and temporal" are
            our reading of its figure, with the same weights for the spatial and the temporal scans.
        feature_blocks: Blocks whose outputs are the levels of feature maps; by default the last of each quarter.
        checkpoint_num: The first so many blocks are computed again in backward, which saves memory.
        fused_add_norm: Accepted for compatibility: both ways are the same sums.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        x (batch, in_chans, frames, height, width) -> logits (batch, num_classes); maps (batch, embed_dim,
        frames // kernel_size, height // patch_size, width // patch_size).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        in_chans: int = 3,
        num_classes: int = 400,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        fused_add_norm: bool = True,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        kernel_size: int = 1,
        num_frames: int = 8,
        fc_drop_rate: float = 0.0,
        scan_order: str = "spatial",
        feature_blocks: Sequence[int] | None = None,
        checkpoint_num: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        **unreleased: Any,
    ) -> None:
        refuse_unreleased(type(self).__name__, unreleased)
        if scan_order not in SCAN_ORDERS:
            raise ValueError(f"scan_order must be one of {', '.join(map(repr, SCAN_ORDERS))}, got {scan_order!r}")
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
            reduction=patch_size,
            checkpoint_num=checkpoint_num,
            backend=backend,
            **place,
        )
        self.in_chans, self.scan_order = in_chans, scan_order
        self.patch_embed = TubeletEmbed(img_size, patch_size, kernel_size, num_frames, in_chans, embed_dim, **place)
        frames, rows, cols = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **place))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * cols + 1, embed_dim, **place))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, frames, embed_dim, **place))
        self.pos_drop, self.head_drop = nn.Dropout(drop_rate), nn.Dropout(fc_drop_rate)
        init_like_videomamba(self)

    def forward_features(self, x: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """Tokens after the final norm, the class token first          (batch, 1 + frames * rows * cols, embed_dim)"""
        clip = self.patch_embed(x)
        grid = (clip.shape[1], clip.shape[2], clip.shape[3])
        pos, temporal = self._positions(grid)
        tokens = clip.flatten(2, 3) + (pos[:, None, 1:] + temporal[:, :, None])
        first = (self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1)
        levels: list[Tensor] | None = None if collect is None else []
        hidden = self.pos_drop(torch.cat((first, tokens.flatten(1, 2)), dim=1))
        features = self.encode(hidden, self.walks(grid), levels)
        if collect is not None and levels is not None:
            collect.extend(without(level, 0).mT.unflatten(2, grid) for level in levels)
        return features

    def walks(self, grid: tuple[int, int, int]) -> list[dict[str, Any]]:
        """The paths of every block over a clip of (frames, rows, cols) tokens behind a class token."""
        depth = len(self.layers)
        axes = [axes_of(self.scan_order, layer, depth) for layer in range(depth)]
        walked = {each for directions in axes for direction in directions for each in direction}
        path = {each: paths.clip(*grid, each).with_tokens(0) for each in sorted(walked)}
        return [{"path": [path[a] for a in there], "path_b": [path[a].flip() for a in back]} for there, back in axes]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token."""
        return features[:, 0] if pre_logits else self.head(self.head_drop(features[:, 0]))

    def _positions(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Position embeddings of the places, the class token's first, and of the frames, for a clip of that many tokens."""
        pos = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size[1:], grid[1:], 1)
        return pos, resample_frames(self.temporal_pos_embedding, grid[0])

    def load_pretrained(self, weights: str | Path | Mapping[str, Any], *, inflation: str = "center") -> None:
        """Start from an image model, or from the published masked pre-training on clips.

        Heads are left out, and of the pre-training its decoder and its norm, as published. What has no counterpart in the
        weights stays as it is: the head, temporal_pos_embedding of image models, norm_f of the pre-training.

        Args:
            weights: A checkpoint file, or what it holds, as in `load_official`.
            inflation: How patches become tubelets: "center" puts the weights in the middle frame and zeros in the others;
                "mean" divides them among all frames.
        Raises:
            ValueError: a tensor is missing, unknown or of another shape; the model is as before.
        """
        if inflation not in ("center", "mean"):
            raise ValueError(f"inflation must be 'center' or 'mean', got {inflation!r}")
        given = unwrapped(weights if isinstance(weights, Mapping) else read_file(Path(weights)))
        masked = any(name.startswith("clip_decoder.") for name in given)
        left_out = ("head.", "clip_decoder.", "norm.") if masked else ("head.",)
        tensors = {name: tensor for name, tensor in given.items() if not name.startswith(left_out)}
        patches = tensors.get("patch_embed.proj.weight")
        if patches is not None and patches.ndim == 4:
            tensors["patch_embed.proj.weight"] = inflated(patches, self.patch_embed.kernel_size, inflation)
        own = ("head.", "norm_f.") if masked else ("head.", "temporal_pos_embedding")
        self.load_official({name: t for name, t in self.state_dict().items() if name.startswith(own)} | tensors)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for clips of another size or length, or of a classifier where this has no head."""
        tensors = {name.removeprefix("backbone.").removeprefix("encoder."): t for name, t in tensors.items()}
        if "temporal_pos_embedding" not in tensors:
            raise ValueError("temporal_pos_embedding is missing: weights of an image model go to load_pretrained")
        if self.num_classes == 0:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        frames, *grid = self.patch_embed.grid_size
        tensors["temporal_pos_embedding"] = resample_frames(tensors["temporal_pos_embedding"], frames)
        pos = tensors.get("pos_embed")
        if pos is not None and pos.shape[1] != grid[0] * grid[1] + 1:
            old = square_grid(pos.shape[1] - 1)
            if old is None:
                raise ValueError(
                    f"pos_embed has {pos.shape[1]} tokens, not those of a square image; img_size must fit it"
                )
            tensors["pos_embed"] = resample_pos_embed(pos, old, (grid[0], grid[1]), 1)
        return tensors


class VideoMambaImage(Vim):
    """The image classifiers of VideoMamba: Vim with the class token in front and the directions added, not averaged.

    Arguments are those of `Vim`.
    """

    def __init__(self, *, if_divide_out: bool = False, use_middle_cls_token: bool = False, **options: Any) -> None:
        super().__init__(if_divide_out=if_divide_out, use_middle_cls_token=use_middle_cls_token, **options)

    def init_weights(self) -> None:
        """The published start values."""
        init_like_videomamba(self)


class TubeletEmbed(nn.Module):
    """One convolution with its kernel as its stride: every patch of `kernel_size` frames becomes a token.

    Shapes:
        x (batch, in_chans, frames, height, width) -> (batch, frames // kernel_size, rows, cols, embed_dim)
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        kernel_size: int,
        num_frames: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.in_chans = kernel_size, in_chans
        size = (kernel_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size, device=device, dtype=dtype)
        self.grid_size = self.grid_of(num_frames, *pair(img_size))

    def grid_of(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of a clip.

        Raises:
            ValueError: the clip is smaller than a tubelet.
        """
        least = self.proj.kernel_size
        if any(size < one for size, one in zip((frames, height, width), least, strict=True)):
            raise ValueError(
                f"a clip must be at least one tubelet of {least[0]} x {least[1]} x {least[2]}, "
                f"got {frames} x {height} x {width}: take more frames, or a smaller patch_size"
            )
        return frames // least[0], height // least[1], width // least[2]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of a clip."""
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape (batch, {self.in_chans}, frames, height, width), got {tuple(x.shape)}")
        if not torch.is_floating_point(x):
            raise TypeError(f"x must be floating point, got {x.dtype}: scale bytes to 0..1 and normalise them first")
        self.grid_of(*x.shape[2:])
        tokens: Tensor = self.proj(x)
        return tokens.movedim(1, -1)


def init_like_videomamba(model: BiMambaBackbone) -> None:
    """Start values of VideoMamba, but that the step sizes keep theirs: the published code sets their biases to zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(".dt_proj"):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)  # type: ignore[arg-type]
    model.init_blocks()


def inflated(weight: Tensor, frames: int, how: str) -> Tensor:
    """Weights (out, in, rows, cols) of a patch as those of a tubelet, (out, in, frames, rows, cols)."""
    if how == "mean":
        return weight.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames
    tubelet = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    tubelet[:, :, frames // 2] = weight
    return tubelet


def resample_frames(pos: Tensor, frames: int) -> Tensor:
    """Embeddings (1, old frames, dim) for another number of frames, by linear interpolation."""
    if pos.shape[1] == frames:
        return pos
    return F.interpolate(pos.mT.float(), size=frames, mode="linear", align_corners=False).mT.to(pos.dtype)


# Stochastic depth is that of the published training on Kinetics-400, and on ImageNet for the image models.
for _name, _depth, _width, _rates in (
    ("tiny", 24, 192, (0.1, 0.0)),
    ("small", 24, 384, (0.35, 0.15)),
    ("middle", 32, 576, (0.8, 0.5)),
    ("base", 24, 768, (None, 0.5)),
):
    if _rates[0] is not None:
        register_model(f"videomamba_{_name}", VideoMamba, depth=_depth, embed_dim=_width, drop_path_rate=_rates[0])
    _image = f"videomamba_{_name}_image"
    register_model(_image, VideoMambaImage, depth=_depth, embed_dim=_width, drop_path_rate=_rates[1])
