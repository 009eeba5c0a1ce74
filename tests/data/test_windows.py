"""Windows: return-to-go, alignment, pads, scaling, and batches that depend on (seed, step) alone."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from data.factories import episode_set
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ssmkit.data import Scaling, Windows, WindowStream, returns_to_go


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 99))
def test_return_to_go_is_the_suffix_sum_of_each_episode(lengths, seed):
    data = episode_set(tuple(lengths), seed=seed)
    expected = np.concatenate([np.cumsum(episode.rewards[::-1])[::-1] for episode in data])
    np.testing.assert_allclose(returns_to_go(data), expected, atol=1e-12)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("count", [0, 4], ids=["continuous", "discrete"])
def test_every_window_holds_its_episode_from_its_start(padding, count):
    data = episode_set((5, 1, 9), count=count)
    scaling = Scaling.of(data)
    batch = Windows(data, scaling, context=4, padding=padding).gather(torch.arange(data.steps))
    row = 0
    for episode in data:
        to_go = np.append(np.cumsum(episode.rewards[::-1])[::-1], 0.0) / scaling.return_scale
        for start in range(len(episode)):
            steps = range(start, min(start + 4, len(episode)))
            real = slice(0, len(steps)) if padding == "right" else slice(4 - len(steps), 4)
            mask = torch.zeros(4, dtype=torch.bool)
            mask[real] = True
            assert torch.equal(batch.mask[row], mask)
            assert batch.timesteps[row, real].tolist() == list(steps)
            states = scaling.states(episode.observations)
            assert torch.equal(batch.states[row, real], states[steps])
            assert torch.equal(batch.next_states[row, real], states[[t + 1 for t in steps]])
            actions = scaling.actions(episode.actions, discrete=bool(count))
            assert torch.equal(batch.actions[row, real], actions[steps])
            torch.testing.assert_close(batch.returns[row, real, 0], torch.tensor(to_go[steps]).float())
            next_to_go = torch.tensor(to_go[[t + 1 for t in steps]]).float()
            torch.testing.assert_close(batch.next_returns[row, real, 0], next_to_go, atol=1e-6, rtol=1e-6)
            for name in ("states", "actions", "returns", "next_states", "next_returns"):
                assert (getattr(batch, name)[row][~mask] == 0).all(), name
            row += 1
    assert row == data.steps


def test_faithful_pads_are_those_of_the_published_code():
    data = episode_set((2,))
    scaling = Scaling.of(data)
    batch = Windows(data, scaling, context=4, padding="left", faithful_padding=True).gather(torch.tensor([0]))
    pad_state = -torch.tensor(scaling.state_mean) / torch.tensor(scaling.state_std)
    torch.testing.assert_close(batch.states[0, :2], pad_state.expand(2, -1))
    assert (batch.actions[0, :2] == -10).all()
    assert (batch.returns[0, :2] == 0).all()


def test_batches_depend_on_seed_step_and_rank_alone():
    data = episode_set((30, 20))
    windows = Windows(data, Scaling.of(data), context=6)
    one = windows.batch(8, seed=3, step=17)
    windows.batch(8, seed=3, step=18)
    for again, expected in zip(windows.batch(8, seed=3, step=17), one, strict=True):
        assert torch.equal(again, expected)
    for other in ({"step": 18}, {"seed": 4}, {"rank": 1}):
        assert not torch.equal(windows.batch(8, **{"seed": 3, "step": 17, **other}).states, one.states)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_is_told_to(workers):
    data = episode_set((30, 20))
    windows = Windows(data, Scaling.of(data), context=6)

    def states(first, count):
        stream = WindowStream(windows, 4, seed=0, first_step=first)
        return [
            batch.states for batch in itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count)
        ]

    for resumed, whole in zip(states(3, 3), states(0, 6)[3:], strict=True):
        assert torch.equal(resumed, whole)


def test_starts_are_uniform_over_all_steps():
    data = episode_set((30, 10))
    windows = Windows(data, Scaling.of(data), context=1)
    drawn = torch.cat([windows.batch(1000, seed=0, step=step).timesteps[:, 0] for step in range(8)])
    # 8000 draws over 40 steps; steps 0..9 exist in both episodes.
    counts = torch.bincount(drawn, minlength=30)
    expected = torch.tensor([400.0] * 10 + [200.0] * 20)
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_scaling_there_and_back():
    data = episode_set((20,), action_dim=2)
    scaling = Scaling.from_dict(Scaling.of(data).to_dict())
    assert scaling == Scaling.of(data)
    states = scaling.states(data.observations)
    torch.testing.assert_close(states.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    scaled = scaling.actions(data.actions, discrete=False)
    assert scaled.abs().max() <= 1
    np.testing.assert_allclose(scaling.environment_actions(scaled, discrete=False), data.actions, rtol=1e-6)
    assert (scaling.environment_actions(torch.full((1, 2), 9.0), discrete=False) == 2).all()
    assert scaling.environment_actions(torch.tensor([[0.1, 3.0, 0.2]]), discrete=True).tolist() == [1]


def test_published_return_scales_are_used_where_they_exist():
    data = episode_set((20,))
    assert Scaling.of(data).return_scale == pytest.approx(np.abs(data.returns).max())
    hopper = dataclasses.replace(data, metadata=dataclasses.replace(data.metadata, env="Hopper-v5"))
    assert Scaling.of(hopper).return_scale == 1000.0
    assert Scaling.of(hopper, return_scale=7.0).return_scale == 7.0


BAD = {
    "no step": ({"context": 0}, "context must be at least 1"),
    "an unknown side": ({"context": 3, "padding": "middle"}, "padding must be 'right' or 'left', got 'middle'"),
    "faithful on the right": ({"context": 3, "faithful_padding": True}, "pass padding='left'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(options, message):
    data = episode_set()
    with pytest.raises(ValueError, match=message):
        Windows(data, Scaling.of(data), **options)
    with pytest.raises(ValueError, match="return_scale must be positive"):
        Scaling.of(data, return_scale=-1.0)
