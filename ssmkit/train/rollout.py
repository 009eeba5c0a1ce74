"""Roll-outs: a trained model steered by a target return, in an environment of many episodes at once.

*Streaming* carries the model's state from step to step: one update per new token. *Windowed* encodes the last `context`
steps afresh each time, as the published code does. Both see the same while an episode is shorter than the window.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmkit.data import Environment, Scaling
from ssmkit.models.trajectory import TrajectoryModel

Mode = Literal["streaming", "windowed"]


class Agent(Protocol):
    """What `roll_out` asks of a policy."""

    def reset(self, targets: NDArray[np.float64]) -> None:
        """Begin one episode per target return."""
        ...

    def act(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        """One action per episode."""
        ...

    def reward(self, rewards: NDArray[np.float64]) -> None:
        """Be told what the action brought."""
        ...


class ModelAgent:
    """A trajectory model as a policy: scales what it sees, lowers the return-to-go by what it was paid.

    Args:
        mode: "streaming" or "windowed"; by default streaming where the model can.
        faithful_padding: Windowed only: pad short windows on the left with zeros that the model takes for real, as the
            published Mamba code does.
    """

    def __init__(
        self, model: TrajectoryModel, scaling: Scaling, *, mode: Mode | None = None, faithful_padding: bool = False
    ) -> None:
        self.model, self.scaling = model.eval(), scaling
        self.mode: Mode = mode or ("streaming" if model.streams else "windowed")
        if self.mode == "streaming" and faithful_padding:
            raise ValueError("faithful_padding belongs to windowed roll-outs; a stream has no pads")
        self.faithful_padding = faithful_padding
        self.discrete = bool(model.config.discrete_actions)
        self.device = next(model.parameters()).device

    def reset(self, targets: NDArray[np.float64]) -> None:
        """Begin one episode per target return."""
        scaled = torch.as_tensor(targets / self.scaling.return_scale, dtype=torch.float32)
        self.to_go = scaled.to(self.device)[:, None]
        self.previous: Tensor | None = None
        if self.mode == "streaming":
            self.stream = self.model.allocate_stream(len(targets))
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []
        self.steps = 0

    @torch.no_grad()
    def act(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        """One action per episode."""
        states = self.scaling.states(observations).to(self.device)
        if self.mode == "streaming":
            outputs = self.model.step(states, self.to_go, self.previous, self.stream)
        else:
            outputs = self._act_windowed(states)
        actions = self.scaling.environment_actions(outputs.float(), discrete=self.discrete)
        # What the environment was given, not what the model said: the two differ where an action was clipped.
        self.previous = self.scaling.actions(actions, discrete=self.discrete).to(self.device)
        if self.mode == "windowed":
            self.history[-1] = (*self.history[-1][:2], self.previous)
        self.steps += 1
        return actions

    def reward(self, rewards: NDArray[np.float64]) -> None:
        """Lower the return-to-go."""
        paid = torch.as_tensor(rewards / self.scaling.return_scale, dtype=torch.float32)
        self.to_go = self.to_go - paid.to(self.device)[:, None]

    def _act_windowed(self, states: Tensor) -> Tensor:
        """Encode the last steps; the last action of the window is not known yet and is zero."""
        unknown = states.new_zeros(len(states), self.model.config.action_dim)
        self.history = [*self.history, (states, self.to_go, unknown)][-self.model.config.context :]
        state, to_go, action = (torch.stack(column, dim=1) for column in zip(*self.history, strict=True))
        known = len(self.history)
        times = torch.arange(self.steps + 1 - known, self.steps + 1, device=self.device).expand(len(states), -1)
        mask = None
        if self.faithful_padding:
            pads = (self.model.config.context - known, 0)
            state, to_go, action = (torch.nn.functional.pad(x, (0, 0, *pads)) for x in (state, to_go, action))
            times = torch.nn.functional.pad(times, pads)
            if self.model.released_masks_pads:
                mask = torch.arange(times.shape[1], device=self.device).expand_as(times) >= pads[0]
        return self.model(state, action, to_go, times, mask).actions[:, -1]


def roll_out(
    agent: Agent, env: Environment, seeds: Sequence[int], targets: Sequence[float] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """The returns of one episode per seed, each steered by its own target."""
    agent.reset(np.asarray(targets, np.float64))
    observations = env.reset(seeds)
    returns = np.zeros(len(seeds))
    alive = np.ones(len(seeds), bool)
    while alive.any():
        observations, rewards, terminations, truncations = env.step(agent.act(observations))
        agent.reward(rewards)
        returns += rewards * alive
        alive &= ~(terminations | truncations)
    return returns


def returns_at_targets(
    agent: Agent, env: Environment, targets: Sequence[float], *, episodes: int, seed: int = 0
) -> NDArray[np.float64]:
    """Returns of `episodes` episodes per target, (targets, episodes); every target meets the same starts."""
    # Far from the seeds that recorders use by default.
    starts = np.random.default_rng([seed, 20240]).integers(2**31, size=episodes).tolist()
    flat = roll_out(agent, env, starts * len(targets), np.repeat(np.asarray(targets, np.float64), episodes))
    return flat.reshape(len(targets), episodes)
