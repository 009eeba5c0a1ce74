"""Minari data sets: read as episode sets, and written from them."""

import importlib
import warnings
from typing import Any

import numpy as np

from ssmkit.data.environments import action_space_of, import_gymnasium
from ssmkit.data.episodes import Episode, EpisodeError, EpisodeSet, Metadata


def import_minari() -> Any:
    """Minari, or an error that says how to get it."""
    try:
        return importlib.import_module("minari")
    except ImportError as error:
        raise ImportError("this needs Minari: pip install 'ssmkit[trajectory]' or 'minari[hdf5,create]'") from error


def read_minari(dataset_id: str, *, download: bool = False) -> EpisodeSet:
    """A Minari data set by its id, e.g. "mujoco/hopper/expert-v0"; fetched first if `download` and not yet on disk."""
    minari, spaces = import_minari(), import_gymnasium().spaces
    try:
        dataset = minari.load_dataset(dataset_id, download=download)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no Minari data set {dataset_id!r} on this machine; fetch it with `minari download {dataset_id}`"
        ) from error
    spec = dataset.spec.env_spec
    space = action_space_of(dataset.spec.action_space)
    start = int(getattr(dataset.spec.action_space, "start", 0))
    episodes = []
    for stored in dataset.iterate_episodes():
        rows = len(stored.rewards) + 1
        observations = flat_rows(spaces, dataset.spec.observation_space, stored.observations, rows)
        actions = np.asarray(stored.actions)
        actions = actions.reshape(-1) - start if space.discrete else actions.reshape(rows - 1, -1)
        ends = (np.asarray(flags, bool) for flags in (stored.terminations, stored.truncations))
        episodes.append(Episode(observations, actions, np.asarray(stored.rewards), *ends))
    longest = max((len(episode) for episode in episodes), default=1)
    metadata = Metadata(
        env=spec.id if spec is not None else dataset_id,
        env_options=dict(spec.kwargs) if spec is not None else {},
        action_space=space,
        max_episode_steps=(spec.max_episode_steps if spec is not None else None) or longest,
        description=f"Minari {dataset_id}",
    )
    return EpisodeSet.from_episodes(episodes, metadata)


def flat_rows(spaces: Any, space: Any, observations: Any, rows: int) -> np.ndarray:
    """Stored observations, array or nested dict and tuple of arrays, as (rows, observation_dim)."""
    if isinstance(space, spaces.Box):
        return np.asarray(observations).reshape(rows, -1)

    def row(node: Any, index: int) -> Any:
        if isinstance(node, dict):
            return {name: row(child, index) for name, child in node.items()}
        if isinstance(node, tuple):
            return tuple(row(child, index) for child in node)
        return node[index]

    return np.stack([spaces.flatten(space, row(observations, index)) for index in range(rows)])


def write_minari(data: EpisodeSet, dataset_id: str, *, author: str = "", description: str = "") -> Any:
    """Write an episode set as the Minari data set `dataset_id` (e.g. "pendulum/mixed-v0") and return it.

    Minari stores under MINARI_DATASETS_PATH, by default in the home directory; an existing id is refused.
    """
    minari, spaces = import_minari(), import_gymnasium().spaces
    buffer_type = importlib.import_module("minari.data_collector.episode_buffer").EpisodeBuffer
    buffers = [
        buffer_type(
            id=index,
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards.tolist(),
            terminations=episode.terminations.tolist(),
            truncations=episode.truncations.tolist(),
            infos={},
        )
        for index, episode in enumerate(data)
    ]
    space = data.metadata.action_space
    if space.discrete:
        action_space = spaces.Discrete(space.count)
    else:
        low, high = (
            np.array([default if v is None else v for v in bound], np.float32)
            for bound, default in ((space.low, -np.inf), (space.high, np.inf))
        )
        action_space = spaces.Box(low, high, dtype=np.float32)
    known: dict[str, Any] = {"env": data.metadata.env} if data.metadata.env in import_gymnasium().registry else {}
    if author:
        known["author"] = author
    with warnings.catch_warnings():
        # Minari recommends fields that are not known here.
        warnings.filterwarnings("ignore", message=".* is set to None|env_spec is None", category=UserWarning)
        try:
            return minari.create_dataset_from_buffers(
                dataset_id=dataset_id,
                buffer=buffers,
                action_space=action_space,
                observation_space=spaces.Box(-np.inf, np.inf, (data.observation_dim,), np.float32),
                description=description or data.metadata.description,
                data_format="hdf5",
                **known,
            )
        except (ValueError, AssertionError) as error:
            raise EpisodeError(f"Minari refused to write {dataset_id!r}: {error}") from error
