"""Small parts that vision backbones share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop_path_rates(total: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth of every block of every stage: from 0 in the first block linearly to `total` in the last."""
    count = sum(depths)
    rates = [total * index / (count - 1) if count > 1 else 0.0 for index in range(count)]
    ends = [sum(depths[: stage + 1]) for stage in range(len(depths))]
    return [rates[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


def trunc_normal_linear_init(module: nn.Module) -> None:
    """nn.Linear: weights of a truncated normal with deviation 0.02, no bias; LayerNorm: 1 and 0. For module.apply()."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resample_pos_embed(
    pos: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Position embeddings of one grid for another, by bicubic interpolation; prefix tokens keep theirs.

    Args:
        pos: (1, num_prefix_tokens + rows * cols, dim)
        old_grid, new_grid: (rows, cols)
    Raises:
        ValueError: pos does not have the tokens of old_grid.
    """
    expected = num_prefix_tokens + old_grid[0] * old_grid[1]
    if pos.shape[1] != expected:
        raise ValueError(
            f"pos must have {expected} tokens for a grid of {old_grid[0]} x {old_grid[1]} and {num_prefix_tokens} "
            f"prefix tokens, got {pos.shape[1]}"
        )
    if old_grid == new_grid:
        return pos
    prefix, grid = pos[:, :num_prefix_tokens], pos[:, num_prefix_tokens:]
    image = grid.unflatten(1, old_grid).movedim(-1, 1).float()
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((prefix, image.flatten(2).mT.to(pos.dtype)), dim=1)
