"""Residual blocks with the add fused into the norm, and stacks of them.

A block keeps the pair (hidden, residual): residual <- residual + hidden, hidden <- mixer(norm(residual)). That is the
ordinary pre-norm residual block, cut so that each add and the norm after it are one kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.nn.mamba import Mamba
from ssmkit.nn.rms_norm import RMSNorm


class Block(nn.Module):
    """Add, norm, mixer; with an MLP once more add, norm, MLP. The names are those of official checkpoints.

    Args:
        mixer: Maps (batch, seqlen, dim) to the same shape.
        norm: RMSNorm, or nn.LayerNorm for checkpoints trained with it.
        mlp: Maps each token; None for blocks without one.
        norm2: The norm before the MLP.
        residual_in_fp32: Keep the residual stream in fp32 whatever the activations are.
    """

    def __init__(
        self,
        mixer: nn.Module,
        norm: RMSNorm | nn.LayerNorm,
        *,
        mlp: nn.Module | None = None,
        norm2: RMSNorm | nn.LayerNorm | None = None,
        residual_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if (mlp is None) != (norm2 is None):
            raise ValueError("mlp and norm2 belong together; give both or neither")
        self.mixer = mixer
        self.norm = norm
        self.norm2 = norm2
        self.mlp = mlp
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, hidden: Tensor, residual: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """The mixer's output and the residual stream so far; hand both to the next block.

        Args:
            hidden: Output of the block before                 (batch, seqlen, dim)
            residual: Its residual stream; None in the first block  (batch, seqlen, dim)
            options: Passed to the mixer: mask, resets, cu_seqlens, state.
        """
        hidden, residual = add_norm(self.norm, hidden, residual, residual_in_fp32=self.residual_in_fp32)
        return self._after(self.mixer(hidden, **options), residual)

    def step(self, hidden: Tensor, residual: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """One token of (batch, 1, dim); `state` is updated in place."""
        hidden, residual = add_norm(self.norm, hidden, residual, residual_in_fp32=self.residual_in_fp32)
        return self._after(self.mixer.step(hidden, *state)[0], residual)  # type: ignore[operator]

    def _after(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the mixer: the MLP, if there is one."""
        if self.mlp is None or self.norm2 is None:
            return hidden, residual
        hidden, residual = add_norm(self.norm2, hidden, residual, residual_in_fp32=self.residual_in_fp32)
        return self.mlp(hidden), residual


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
        make_mlp: Called with layer_idx for each block's MLP; by default there are none.
        backend: Handed to the norms, and to the default `Mamba`.
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
        make_mlp: Callable[[int], nn.Module] | None = None,
        backend: str = "auto",
        **mixer: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": mixer.get("device"), "dtype": mixer.get("dtype")}
        if make_mixer is not None and mixer.keys() - place:
            unused = ", ".join(sorted(mixer.keys() - place))
            raise ValueError(f"make_mixer makes the mixers, so {unused} would go unused; hand it to make_mixer")
        self.residual_in_fp32 = residual_in_fp32

        def norm() -> RMSNorm | nn.LayerNorm:
            if rms_norm:
                return RMSNorm(d_model, eps=norm_eps, backend=backend, **place)
            return nn.LayerNorm(d_model, eps=norm_eps, **place)

        def block(index: int) -> Block:
            layer = make_mixer(index) if make_mixer else Mamba(d_model, layer_idx=index, backend=backend, **mixer)
            mlp, norm2 = (make_mlp(index), norm()) if make_mlp else (None, None)
            return Block(layer, norm(), mlp=mlp, norm2=norm2, residual_in_fp32=residual_in_fp32)

        self.layers = nn.ModuleList(block(index) for index in range(n_layer))
        self.norm_f = norm()

    def forward(self, hidden: Tensor, *, state: list[tuple[Tensor, ...]] | None = None, **options: Any) -> Tensor:
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

    def step(self, hidden: Tensor, state: list[tuple[Tensor, ...]]) -> Tensor:
        """One token (batch, 1, d_model) through every block; `state` is updated in place."""
        residual = None
        for block, part in zip(self.layers, state, strict=True):
            hidden, residual = block.step(hidden, residual, part)  # type: ignore[operator]
        return add_norm(self.norm_f, hidden, residual, residual_in_fp32=self.residual_in_fp32)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Zero states for every layer."""
        return [
            block.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)  # type: ignore[operator, union-attr]
            for block in self.layers
        ]
