"""Episode files: what is written is read back, what is damaged is refused, nothing is left half written."""

import json

import numpy as np
import pytest
from data.factories import episode_set

from ssmkit.data import ActionSpace, Episode, EpisodeError, EpisodeSet, atomic_write, load_episodes, save_episodes
from ssmkit.data.episodes import ARRAYS

FIELDS = (*ARRAYS, "lengths")


@pytest.mark.parametrize("count", [0, 4], ids=["continuous", "discrete"])
def test_a_file_gives_back_what_was_saved(tmp_path, count):
    data = episode_set(count=count)
    loaded = load_episodes(save_episodes(data, tmp_path / "a.npz"))
    for name in FIELDS:
        actual, expected = getattr(loaded, name), getattr(data, name)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    assert loaded.metadata == data.metadata


def test_episodes_are_cut_from_the_concatenation():
    data = episode_set((5, 1, 9))
    assert [len(episode) for episode in data] == [5, 1, 9]
    assert [len(episode.observations) for episode in data] == [6, 2, 10]
    np.testing.assert_array_equal(np.concatenate([e.observations for e in data]), data.observations)
    np.testing.assert_allclose(data.returns, [e.total_return for e in data])
    np.testing.assert_array_equal(data[-1].rewards, data[2].rewards)
    with pytest.raises(IndexError, match="episode 3 of 3"):
        data[3]


def test_best_keeps_the_highest_returns():
    data = episode_set((3,) * 10)
    best = data.best(0.3)
    assert sorted(best.returns) == sorted(data.returns)[-3:]
    assert len(data.best(0.001)) == 1
    with pytest.raises(EpisodeError, match="fraction must lie in"):
        data.best(0.0)


def rewrite(path, **changes):
    """The file with some arrays replaced; None removes one."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def with_metadata(**changes):
    def change(path):
        with np.load(path) as archive:
            values = json.loads(str(archive["metadata"]))
        rewrite(path, metadata=np.array(json.dumps({**values, **changes})))

    return change


def with_nan(path):
    with np.load(path) as archive:
        rewards = archive["rewards"].copy()
    rewards[7] = np.nan
    rewrite(path, rewards=rewards)


def cut(fraction):
    def change(path):
        path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])

    return change


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


BAD_FILES = {
    "cut in the middle": (cut(0.5), "truncated or corrupt"),
    "empty": (cut(0.0), "truncated or corrupt"),
    "a flipped byte": (flip_a_byte, "truncated or corrupt"),
    "text": (lambda path: path.write_text("not an archive"), "truncated or corrupt"),
    "a missing array": (lambda path: rewrite(path, rewards=None), "lacks rewards"),
    "a newer version": (with_metadata(version=99), "version 99, this ssmkit reads 'ssmkit episodes' version 1"),
    "another format": (with_metadata(format="other"), "'other'"),
    "metadata without a field": (with_metadata(action_space={}), "lacks a field"),
    "metadata that is no JSON": (lambda path: rewrite(path, metadata=np.array("{")), "metadata is not that of"),
    "too few actions": (
        lambda path: rewrite(path, actions=np.zeros((3, 2), np.float32)),
        r"actions must have shape \(15, 2\), got \(3, 2\)",
    ),
    "a wrong action width": (
        lambda path: rewrite(path, actions=np.zeros((15, 3), np.float32)),
        r"actions must have shape \(15, 2\), got \(15, 3\)",
    ),
    "an observation missing": (
        lambda path: rewrite(path, observations=np.zeros((15, 3), np.float32)),
        r"observations must have shape \(18, 3\), got \(15, 3\)",
    ),
    "flat observations": (
        lambda path: rewrite(path, observations=np.zeros(18, np.float32)),
        r"observations must have shape \(18, observation_dim\), got \(18,\)",
    ),
    "a length of zero": (lambda path: rewrite(path, lengths=np.array([5, 0, 10])), "positive integers"),
    "no episode": (lambda path: rewrite(path, lengths=np.zeros(0, np.int64)), "positive integers"),
    "not a number": (with_nan, "rewards has a value that is not finite, first in row 7"),
    "integers for actions": (
        lambda path: rewrite(path, actions=np.zeros((15, 2), np.int64)),
        "actions must be floats, got int64",
    ),
    "numbers for flags": (
        lambda path: rewrite(path, terminations=np.zeros(15)),
        "terminations must be bool, got float64",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    path = save_episodes(episode_set((5, 1, 9)), tmp_path / "a.npz")
    damage(path)
    with pytest.raises(EpisodeError, match=message) as caught:
        load_episodes(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="ssmkit record"):
        load_episodes(tmp_path / "none.npz")


def test_a_wrong_suffix_is_refused(tmp_path):
    with pytest.raises(EpisodeError, match=r"ends in \.npz"):
        save_episodes(episode_set(), tmp_path / "a.dat")


def test_discrete_actions_outside_the_space_are_refused():
    data = episode_set(count=3)
    with pytest.raises(EpisodeError, match=r"actions must lie in 0\.\.2, got 0\.\.7"):
        EpisodeSet(
            data.observations,
            np.where(np.arange(15) == 4, 7, 0),
            data.rewards,
            data.terminations,
            data.truncations,
            data.lengths,
            data.metadata,
        )


def test_an_interrupted_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"before")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


BAD_EPISODES = {
    "no step": ((1, 0, 0, 0, 0), "at least one step"),
    "as many observations as steps": ((4, 4, 4, 4, 4), "observations must have 5 rows"),
    "an action short": ((5, 3, 4, 4, 4), "actions must have 4 rows, as rewards has, got 3"),
    "a flag short": ((5, 4, 4, 4, 3), "truncations must have 4 rows"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_EPISODES.values(), ids=BAD_EPISODES)
def test_an_episode_whose_rows_do_not_fit_is_refused(rows, message):
    observations, actions, rewards, terminations, truncations = rows
    with pytest.raises(EpisodeError, match=message):
        Episode(
            np.zeros((observations, 2), np.float32),
            np.zeros((actions, 1), np.float32),
            np.zeros(rewards),
            np.zeros(terminations, bool),
            np.zeros(truncations, bool),
        )


def test_an_action_space_is_either_bounded_or_counted():
    with pytest.raises(EpisodeError, match="either count"):
        ActionSpace()
    with pytest.raises(EpisodeError, match="either count"):
        ActionSpace(low=(0.0,), high=(1.0,), count=2)
    with pytest.raises(EpisodeError, match="low has 1 entries, high has 2"):
        ActionSpace(low=(0.0,), high=(1.0, 2.0))
