"""Decision Mamba by T. Ota (2024, "Decision Mamba: Reinforcement Learning via Sequence Modeling with Selective State
Spaces", arXiv:2403.19925): Decision Transformer with its attention replaced by a Mamba mixer.

    x <- x + Mamba(LayerNorm(x))
    x <- x + Dropout(W2 GELU(W1 LayerNorm(x)))

The released code zeroes every bias of a linear layer after construction, the step-size bias of the mixers included, so
that step sizes start near softplus(0) = 0.69 instead of 0.001 to 0.1. Here that bias survives; `released_dt_bias=True`
reproduces the release.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.models.trajectory.common import (
    Prediction,
    Stream,
    TokenModel,
    action_head,
    check_sizes,
    flatten_steps,
    residual_stream,
    split_steps,
    step_mixer,
    token_mask,
)
from ssmkit.nn import Mamba


@dataclass(frozen=True, kw_only=True, slots=True)
class OtaDecisionMambaConfig:
    """Sizes and choices; the defaults are the published ones for most Gym tasks."""

    state_dim: int
    action_dim: int
    discrete_actions: bool = False
    dim: int = 128
    depth: int = 3
    dstate: int = 16
    width: int = 4
    expand: int = 2
    dropout: float = 0.1
    context: int = 20
    max_timestep: int = 1000
    released_dt_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, ("state_dim", "action_dim", "dim", "depth", "dstate", "width", "expand", "context"))


class MixerBlock(nn.Module):
    """Mamba, then a two-layer perceptron on channels, each pre-normed and residual."""

    def __init__(self, config: OtaDecisionMambaConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm_mamba = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, d_state=config.dstate, d_conv=config.width, expand=config.expand)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp_channels = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(config.dropout)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, L, dim); mask (batch, L)."""
        x = x + self.mamba(self.norm_mamba(x), mask=mask)
        return x + self.mlp_channels(self.ln_2(x))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """A few tokens (batch, n, dim), continuing `state` in place."""
        x = x + step_mixer(self.mamba, self.norm_mamba(x), state)
        return x + self.mlp_channels(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks and a final norm, under the released names."""

    def __init__(self, config: OtaDecisionMambaConfig) -> None:
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(MixerBlock(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.dim)


class OtaDecisionMamba(TokenModel):
    """The model; parameter names are those of the released code."""

    time_before_norm = True
    streams = True

    def __init__(self, config: OtaDecisionMambaConfig) -> None:
        super().__init__(config.state_dim, config.action_dim, config.dim, config.max_timestep, "linear")
        self.config = config
        self.transformer = Transformer(config)
        self.predict_action = action_head(config.dim, config.action_dim, bounded=not config.discrete_actions)
        init_gpt2(self.transformer, keep_dt_bias=not config.released_dt_bias)

    def blocks(self) -> list[MixerBlock]:
        """The blocks, first to last."""
        return [block for block in self.transformer.h if isinstance(block, MixerBlock)]

    def forward(
        self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Prediction:
        """Predictions at every step of a window; see `TrajectoryModel.forward`."""
        x = residual_stream(self.transformer.drop(flatten_steps(self.embed(states, actions, returns, timesteps))))
        for block in self.blocks():
            x = block(x, token_mask(mask))
        x = split_steps(self.transformer.ln_f(x))
        return Prediction(self.predict_action(x[:, :, 1]))

    def allocate_stream(self, batch: int, dtype: torch.dtype | None = None) -> Stream:
        """The empty state of a roll-out of `batch` episodes."""
        return Stream([block.mamba.allocate_inference_cache(batch, 0, dtype) for block in self.blocks()])

    @torch.no_grad()
    def step(self, state: Tensor, returns: Tensor, previous_action: Tensor | None, stream: Stream) -> Tensor:
        """One step of a roll-out; see `TrajectoryModel.step`."""
        x = residual_stream(self.embed_step(state, returns, previous_action, stream.steps))
        for block, block_state in zip(self.blocks(), stream.layers, strict=True):
            x = block.step(x, block_state)
        stream.steps += 1
        return self.predict_action(self.transformer.ln_f(x[:, -1]))


@torch.no_grad()
def init_gpt2(module: nn.Module, *, keep_dt_bias: bool = True) -> None:
    """GPT-2's start values: linear and embedding weights ~ N(0, 0.02), biases zero.

    A bias marked `_no_reinit` (a mixer's step sizes) is left alone unless `keep_dt_bias` is False.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            child.weight.normal_(0.0, 0.02)
            bias = getattr(child, "bias", None)
            if bias is not None and not (keep_dt_bias and getattr(bias, "_no_reinit", False)):
                bias.zero_()


# Published sizes: "released-wide" was run on hopper-medium and hopper-medium-replay. "demo" is for a CPU.
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "released-wide": {"dim": 256},
    "released-atari": {"depth": 6, "context": 30},
    "demo": {"dim": 64, "depth": 2},
}
