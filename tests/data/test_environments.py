"""Recorders and environments: Pendulum equals Gymnasium's, any environment records, Minari keeps everything."""

import numpy as np
import pytest

from ssmkit.data import (
    EpisodeError,
    GymnasiumEnvironment,
    PendulumEnvironment,
    make_environment,
    random_policy,
    read_minari,
    record_episodes,
    record_pendulum,
    write_minari,
)
from ssmkit.data.episodes import ARRAYS
from ssmkit.data.pendulum import STEPS, expert_torque

gymnasium = pytest.importorskip("gymnasium")


def test_pendulum_is_gymnasiums():
    ours, theirs = PendulumEnvironment(), GymnasiumEnvironment("Pendulum-v1")
    seeds = [0, 7, 123456]
    np.testing.assert_array_equal(ours.reset(seeds), theirs.reset(seeds))
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        actions = rng.uniform(-2.5, 2.5, (3, 1)).astype(np.float32)
        mine, reference = ours.step(actions), theirs.step(actions)
        np.testing.assert_array_equal(mine.observations, reference.observations)
        # u^2 is rounded in float32 by Gymnasium: 0.001 * 4 * eps.
        np.testing.assert_allclose(mine.rewards, reference.rewards, rtol=0, atol=0.001 * 4 * 1.2e-7)
        np.testing.assert_array_equal(mine.terminations, reference.terminations)
        np.testing.assert_array_equal(mine.truncations, reference.truncations)
    assert mine.truncations.all()
    assert (ours.step(actions).rewards == 0).all()


def test_the_hidden_task_hides_the_velocity_alone():
    full, hidden = (record_pendulum(task, episodes=5) for task in ("pendulum", "pendulum-velocity-hidden"))
    assert (full.observation_dim, hidden.observation_dim) == (3, 2)
    np.testing.assert_array_equal(full.observations[:, :2], hidden.observations)
    np.testing.assert_array_equal(full.rewards, hidden.rewards)


def test_the_behaviour_is_of_mixed_quality_and_fixed_by_its_seed():
    data, again, other = (record_pendulum(episodes=100, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(data.observations, again.observations)
    assert not np.array_equal(data.observations, other.observations)
    low, high = np.percentile(data.returns, [25, 75])
    assert low < -600 < -250 < high
    env = PendulumEnvironment()

    def expert(observations, rng):
        return expert_torque(env.theta, env.velocity)[:, None]

    assert record_episodes(env, expert, range(50)).returns.mean() > data.returns.mean() + 200


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "MountainCarContinuous-v0"])
def test_any_gymnasium_environment_records(env):
    environment = make_environment(env)
    act = random_policy(environment.action_space)
    data = record_episodes(environment, act, range(3), parallel=2)
    again = record_episodes(make_environment(env), act, range(3), parallel=2)
    np.testing.assert_array_equal(data.observations, again.observations)
    assert len(data) == 3
    for episode in data:
        ends = episode.terminations | episode.truncations
        assert ends[-1]
        assert not ends[:-1].any()


def test_episodes_that_ended_take_no_further_part():
    """Recorded together or alone, an episode is the same."""

    def lean(observations, rng):
        return (observations[:, 2] > 0).astype(np.int64)

    together = record_episodes(make_environment("CartPole-v1"), lean, [1, 2, 3])
    for index, seed in enumerate([1, 2, 3]):
        alone = record_episodes(make_environment("CartPole-v1"), lean, [seed])
        np.testing.assert_array_equal(together[index].observations, alone[0].observations)
        np.testing.assert_array_equal(together[index].rewards, alone[0].rewards)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="cannot make 'Nowhere-v0'"):
        make_environment("Nowhere-v0")
    with pytest.raises(ValueError, match="unknown pendulum task"):
        PendulumEnvironment("double")
    with pytest.raises(EpisodeError, match="one action per episode"):
        record_episodes(PendulumEnvironment(), lambda o, r: np.zeros((1, 1)), [1, 2])
    env = make_environment("CartPole-v1")
    env.reset([0])
    with pytest.raises(ValueError, match="render_mode='rgb_array'"):
        env.render()


def test_pendulum_draws_itself_without_a_display():
    env = PendulumEnvironment()
    env.reset([0, 1])
    env.step(np.array([[2.0], [-1.0]]))
    first, second = env.render()
    assert first.shape == (160, 160, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_minari_keeps_everything(env, tmp_path, monkeypatch):
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    environment = make_environment(env)
    data = record_episodes(environment, random_policy(environment.action_space), range(4))
    write_minari(data, "toy/random-v0")
    loaded = read_minari("toy/random-v0")
    for name in (*ARRAYS, "lengths"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(data, name), err_msg=name)
    assert loaded.metadata.env == env
    assert loaded.metadata.action_space == data.metadata.action_space
    assert loaded.metadata.max_episode_steps == data.metadata.max_episode_steps
    with pytest.raises(EpisodeError, match="Minari refused to write"):
        write_minari(data, "toy/random-v0")
    with pytest.raises(FileNotFoundError, match="minari download toy/other-v0"):
        read_minari("toy/other-v0")


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'ssmkit\[trajectory\]'"):
        read_minari("toy/random-v0")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'ssmkit\[trajectory\]'"):
        make_environment("CartPole-v1")
