"""Decision Transformer (Chen et al. 2021, arXiv:2106.01345), the attention baseline.

A GPT-2 without position embeddings over the tokens (R_1, s_1, a_1, R_2, ...); attention is PyTorch's own.

    x <- x + Dropout(W_o softmax(Q K^T / sqrt(d)) V)      causal, pads unseen; Q, K, V from LayerNorm(x)
    x <- x + Dropout(W2 ReLU(W1 LayerNorm(x)))
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkit.models.trajectory.common import (
    Prediction,
    TokenModel,
    action_head,
    check_sizes,
    flatten_steps,
    residual_stream,
    split_steps,
    token_mask,
)
from ssmkit.models.trajectory.ota_decision_mamba import init_gpt2


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionTransformerConfig:
    """Sizes and choices; the defaults are the published ones for Gym."""

    state_dim: int
    action_dim: int
    discrete_actions: bool = False
    dim: int = 128
    depth: int = 3
    nheads: int = 1
    dropout: float = 0.1
    context: int = 20
    max_timestep: int = 1000

    def __post_init__(self) -> None:
        check_sizes(self, ("state_dim", "action_dim", "dim", "depth", "nheads", "context"))
        if self.dim % self.nheads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of nheads ({self.nheads})")


class Attention(nn.Module):
    """Causal self-attention, GPT-2's names."""

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__()
        self.nheads, self.dropout = config.nheads, config.dropout
        self.c_attn = nn.Linear(config.dim, 3 * config.dim)
        self.c_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """x (batch, L, dim); seen (batch, 1, L, L) or None for plain causality."""
        q, k, v = rearrange(self.c_attn(x), "b l (three h p) -> three b h l p", three=3, h=self.nheads)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None)
        return F.dropout(self.c_proj(rearrange(y, "b h l p -> b l (h p)")), self.dropout, self.training)


class AttentionBlock(nn.Module):
    """Attention, then a perceptron, each pre-normed and residual."""

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """x (batch, L, dim); seen (batch, 1, L, L) or None."""
        x = x + self.attn(self.ln_1(x), seen)
        return x + self.drop(self.mlp["c_proj"](F.relu(self.mlp["c_fc"](self.ln_2(x)))))


class Transformer(nn.Module):
    """Blocks and a final norm, GPT-2's names."""

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(AttentionBlock(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.dim)


class DecisionTransformer(TokenModel):
    """The model; parameter names are those of the released code."""

    time_before_norm = True
    released_masks_pads = True

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__(config.state_dim, config.action_dim, config.dim, config.max_timestep, "linear")
        self.config = config
        self.transformer = Transformer(config)
        # The published model has these two heads and does not train them.
        self.predict_state = nn.Linear(config.dim, config.state_dim).requires_grad_(False)
        self.predict_return = nn.Linear(config.dim, 1).requires_grad_(False)
        self.predict_action = action_head(config.dim, config.action_dim, bounded=not config.discrete_actions)
        init_gpt2(self.transformer)

    def forward(
        self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Prediction:
        """Predictions at every step of a window; see `TrajectoryModel.forward`."""
        x = residual_stream(self.transformer.drop(flatten_steps(self.embed(states, actions, returns, timesteps))))
        seen = None if mask is None else attention_mask(token_mask(mask))
        for block in self.transformer.h:
            x = block(x, seen)
        x = split_steps(self.transformer.ln_f(x))
        return Prediction(
            self.predict_action(x[:, :, 1]), self.predict_state(x[:, :, 2]), self.predict_return(x[:, :, 2])
        )

    @staticmethod
    def translate(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A released or transformers checkpoint as `load_state_dict` takes it.

        GPT-2's `Conv1D` keeps its weights as (in, out), and the blocks carry constant masks; transformers calls the trunk
        `encoder` and gives it a position table that the model does not use.
        """
        renamed = {name.replace("encoder.", "transformer.", 1): value for name, value in state_dict.items()}
        turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
        dropped = (".attn.bias", ".attn.masked_bias", "transformer.wpe.weight", "transformer.wte.weight")
        return {
            name: value.t() if name.endswith(turned) else value
            for name, value in renamed.items()
            if not name.endswith(dropped)
        }


def attention_mask(mask: Tensor | None) -> Tensor:
    """What each token may look at: real tokens up to itself, and itself (so that a pad's row is not empty).

    mask (batch, L) to (batch, 1, L, L).
    """
    assert mask is not None
    seqlen = mask.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(seqlen, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None, :]) | itself)[:, None]


VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "demo": {"dim": 64, "depth": 2},
}
