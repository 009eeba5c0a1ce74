"""Small episode sets for tests."""

import numpy as np

from ssmkit.data import ActionSpace, Episode, EpisodeSet, Metadata


def episode_set(lengths=(5, 1, 9), *, observation_dim=3, action_dim=2, count=0, seed=0) -> EpisodeSet:
    """Random episodes of these lengths; `count` > 0 makes the actions discrete."""
    rng = np.random.default_rng(seed)
    space = ActionSpace(count=count) if count else ActionSpace(low=(-2.0,) * action_dim, high=(2.0,) * action_dim)
    episodes = []
    for steps in lengths:
        actions = rng.integers(count, size=steps) if count else rng.uniform(-2, 2, (steps, action_dim))
        ends = np.zeros(steps, bool)
        ends[-1] = True
        episodes.append(
            Episode(
                rng.standard_normal((steps + 1, observation_dim)).astype(np.float32),
                actions.astype(np.int64 if count else np.float32),
                rng.standard_normal(steps),
                ends,
                np.zeros(steps, bool),
            )
        )
    metadata = Metadata(env="toy", action_space=space, max_episode_steps=max(lengths), seed=seed)
    return EpisodeSet.from_episodes(episodes, metadata)
