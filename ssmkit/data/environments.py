"""Environments that step many episodes at once, and the recorder that turns them into episode sets."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ssmkit.data.episodes import ActionSpace, Episode, EpisodeError, EpisodeSet, Metadata

Observations = NDArray[np.float32]
Policy = Callable[[Observations, np.random.Generator], NDArray[Any]]


class Transition(NamedTuple):
    """What one step of every episode gives, row by row."""

    observations: Observations
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]


class Environment(Protocol):
    """A batch of episodes of one task, stepped together.

    An episode that has ended takes no further part: its action is ignored, its observation stays, its reward is 0 and
    its flags are False.
    """

    name: str
    options: Mapping[str, Any]
    observation_dim: int
    action_space: ActionSpace
    max_episode_steps: int

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode per seed; the same seed starts the same episode."""
        ...

    def step(self, actions: NDArray[Any]) -> Transition:
        """Take one action per episode: (episodes, action_dim) floats, or (episodes,) integers if discrete."""
        ...

    def render(self) -> list[NDArray[np.uint8]]:
        """One RGB picture per episode."""
        ...


class GymnasiumEnvironment:
    """Any Gymnasium environment with a Box or Discrete action space; observations are flattened to vectors."""

    def __init__(self, env: str, *, max_episode_steps: int | None = None, **options: Any) -> None:
        self.gymnasium = import_gymnasium()
        self.name = env
        self.options: Mapping[str, Any] = options
        try:
            first = self.gymnasium.make(env, **options)
        except self.gymnasium.error.Error as error:
            raise ValueError(f"Gymnasium cannot make {env!r}: {error}") from error
        self.envs = [first]
        self.action_space = action_space_of(first.action_space)
        self.observation_dim = int(np.prod(self.gymnasium.spaces.flatten_space(first.observation_space).shape))
        limit = max_episode_steps or getattr(first.spec, "max_episode_steps", None)
        if limit is None:
            raise ValueError(f"{env} sets no limit of steps per episode; pass max_episode_steps")
        self.max_episode_steps: int = limit
        self.alive = np.zeros(0, bool)

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode per seed; environments are made as they are needed."""
        while len(self.envs) < len(seeds):
            self.envs.append(self.gymnasium.make(self.name, **self.options))
        self.alive, self.age = np.ones(len(seeds), bool), 0
        self.observations = np.zeros((len(seeds), self.observation_dim), np.float32)
        for row, seed in enumerate(seeds):
            observation, _ = self.envs[row].reset(seed=int(seed))
            self.observations[row] = self.flatten(observation)
        return self.observations.copy()

    def step(self, actions: NDArray[Any]) -> Transition:
        """Step every episode that has not ended."""
        rewards, terminations, truncations = (np.zeros(len(self.alive), t) for t in (np.float64, bool, bool))
        self.age += 1
        for row in np.flatnonzero(self.alive):
            observation, reward, terminated, truncated, _ = self.envs[row].step(self.native_action(actions[row]))
            self.observations[row] = self.flatten(observation)
            rewards[row], terminations[row] = reward, terminated
            truncations[row] = not terminated and (truncated or self.age >= self.max_episode_steps)
        self.alive = self.alive & ~(terminations | truncations)
        return Transition(self.observations.copy(), rewards, terminations, truncations)

    def render(self) -> list[NDArray[np.uint8]]:
        """One RGB picture per episode; the environment must have been made with render_mode='rgb_array'."""
        if self.options.get("render_mode") != "rgb_array":
            raise ValueError("pictures need an environment made with render_mode='rgb_array'")
        return [np.asarray(self.envs[row].render()) for row in range(len(self.alive))]

    def flatten(self, observation: Any) -> NDArray[Any]:
        """An observation of any space as one vector."""
        return np.asarray(self.gymnasium.spaces.flatten(self.envs[0].observation_space, observation))

    def native_action(self, action: Any) -> Any:
        """The model's action as this environment takes it: clipped to the bounds, or one of the choices."""
        space = self.envs[0].action_space
        if self.action_space.discrete:
            return int(action) + int(space.start)
        return np.clip(np.asarray(action, space.dtype).reshape(space.shape), space.low, space.high)


