"""D4RL's flat buffers (Fu et al. 2020, arXiv:2004.07219): one long array per field, cut into episodes here."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmkit.data.episodes import ActionSpace, Episode, EpisodeError, EpisodeSet, Metadata


def segment_buffer(
    buffer: Mapping[str, NDArray[Any]], *, env: str, max_episode_steps: int = 1000, bound: float | None = 1.0
) -> EpisodeSet:
    """Cut a flat buffer into episodes.

    An episode ends at a `terminals` flag or a `timeouts` flag, or, where the buffer has no `timeouts`, at step
    `max_episode_steps`. Steps after the last end belong to no complete episode and are left out (the description counts
    them). The observation after the last step is `next_observations` there, or a repetition of the last observation
    where the buffer has none.

    Args:
        buffer: observations (steps, observation_dim), actions (steps, action_dim), rewards and terminals (steps,), and
            where available timeouts (steps,) and next_observations (steps, observation_dim).
        env: Name kept in the metadata, e.g. "hopper-medium-v2".
        bound: Actions lie in [-bound, bound]; None if they are unbounded.
    """
    missing = {"observations", "actions", "rewards", "terminals"} - set(buffer)
    if missing:
        raise EpisodeError(f"the buffer lacks {', '.join(sorted(missing))}")
    steps = len(buffer["rewards"])
    for name, array in buffer.items():
        if len(array) != steps:
            raise EpisodeError(f"{name} must have {steps} rows, as rewards has, got {len(array)}")
    terminals = np.asarray(buffer["terminals"], bool)
    timeouts = np.asarray(buffer["timeouts"], bool) if "timeouts" in buffer else None
    following = buffer.get("next_observations", buffer["observations"])

    episodes, first = [], 0
    for last in range(steps):
        timed_out = timeouts[last] if timeouts is not None else last - first == max_episode_steps - 1
        if not (terminals[last] or timed_out):
            continue
        span = slice(first, last + 1)
        truncations = np.zeros(last + 1 - first, bool)
        truncations[-1] = not terminals[last]
        observations = np.concatenate([buffer["observations"][span], following[last : last + 1]])
        episodes.append(
            Episode(observations, buffer["actions"][span], buffer["rewards"][span], terminals[span], truncations)
        )
        first = last + 1
    if not episodes:
        raise EpisodeError(f"no episode ends within the buffer's {steps} steps")
    action_dim = buffer["actions"].shape[1]
    metadata = Metadata(
        env=env,
        action_space=ActionSpace(low=(None if bound is None else -bound,) * action_dim, high=(bound,) * action_dim),
        max_episode_steps=max_episode_steps,
        description=f"D4RL flat buffer; {steps - first} steps after the last episode end left out",
    )
    return EpisodeSet.from_episodes(episodes, metadata)


def load_d4rl(path: str | Path, *, env: str, max_episode_steps: int = 1000) -> EpisodeSet:
    """Read a D4RL `.hdf5` file from disk (nothing is downloaded) and cut it into episodes."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError("reading D4RL files needs h5py: pip install h5py") from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no D4RL file at {path}")
    names = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path, "r") as file:
            buffer = {name: file[name][()] for name in names if name in file}
    except OSError as error:
        raise EpisodeError(f"{path} is truncated or corrupt ({error})") from error
    return segment_buffer(buffer, env=env, max_episode_steps=max_episode_steps)
