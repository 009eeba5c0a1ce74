"""What every vision and video backbone shares: the call, feature maps, the head, official weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.models.weights import fit, read_file, unwrapped


class VisionBackbone(nn.Module):
    """A classifier of images (or clips) whose feature maps can be had as well.

    A subclass sets the attributes below, and implements `forward_features` and `forward_head`.

    Attributes:
        num_classes: Width of the logits; 0 leaves the head out, and `forward` returns pooled features.
        num_features: Width of the features before the head.
        feature_info: One dict per level of feature maps: `num_chs` its channels, `reduction` how many pixels a cell
            covers per axis, `module` the name of the module that ends it.
        head_name: Name of the classifying nn.Linear among the modules.
        no_weight_decay_names: Parameters that published recipes keep from weight decay, besides flagged ones.
    """

    num_classes: int
    num_features: int
    feature_info: list[dict[str, Any]]
    head_name: str = "head"
    no_weight_decay_names: tuple[str, ...] = ()

    def forward_features(self, x: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """Features before pooling; with a list, append every level of maps (batch, channels, height, width) to it."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, and classify unless `pre_logits`.                (batch, num_classes) or (batch, num_features)"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (batch, in_chans, height, width).      (batch, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features before pooling, and the maps of some levels.

        Args:
            x: Images                                              (batch, in_chans, height, width)
            indices: Levels of `feature_info`; all by default, negative ones count from the end.
            intermediates_only: Return the maps alone.
        """
        chosen = self.levels(indices)
        maps: list[Tensor] = []
        features = self.forward_features(x, maps)
        maps = [maps[level] for level in chosen]
        return maps if intermediates_only else (features, maps)

    def levels(self, indices: Sequence[int] | None = None) -> list[int]:
        """Indices of levels as numbers from 0."""
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        wrong = [index for index in indices if not -count <= index < count]
        if wrong:
            raise ValueError(f"indices must lie in {-count}..{count - 1}, got {wrong[0]}: there are {count} levels")
        return [index % count for index in indices]

    def get_classifier(self) -> nn.Module:
        """The classifying layer."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifying layer of another width, none if 0: for fine-tuning on other classes."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        like = next(self.parameters())
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if not head.weight.is_meta:
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
        parent, _, name = self.head_name.rpartition(".")
        setattr(self.get_submodule(parent), name, head)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to keep from weight decay: flagged ones and those of the published recipe."""
        flagged = {name for name, p in self.named_parameters() if getattr(p, "_no_weight_decay", False)}
        return flagged | {name for name, _ in self.named_parameters() if name in self.no_weight_decay_names}

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names and shapes to those of this class, where they differ."""
        return tensors

    def load_official(self, weights: str | Path | Mapping[str, Any]) -> None:
        """Load published weights strictly.

        Args:
            weights: A checkpoint file (.pth, .pt, .ckpt, .safetensors), or what it holds; wrappers of training scripts
                ("model", "state_dict", "model_ema") and prefixes of wrapped modules are taken off.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a tensor is missing, unknown or of another shape, or the file holds something else.
        """
        source = "the state dict" if isinstance(weights, Mapping) else str(weights)
        if not isinstance(weights, Mapping):
            path = Path(weights)
            if not path.is_file():
                raise FileNotFoundError(f"no weights at {path}")
            weights = read_file(path)
        like = next(self.parameters()).device
        device = "cpu" if like.type == "meta" else like
        fit(self, self.translate(unwrapped(weights)), source=source, device=device)


class FeatureList(nn.Module):
    """The feature maps of a backbone as its output: what `create_model(name, features_only=True)` returns.

    Args:
        backbone: Any VisionBackbone; its classifier is left out.
        out_indices: Levels, all by default.
    Shapes:
        x (batch, in_chans, height, width) -> list of (batch, channels, height / reduction, width / reduction)
    """

    def __init__(self, backbone: VisionBackbone, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = backbone.levels(out_indices)
        self.feature_info = [backbone.feature_info[level] for level in self.out_indices]
        if backbone.num_classes:
            backbone.reset_classifier(0)
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of the chosen levels."""
        maps: list[Tensor] = []
        self.backbone.forward_features(x, maps)
        return [maps[level] for level in self.out_indices]


def check_image(name: str, x: Tensor, in_chans: int) -> None:
    """Images must be (batch, in_chans, height, width) of floating point."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{name} must have shape (batch, {in_chans}, height, width), got {tuple(x.shape)}")
    if not torch.is_floating_point(x):
        raise TypeError(f"{name} must be floating point, got {x.dtype}: scale bytes to 0..1 and normalise them first")