def import_gymnasium() -> Any:
    """Gymnasium, or an error that says how to get it."""
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ImportError("this needs Gymnasium: pip install 'ssmkit[trajectory]'") from error


def action_space_of(space: Any) -> ActionSpace:
    """Gymnasium's action space as ours; refused where it is neither Box nor Discrete."""
    spaces = import_gymnasium().spaces
    if isinstance(space, spaces.Discrete):
        return ActionSpace(count=int(space.n))
    if isinstance(space, spaces.Box):
        low, high = (
            tuple(float(v) if np.isfinite(v) else None for v in np.ravel(bound)) for bound in (space.low, space.high)
        )
        return ActionSpace(low=low, high=high)
    raise ValueError(f"action space {space} is not supported; wrap the environment so that it is a Box or Discrete")


def random_policy(space: ActionSpace) -> Policy:
    """Uniform actions within the bounds (standard normal where unbounded)."""

    def act(observations: Observations, rng: np.random.Generator) -> NDArray[Any]:
        if space.discrete:
            return rng.integers(space.count, size=len(observations))
        low, high = (np.array([np.nan if v is None else v for v in bound]) for bound in (space.low, space.high))
        shape = (len(observations), space.dim)
        bounded = np.isfinite(low) & np.isfinite(high)
        uniform = rng.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0), shape)
        return np.where(bounded, uniform, rng.standard_normal(shape)).astype(np.float32)

    return act


def record_episodes(
    env: Environment, policy: Policy, seeds: Sequence[int], *, description: str = "", parallel: int = 64
) -> EpisodeSet:
    """Roll `policy` out once per seed and keep everything.

    Args:
        policy: Maps observations (episodes, observation_dim) and a random generator to one action per episode.
        seeds: One per episode; together with the policy they fix the data.
        parallel: Episodes stepped together.
    """
    episodes: list[Episode] = []
    for first in range(0, len(seeds), parallel):
        group = list(seeds[first : first + parallel])
        episodes += record_group(env, policy, group, np.random.default_rng([group[0], len(group)]))
    metadata = Metadata(
        env=env.name,
        env_options=dict(env.options),
        action_space=env.action_space,
        max_episode_steps=env.max_episode_steps,
        description=description,
        seed=int(seeds[0]) if seeds else None,
    )
    return EpisodeSet.from_episodes(episodes, metadata)


def record_group(env: Environment, policy: Policy, seeds: Sequence[int], rng: np.random.Generator) -> list[Episode]:
    """Episodes of one group of seeds, stepped together until the last has ended."""
    observations = [env.reset(seeds)]
    actions: list[NDArray[Any]] = []
    transitions: list[Transition] = []
    alive = np.ones(len(seeds), bool)
    while alive.any():
        action = np.asarray(policy(observations[-1], rng))
        if len(action) != len(seeds):
            raise EpisodeError(f"the policy must give one action per episode ({len(seeds)}), got shape {action.shape}")
        actions.append(action)
        transitions.append(env.step(action))
        observations.append(transitions[-1].observations)
        alive &= ~(transitions[-1].terminations | transitions[-1].truncations)
    stacked = Transition(*(np.stack(column) for column in zip(*transitions, strict=True)))
    ends = (stacked.terminations | stacked.truncations).argmax(axis=0) + 1
    all_observations, all_actions = np.stack(observations), np.stack(actions)
    return [
        Episode(
            all_observations[: end + 1, row],
            all_actions[:end, row],
            stacked.rewards[:end, row],
            stacked.terminations[:end, row],
            stacked.truncations[:end, row],
        )
        for row, end in enumerate(ends)
    ]


def make_environment(name: str, **options: Any) -> Environment:
    """A built-in task ("pendulum", "pendulum-velocity-hidden") or any Gymnasium id."""
    from ssmkit.data.pendulum import TASKS, PendulumEnvironment

    if name in TASKS:
        return PendulumEnvironment(name)
    return GymnasiumEnvironment(name, **options)
