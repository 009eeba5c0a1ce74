"""Residual blocks with the add fused into the norm, and stacks of them.

A block keeps the pair (hidden, residual): residual <- residual + hidden, hidden <- mixer(norm(residual)). That is the
ordinary pre-norm residual block, cut so that each add and the norm after it are one kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.nn.mamba import Mamba, MambaState
from ssmkit.nn.rms_norm import RMSNorm


class Block(nn.Module):
    """Add, norm, mixer. Names `norm` and `mixer` are those of official checkpoints.

    Args:
        mixer: Maps (batch, seqlen, dim) to the same shape.
        norm: RMSNorm, or nn.LayerNorm for checkpoints trained with it.
        residual_in_fp32: Keep the residual stream in fp32 whatever the activations are.
    """

    def __init__(self, mixer: nn.Module, norm: RMSNorm | nn.LayerNorm, *, residual_in_fp32: bool = True) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, hidden: Tensor, residual: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """The mixer's output and the residual stream so far; hand both to the next block.

        Args:
            hidden: Output of the block before                 (batch, seqlen, dim)
            residual: Its residual stream; None in the first block  (batch, seqlen, dim)
            options: Passed to the mixer: mask, resets, cu_seqlens, state.
        """
        hidden, residual = add_norm(self.norm, hidden, residual, residual_in_fp32=self.residual_in_fp32)
        return self.mixer(hidden, **options), residual

    def step(self, hidden: Tensor, residual: Tensor | None, state: MambaState) -> tuple[Tensor, Tensor]:
        """One token of (batch, 1, dim); `state` is updated in place."""
        hidden, residual = add_norm(self.norm, hidden, residual, residual_in_fp32=self.residual_in_fp32)
        return self.mixer.step(hidden, *state)[0], residual  # type: ignore[operator]


def add_norm(
    norm: RMSNorm | nn.LayerNorm, hidden: Tensor, residual: Tensor | None, *, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """norm(hidden + residual) in the dtype of hidden, and the sum."""
    if isinstance(norm, RMSNorm) and residual is not None:
        return norm(hidden, residual=residual, residual_in_fp32=residual_in_fp32)
    total = hidden if residual is None else hidden + residual
    if residual_in_fp32 and total.dtype != torch.float64:
        total = total.float()
    return norm(total.to(norm.weight.dtype)).to(hidden.dtype), total


class MambaStack(nn.Module):
    """Residual Mamba blocks and a final norm; parameter names `layers.{i}.norm|mixer`, `norm_f` as in official backbones.

    Args:
        d_model: Width.
        n_layer: Number of blocks.
        norm_eps: Of every norm.
        rms_norm: RMSNorm, or LayerNorm if False.
        residual_in_fp32: Keep the residual stream in fp32.
        make_mixer: Called with layer_idx for each block's mixer; by default `Mamba(d_model, **mixer)`.
        mixer: Further arguments of the default `Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        *,
        norm_eps: float = 1e-5,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        make_mixer: Callable[[int], nn.Module] | None = None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": mixer.get("device"), "dtype": mixer.get("dtype")}
        if make_mixer is not None and mixer.keys() - place:
            unused = ", ".join(sorted(mixer.keys() - place))
            raise ValueError(f"make_mixer makes the mixers, so {unused} would go unused; hand it to make_mixer")
        self.residual_in_fp32 = residual_in_fp32

        def norm() -> RMSNorm | nn.LayerNorm:
            kind: type[RMSNorm | nn.LayerNorm] = RMSNorm if rms_norm else nn.LayerNorm
            return kind(d_model, eps=norm_eps, **place)

        def layer(index: int) -> nn.Module:
            return make_mixer(index) if make_mixer else Mamba(d_model, layer_idx=index, **mixer)

        self.layers = nn.ModuleList(
            Block(layer(index), norm(), residual_in_fp32=residual_in_fp32) for index in range(n_layer)
        )
        self.norm_f = norm()

    def forward(self, hidden: Tensor, *, state: list[MambaState] | None = None, **options: Any) -> Tensor:
        """Run every block and the final norm.

        Args:
            hidden: Input                              (batch, seqlen, d_model)
            state: From `allocate_inference_cache`; continued and updated in place.
            options: mask, resets, cu_seqlens, as for `Mamba`.
        """
        residual = None
        for index, block in enumerate(self.layers):
            carried = {} if state is None else {"state": state[index]}
            hidden, residual = block(hidden, residual, **carried, **options)
        return add_norm(self.norm_f, hidden, residual, residual_in_fp32=self.residual_in_fp32)[0]

    def step(self, hidden: Tensor, state: list[MambaState]) -> Tensor:
        """One token (batch, 1, d_model) through every block; `state` is updated in place."""
        residual = None
        for block, part in zip(self.layers, state, strict=True):
            hidden, residual = block.step(hidden, residual, part)  # type: ignore[operator]
        return add_norm(self.norm_f, hidden, residual, residual_in_fp32=self.residual_in_fp32)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> list[MambaState]:
        """Zero states for every layer."""
        return [
            block.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)  # type: ignore[operator, union-attr]
            for block in self.layers
        ]
