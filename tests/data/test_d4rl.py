"""D4RL's flat buffers: where episodes end, what their last observation is, what is left out."""

import numpy as np
import pytest

from ssmkit.data import EpisodeError, load_d4rl, segment_buffer


def buffer(steps=12, *, terminals=(), timeouts=None, following=True):
    rng = np.random.default_rng(0)
    flags = np.zeros(steps, bool)
    flags[list(terminals)] = True
    made = {
        "observations": rng.standard_normal((steps, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": flags,
    }
    if timeouts is not None:
        made["timeouts"] = np.isin(np.arange(steps), timeouts)
    if following:
        made["next_observations"] = rng.standard_normal((steps, 3)).astype(np.float32)
    return made


def test_episodes_end_at_terminals_and_timeouts():
    flat = buffer(terminals=[3], timeouts=[8])
    data = segment_buffer(flat, env="hopper-medium-v2")
    assert data.lengths.tolist() == [4, 5]
    assert data[0].terminations.tolist() == [False, False, False, True]
    assert not data[0].truncations.any()
    assert data[1].truncations.tolist() == [False] * 4 + [True]
    np.testing.assert_array_equal(data[1].observations[:-1], flat["observations"][4:9])
    np.testing.assert_array_equal(data[1].observations[-1], flat["next_observations"][8])
    assert data[1].rewards.tolist() == [4, 5, 6, 7, 8]
    assert "3 steps after the last episode end left out" in data.metadata.description


def test_without_timeouts_episodes_end_at_the_limit():
    data = segment_buffer(buffer(terminals=[2]), env="x", max_episode_steps=4)
    assert data.lengths.tolist() == [3, 4, 4]
    assert data[1].truncations[-1]


def test_without_next_observations_the_last_one_is_repeated():
    data = segment_buffer(buffer(terminals=[3], timeouts=[], following=False), env="x")
    np.testing.assert_array_equal(data[0].observations[-1], data[0].observations[-2])


def test_bad_buffers_are_refused():
    with pytest.raises(EpisodeError, match="lacks actions, rewards"):
        segment_buffer({"observations": np.zeros((3, 1)), "terminals": np.zeros(3)}, env="x")
    with pytest.raises(EpisodeError, match="no episode ends within the buffer's 12 steps"):
        segment_buffer(buffer(timeouts=[]), env="x")
    with pytest.raises(EpisodeError, match="terminals must have 12 rows, as rewards has, got 5"):
        segment_buffer({**buffer(), "terminals": np.zeros(5, bool)}, env="x")


def test_an_hdf5_file_is_read_and_a_damaged_one_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "hopper.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in buffer(terminals=[3], timeouts=[8]).items():
            file[name] = array
    assert load_d4rl(path, env="hopper-medium-v2").lengths.tolist() == [4, 5]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EpisodeError, match="truncated or corrupt"):
        load_d4rl(path, env="hopper-medium-v2")
    with pytest.raises(FileNotFoundError, match="no D4RL file"):
        load_d4rl(tmp_path / "none.hdf5", env="x")
