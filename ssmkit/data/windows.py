"""Training windows: return-to-go, scaling, and batches that depend on nothing but (seed, step).

Protocol of Decision Transformer (Chen et al. 2021, arXiv:2106.01345): an episode is drawn in proportion to its length,
a start uniformly within it, and up to `context` steps from there are taken. Because batch number `step` is drawn by a
generator seeded with (seed, step, rank), a training that resumes at any step sees what it would have seen.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ssmkit.data.episodes import EpisodeError, EpisodeSet
from ssmkit.data.scores import RETURN_SCALES, reference_name

Padding = Literal["right", "left"]


def returns_to_go(data: EpisodeSet) -> NDArray[np.float64]:
    """R_t = r_t + r_{t+1} + ... to the end of the episode, undiscounted; (steps,)."""
    through = np.cumsum(data.rewards)
    before_episode = np.concatenate([np.zeros(1), through])[data.starts]
    last = np.repeat(before_episode + data.returns, data.lengths)
    return last - through + data.rewards


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Affine maps between an environment's numbers and a model's.

    States are normalised per dimension over the data set; bounded actions are mapped to [-1, 1]; returns are divided by
    `return_scale`.
    """

    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_centre: tuple[float, ...]
    action_reach: tuple[float, ...]
    return_scale: float

    @classmethod
    def of(cls, data: EpisodeSet, return_scale: float | None = None) -> "Scaling":
        """Scaling of a data set; `return_scale` defaults to the published one, or else to the largest |return|."""
        states = data.observations.astype(np.float64)
        space = data.metadata.action_space
        centre, reach = np.zeros(space.dim), np.ones(space.dim)
        if not space.discrete:
            low, high = (np.array([np.nan if v is None else v for v in bound]) for bound in (space.low, space.high))
            low = np.where(np.isnan(low), data.actions.min(axis=0), low)
            high = np.where(np.isnan(high), data.actions.max(axis=0), high)
            centre, reach = (high + low) / 2, np.maximum((high - low) / 2, 1e-6)
        if return_scale is None:
            known = RETURN_SCALES.get(reference_name(data.metadata.env) or "")
            return_scale = known or float(np.abs(data.returns).max()) or 1.0
        if return_scale <= 0:
            raise EpisodeError(f"return_scale must be positive, got {return_scale}")
        return cls(
            state_mean=tuple(states.mean(axis=0).tolist()),
            # 1e-6 as in Decision Transformer's protocol: a constant dimension stays finite.
            state_std=tuple((states.std(axis=0) + 1e-6).tolist()),
            action_centre=tuple(centre.tolist()),
            action_reach=tuple(reach.tolist()),
            return_scale=return_scale,
        )

    def states(self, observations: NDArray[Any]) -> Tensor:
        """Observations as a model sees them, float32."""
        scaled = (observations - np.array(self.state_mean)) / np.array(self.state_std)
        return torch.as_tensor(scaled, dtype=torch.float32)

    def actions(self, actions: NDArray[Any], *, discrete: bool) -> Tensor:
        """Actions as a model sees them: scaled, or one-hot if discrete."""
        if discrete:
            choices = torch.as_tensor(np.asarray(actions, np.int64))
            return torch.nn.functional.one_hot(choices, len(self.action_centre)).float()
        scaled = (actions - np.array(self.action_centre)) / np.array(self.action_reach)
        return torch.as_tensor(scaled, dtype=torch.float32)

    def environment_actions(self, outputs: Tensor, *, discrete: bool) -> NDArray[Any]:
        """A model's outputs as the environment takes them: the likeliest choice, or unscaled and within the bounds."""
        if discrete:
            choices: NDArray[Any] = outputs.argmax(dim=-1).cpu().numpy()
            return choices
        scaled = outputs.detach().clamp(-1, 1).cpu().double().numpy()
        return (scaled * np.array(self.action_reach) + np.array(self.action_centre)).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scaling":
        """The opposite of `to_dict`."""
        vectors: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**vectors)


