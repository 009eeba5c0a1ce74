"""Behaviour cloning: a perceptron from what was last observed to the action, blind to returns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.models.trajectory.common import Prediction, TrajectoryModel, check_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class BehaviourCloningConfig:
    """Sizes; `history` is how many observations the policy sees, together with the actions between them."""

    state_dim: int
    action_dim: int
    discrete_actions: bool = False
    dim: int = 256
    depth: int = 2
    history: int = 1
    context: int = 1
    max_timestep: int = 1000

    def __post_init__(self) -> None:
        check_sizes(self, ("state_dim", "action_dim", "dim", "depth", "history"))
        if self.context < self.history:
            raise ValueError(f"context ({self.context}) must hold the history ({self.history})")


class BehaviourCloning(TrajectoryModel):
    """a_t from s_{t-h+1}, a_{t-h+1}, ..., a_{t-1}, s_t; what lies before the window counts as zero."""

    def __init__(self, config: BehaviourCloningConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.history * config.state_dim + (config.history - 1) * config.action_dim
        layers: list[nn.Module] = []
        for _ in range(config.depth):
            layers += [nn.Linear(inputs, config.dim), nn.ReLU()]
            inputs = config.dim
        layers.append(nn.Linear(inputs, config.action_dim))
        self.layers = nn.Sequential(*layers, *([] if config.discrete_actions else [nn.Tanh()]))

    def forward(
        self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Prediction:
        """Predictions at every step of a window; see `TrajectoryModel.forward`."""
        if mask is not None:
            states, actions = (torch.where(mask[..., None], x, 0.0) for x in (states, actions))
        back = range(self.config.history - 1, -1, -1)
        seen = [delayed(states, steps) for steps in back] + [delayed(actions, steps) for steps in back if steps > 0]
        return Prediction(self.layers(torch.cat(seen, dim=-1)))


def delayed(x: Tensor, steps: int) -> Tensor:
    """x (batch, K, dim), `steps` later, zeros first."""
    return (
        nn.functional.pad(x[:, : x.shape[1] - steps], (0, 0, steps, 0)) if steps < x.shape[1] else torch.zeros_like(x)
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "demo": {},
    "demo-history": {"history": 4, "context": 20},
}
