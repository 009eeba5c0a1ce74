"""Small data for tests: episode sets, a tokenizer."""

import numpy as np
import pytest

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


def save_tokenizer(folder):
    """A tokenizer.json of 300 tokens or fewer: byte-level BPE as GPT-NeoX has, learnt from a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the line and the plain line", "naïve"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