class TrajectoryBatch(NamedTuple):
    """A batch of windows; `mask` is True at real steps, and every other field is scaled."""

    states: Tensor  # (batch, context, state_dim)
    actions: Tensor  # (batch, context, action_dim), one-hot if discrete
    returns: Tensor  # (batch, context, 1) return-to-go
    timesteps: Tensor  # (batch, context) int64, counted from the start of the episode
    mask: Tensor  # (batch, context) bool
    next_states: Tensor  # (batch, context, state_dim)
    next_returns: Tensor  # (batch, context, 1)


class Windows:
    """Every window of a data set, in a model's numbers, ready to be gathered.

    Pads are zeros, on the right unless `padding` says otherwise. `faithful_padding` gives the left pads the values of
    the published code instead (state 0 before normalisation, action -10), for reproduction only.
    """

    def __init__(
        self,
        data: EpisodeSet,
        scaling: Scaling,
        *,
        context: int,
        padding: Padding = "right",
        faithful_padding: bool = False,
    ) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if padding not in ("right", "left"):
            raise ValueError(f"padding must be 'right' or 'left', got {padding!r}")
        if faithful_padding and padding != "left":
            raise ValueError("faithful_padding reproduces left pads; pass padding='left' with it")
        self.context, self.padding = context, padding
        episode = np.repeat(np.arange(len(data)), data.lengths)
        to_go = torch.as_tensor(returns_to_go(data) / scaling.return_scale, dtype=torch.float32)[:, None]
        last = torch.as_tensor(np.cumsum(data.lengths) - 1)
        next_to_go = torch.cat([to_go[1:], to_go[:1]])
        next_to_go[last] = 0.0
        self.states = scaling.states(data.observations)
        self.actions = scaling.actions(data.actions, discrete=data.metadata.action_space.discrete)
        self.to_go, self.next_to_go = to_go, next_to_go
        self.episode = torch.as_tensor(episode)
        self.first = torch.as_tensor(data.starts)[self.episode]
        self.end = self.first + torch.as_tensor(data.lengths)[self.episode]
        self.pad_state, self.pad_action = torch.zeros(data.observation_dim), 0.0
        if faithful_padding:
            self.pad_state, self.pad_action = scaling.states(np.zeros(data.observation_dim)), -10.0

    def __len__(self) -> int:
        return len(self.first)

    def gather(self, starts: Tensor) -> TrajectoryBatch:
        """The windows that begin at these steps of the concatenated data."""
        step = starts[:, None] + torch.arange(self.context)
        if self.padding == "left":
            step = step - (self.context - (self.end[starts] - starts)).clamp_min(0)[:, None]
        mask = (step >= starts[:, None]) & (step < self.end[starts][:, None])
        step = torch.where(mask, step, starts[:, None])
        state_row = step + self.episode[step]
        real = mask[..., None]
        return TrajectoryBatch(
            states=torch.where(real, self.states[state_row], self.pad_state),
            actions=torch.where(real, self.actions[step], self.pad_action),
            returns=torch.where(real, self.to_go[step], 0.0),
            timesteps=torch.where(mask, step - self.first[step], 0),
            mask=mask,
            next_states=torch.where(real, self.states[state_row + 1], 0.0),
            next_returns=torch.where(real, self.next_to_go[step], 0.0),
        )

    def batch(self, batch_size: int, *, seed: int, step: int, rank: int = 0) -> TrajectoryBatch:
        """Batch number `step`. Episodes by length and starts uniform within them: uniform over all steps."""
        rng = np.random.default_rng([seed, step, rank])
        return self.gather(torch.as_tensor(rng.integers(len(self), size=batch_size)))


class StepBatches(Protocol):
    """What a stream serves: batches that depend on nothing but (seed, step, rank)."""

    def batch(self, batch_size: int, *, seed: int, step: int, rank: int = 0) -> Any:
        """Batch number `step`."""


class WindowStream(IterableDataset[Any]):
    """Batches `first_step`, `first_step + 1`, ... without end; workers take turns, so their number changes nothing."""

    def __init__(self, windows: StepBatches, batch_size: int, *, seed: int, first_step: int = 0, rank: int = 0) -> None:
        self.windows, self.batch_size = windows, batch_size
        self.seed, self.first_step, self.rank = seed, first_step, rank

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        step, stride = self.first_step, 1
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while True:
            yield self.windows.batch(self.batch_size, seed=self.seed, step=step, rank=self.rank)
            step += stride
