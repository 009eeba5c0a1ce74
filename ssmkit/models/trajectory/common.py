"""What every trajectory model shares: tokens, heads, streams.

An episode step t becomes three tokens, return-to-go R_t, state s_t and action a_t, in this order (Chen et al. 2021,
"Decision Transformer", arXiv:2106.01345). The action is read from the token of s_t; models that predict the next state
and return read them from the token of a_t. Sizes: K steps in a window, 3K tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ssmkit.nn import Mamba

Embedding = Literal["linear", "mlp"]


class Prediction(NamedTuple):
    """Predictions at every step of a window."""

    actions: Tensor  # (batch, K, action_dim); logits if actions are discrete
    states: Tensor | None = None  # (batch, K, state_dim), of the next step
    returns: Tensor | None = None  # (batch, K, 1), of the next step


@dataclass
class Stream:
    """The carried state of a roll-out: steps taken so far, and what each layer remembers, updated in place."""

    layers: list[Any]
    steps: int = 0


class TrajectoryModel(nn.Module):
    """What every trajectory model offers: `forward` over windows, and a stream where `streams` is True.

    `config` is the model's frozen dataclass; it has state_dim, action_dim, discrete_actions and context.
    `learns_next_step` models are also trained to predict the next state and return; `released_masks_pads` says whether
    the published code hides pads from the model.
    """

    config: Any
    streams = False
    learns_next_step = False
    released_masks_pads = False

    def forward(
        self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Prediction:
        """Predictions at every step of a window.

        Args:
            states: (batch, K, state_dim)     actions: (batch, K, action_dim)     returns: to go (batch, K, 1)
            timesteps: Steps since the episode began (batch, K) int64
            mask: True at real steps (batch, K); pads change nothing at real steps, whatever they hold.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def allocate_stream(self, batch: int, dtype: torch.dtype | None = None) -> Stream:
        """The empty state of a roll-out of `batch` episodes."""
        raise ValueError(f"{type(self).__name__} carries no state; roll out windowed")

    def step(self, state: Tensor, returns: Tensor, previous_action: Tensor | None, stream: Stream) -> Tensor:
        """The action at one step (batch, action_dim), given what the stream remembers; updates the stream.

        Args:
            state: (batch, state_dim)     returns: to go (batch, 1)
            previous_action: What was done at the step before (batch, action_dim); None at the first.
        """
        raise ValueError(f"{type(self).__name__} carries no state; roll out windowed")


class ResidualEmbedding(nn.Module):
    """e(x) = W2 GELU(W1 x) + W1 x."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., dim)."""
        hidden = self.fc1(x)
        return self.fc2(nn.functional.gelu(hidden)) + hidden


class MLPHead(nn.Module):
    """W2 GELU(W1 x)."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., outputs)."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class TokenModel(TrajectoryModel):
    """Base of the token models: embeds a window as tokens, and one step of a roll-out likewise.

    Attribute names are those of the published checkpoints.
    """

    time_before_norm: bool

    def __init__(self, state_dim: int, action_dim: int, dim: int, max_timestep: int, embedding: Embedding) -> None:
        super().__init__()
        embed = ResidualEmbedding if embedding == "mlp" else nn.Linear
        self.embed_timestep = nn.Embedding(max_timestep, dim)
        # As in GPT-2. The published code leaves PyTorch's N(0, 1), which drowns the tokens until it is unlearnt.
        nn.init.normal_(self.embed_timestep.weight, std=0.02)
        self.embed_return = embed(1, dim)
        self.embed_state = embed(state_dim, dim)
        self.embed_action = embed(action_dim, dim)
        self.embed_ln = nn.LayerNorm(dim)

    def embed(self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor) -> Tensor:
        """Tokens of a window                                          (batch, K, 3, dim)"""
        embedded = (self.embed_return(returns), self.embed_state(states), self.embed_action(actions))
        return self._with_time(torch.stack(embedded, dim=2), timesteps)

    def embed_step(self, state: Tensor, returns: Tensor, previous_action: Tensor | None, step: int) -> Tensor:
        """Tokens a_{t-1}, R_t, s_t of one step of a roll-out          (batch, 3, dim), or 2 tokens where t = 0

        state (batch, state_dim), returns (batch, 1), previous_action (batch, action_dim).
        """
        tokens, times = [self.embed_return(returns), self.embed_state(state)], [step, step]
        if step > 0:
            if previous_action is None:
                raise ValueError("previous_action must be given after the first step of a stream")
            tokens, times = [self.embed_action(previous_action), *tokens], [step - 1, *times]
        at = torch.tensor(times, device=state.device).expand(len(state), -1)
        return self._with_time(torch.stack(tokens, dim=1)[:, :, None], at).squeeze(2)

    def _with_time(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Add time embeddings and normalise, in this model's order; tokens (batch, L, slots, dim)."""
        last = self.embed_timestep.num_embeddings - 1
        time = self.embed_timestep(timesteps.clamp(0, last))[:, :, None]
        return self.embed_ln(tokens + time) if self.time_before_norm else self.embed_ln(tokens) + time


def residual_stream(x: Tensor) -> Tensor:
    """Residual streams are kept in fp32, or fp64 in a float64 model."""
    return x if x.dtype == torch.float64 else x.float()


def flatten_steps(x: Tensor) -> Tensor:
    """(batch, K, 3, dim) to (batch, 3K, dim)."""
    return rearrange(x, "b k three d -> b (k three) d")


def split_steps(x: Tensor) -> Tensor:
    """(batch, 3K, dim) to (batch, K, 3, dim)."""
    return rearrange(x, "b (k three) d -> b k three d", three=3)


def token_mask(mask: Tensor | None) -> Tensor | None:
    """The mask of steps (batch, K) as a mask of tokens (batch, 3K)."""
    return None if mask is None else mask.repeat_interleave(3, dim=1)


def step_mixer(mixer: Mamba, tokens: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """Walk a mixer over a few tokens (batch, n, dim), updating its state in place."""
    return torch.cat([mixer.step(tokens[:, i : i + 1], *state)[0] for i in range(tokens.shape[1])], dim=1)


def action_head(dim: int, action_dim: int, *, bounded: bool) -> nn.Sequential:
    """Linear, with tanh where actions are bounded; names as in Decision Transformer's checkpoints."""
    return nn.Sequential(nn.Linear(dim, action_dim), *([nn.Tanh()] if bounded else []))


def check_sizes(config: Any, names: Sequence[str]) -> None:
    """Refuse sizes below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
