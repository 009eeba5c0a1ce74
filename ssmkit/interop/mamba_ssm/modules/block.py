"""The official residual block, which builds its parts from factories."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.interop.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """Add, norm, mixer; with an MLP once more add, norm, MLP.

    Args:
        dim: Width.
        mixer_cls, mlp_cls, norm_cls: Called with dim; mlp_cls is nn.Identity for blocks without an MLP.
        fused_add_norm: Add and norm in one call, with the sum in fp32 before the norm; the norm is RMSNorm or LayerNorm.
        residual_in_fp32: Keep the residual stream in fp32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(
                f"norm_cls must make LayerNorm or RMSNorm for fused_add_norm, got {type(self.norm).__name__}"
            )

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The mixer's (or MLP's) output and the residual stream so far; hand both to the next block."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return layer_norm_fn(  # type: ignore[return-value]
                hidden_states,
                norm.weight,
                norm.bias,
                residual=residual,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                eps=norm.eps,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
        total = hidden_states if residual is None else hidden_states + residual
        hidden_states = norm(total.to(norm.weight.dtype))
        return hidden_states, total.to(torch.float32) if self.residual_in_fp32 else total

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's states before any token."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
