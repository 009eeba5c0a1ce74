"""Augmentation of batches of images and clips, by kornia: on the device they are on, from torch's seeded generator."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STRENGTHS = ("none", "light", "full")


class Mixed(NamedTuple):
    """A batch, and what each sample counts as: `first` for a share of `weight`, `second` for the rest."""

    x: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor  # (batch,)


class Augment(nn.Module):
    """Random views of a batch in training: crops, flips, colours, erased boxes; all frames of a clip alike.

    Args:
        size: Height and width of what comes out.
        strength: "none"; "light": crops of at least half of the area, small turns, flips; "full": crops of a fifth and
            more, flips, RandAugment (for clips colours alone), erased boxes.
        flip: Whether mirrored samples keep their class.
        clip: Whether samples are clips (batch, channels, frames, height, width) or images (batch, channels, height, width).
    Shapes:
        x, values in 0..1 -> the same axes, height and width `size`.
    """

    def __init__(self, size: int, strength: str, *, flip: bool, clip: bool) -> None:
        super().__init__()
        if strength not in STRENGTHS:
            raise ValueError(f"augment must be one of {', '.join(STRENGTHS)}, got {strength!r}")
        self.size, self.strength = size, strength
        if strength == "none":
            self.views: nn.Module | None = None
            return
        K = kornia_augmentation()
        if strength == "light":
            parts = [
                K.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.8, 1.25), p=0.8),
                K.RandomAffine(degrees=10.0, translate=(0.08, 0.08), p=0.8),
            ]
        else:
            parts = [K.RandomResizedCrop((size, size), scale=(0.2, 1.0))]
            parts += [K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.8)] if clip else [K.auto.RandAugment(n=2, m=9)]
            parts += [K.RandomErasing(p=0.25)]
        if flip:
            parts.append(K.RandomHorizontalFlip(p=0.5))
        if clip:
            self.views = K.VideoSequential(*parts, data_format="BCTHW", same_on_frame=True)
        else:
            self.views = nn.Sequential(*parts)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Views of the samples."""
        if self.views is not None:
            x = self.views(x).clamp(0, 1)
        if x.shape[-2:] != (self.size, self.size):
            flat = x.flatten(1, -3)
            flat = nn.functional.interpolate(flat, (self.size, self.size), mode="bilinear", antialias=True)
            x = flat.unflatten(1, x.shape[1:-2])
        return x


def mix(x: Tensor, labels: Tensor, mixup: float, cutmix: float) -> Mixed:
    """Blend each sample with another one (mixup), or give it a box of that one (cutmix); each for half of the batches.

    Zhang et al. 2018, arXiv:1710.09412, and Yun et al. 2019, arXiv:1905.04899.

    Args:
        x: Images or clips                      (batch, ..., height, width)
        labels: Their classes                   (batch,)
        mixup, cutmix: Parameters of the beta distributions of the shares; 0 turns either off.
    """
    ones = torch.ones(len(labels), device=x.device)
    if len(labels) < 2 or (not mixup and not cutmix):
        return Mixed(x, labels, labels, ones)
    alpha, boxes = (cutmix, True) if cutmix and (not mixup or torch.rand(()) < 0.5) else (mixup, False)
    other = torch.randperm(len(labels), device=x.device)
    weight = float(torch.distributions.Beta(alpha, alpha).sample())
    if not boxes:
        return Mixed(torch.lerp(x[other], x, weight), labels, labels[other], ones * weight)
    height, width = x.shape[-2:]
    sides = [round(side * (1 - weight) ** 0.5) for side in (height, width)]
    top, left = (int(torch.randint(0, full - side + 1, ())) for full, side in zip((height, width), sides, strict=True))
    box = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
    x = x.clone()
    x[box] = x[other][box]
    return Mixed(x, labels, labels[other], ones * (1 - sides[0] * sides[1] / (height * width)))


def kornia_augmentation() -> Any:
    """kornia.augmentation, or an error that says how to get it."""
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError("augmentation needs kornia: pip install 'ssmkit[vision]', or --augment none") from error
    return kornia.augmentation
