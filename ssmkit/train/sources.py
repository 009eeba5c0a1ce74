"""Where trajectories come from: a file, a Minari data set, or an environment to be recorded."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmkit.data import (
    EpisodeError,
    EpisodeSet,
    load_d4rl,
    load_episodes,
    make_environment,
    random_policy,
    read_minari,
    record_episodes,
    record_pendulum,
)
from ssmkit.data.environments import Policy
from ssmkit.data.pendulum import TASKS

SOURCES = (
    "an episode file (.npz), a D4RL file (.hdf5, with --env), a Minari data set on this machine (minari:ID), a built-in"
    f" task ({', '.join(TASKS)}) or any Gymnasium id"
)


def open_source(
    source: str, *, episodes: int = 400, seed: int = 0, policy: str | None = None, env: str | None = None
) -> EpisodeSet:
    """The trajectories of `source`, recorded now if it names an environment.

    Args:
        source: See SOURCES.
        episodes, seed: How many to record, and the seed that fixes them.
        policy: Who acts while recording: "random", or "module:function" of a function that makes a `Policy` from the
            environment. By default built-in tasks use their scripted behaviour, others act at random.
        env: Environment name of a D4RL file.
    """
    if source.startswith("minari:"):
        return read_minari(source.removeprefix("minari:"))
    if source.endswith(".npz"):
        return load_episodes(source)
    if source.endswith((".hdf5", ".h5")):
        if env is None:
            raise EpisodeError(
                f"{source}: a D4RL file does not name its environment; pass --env, e.g. hopper-medium-v2"
            )
        return load_d4rl(source, env=env)
    if Path(source).suffix in (".pkl", ".csv", ".json", ".pt"):
        raise EpisodeError(f"{source} is not a known source of trajectories; give {SOURCES}")
    if source in TASKS and policy is None:
        return record_pendulum(source, episodes=episodes, seed=seed)
    environment = make_environment(source)
    act = random_policy(environment.action_space) if policy in (None, "random") else load_policy(policy)(environment)
    first = seed * 1_000_003
    who = policy or "random"
    return record_episodes(environment, act, range(first, first + episodes), description=f"actions by {who}")


def load_policy(name: str | None) -> Callable[[Any], Policy]:
    """The function "module:function", which makes a policy from an environment."""
    module, _, function = (name or "").partition(":")
    if not function:
        raise ValueError(f"policy must be 'random' or 'module:function', got {name!r}")
    try:
        made: Callable[[Any], Policy] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the policy {name!r}: {error}") from error
    return made


def summary(data: EpisodeSet) -> str:
    """A few lines about an episode set."""
    returns = sorted(data.returns)
    quantiles = ", ".join(
        f"{label} {returns[round(fraction * (len(returns) - 1))]:.1f}"
        for label, fraction in (("least", 0.0), ("median", 0.5), ("90th percentile", 0.9), ("most", 1.0))
    )
    space = data.metadata.action_space
    actions = f"one of {space.count}" if space.discrete else f"{space.dim} numbers"
    return (
        f"{data.metadata.env}: {len(data)} episodes, {data.steps} steps; observations of {data.observation_dim} numbers, "
        f"actions {actions}\nreturns: mean {data.returns.mean():.1f}, {quantiles}"
    )
