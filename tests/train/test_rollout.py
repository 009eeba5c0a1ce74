"""Roll-outs: what the policy is shown, that streaming equals windowed, that ended episodes stay ended."""

import numpy as np
import pytest
import torch
from data.factories import episode_set

from ssmkit.data import ActionSpace, PendulumEnvironment, Scaling, Transition, make_environment
from ssmkit.models.trajectory import trajectory_model
from ssmkit.train.rollout import ModelAgent, returns_at_targets, roll_out

SCALING = Scaling(
    state_mean=(0.5, 0.0, -0.5),
    state_std=(2.0, 1.0, 0.5),
    action_centre=(0.0,),
    action_reach=(2.0,),
    return_scale=100.0,
)


def agent(name="decision-mamba", mode=None, context=20, faithful=False, **options):
    torch.manual_seed(0)
    model = trajectory_model(name, None, state_dim=3, action_dim=1, context=context, dim=16, depth=2, **options)
    return ModelAgent(model, SCALING, mode=mode, faithful_padding=faithful)


class Recorder:
    """A task of fixed lengths that remembers the actions it is given."""

    name, options, observation_dim, max_episode_steps = "toy", {}, 3, 9
    action_space = ActionSpace(low=(-2.0,), high=(2.0,))

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def reset(self, seeds):
        self.age, self.actions = 0, []
        self.rng = np.random.default_rng(seeds[0])
        return self.rng.standard_normal((len(seeds), 3)).astype(np.float32)

    def step(self, actions):
        self.actions.append(actions)
        self.age += 1
        ended = self.lengths == self.age
        observations = self.rng.standard_normal((len(self.lengths), 3)).astype(np.float32)
        return Transition(observations, np.full(len(ended), 10.0), ended, np.zeros_like(ended))

    def render(self):
        raise ValueError("no picture")


@pytest.mark.parametrize("name", ["decision-mamba", "ota-decision-mamba"])
def test_streaming_equals_windowed_while_the_window_holds_the_episode(name):
    env = Recorder([8, 8, 8])
    actions = []
    for mode in ("streaming", "windowed"):
        roll_out(agent(name, mode), env, [1, 2, 3], [-100.0, -300.0, 50.0])
        actions.append(np.stack(env.actions))
    np.testing.assert_allclose(*actions, atol=1e-5)
    assert np.abs(actions[0][0, 0] - actions[0][0, 1]).max() > 0


def test_a_short_window_forgets():
    env = Recorder([8, 8])
    long, short = [], []
    for context, kept in ((20, long), (3, short)):
        roll_out(agent("decision-mamba", "windowed", context), env, [1, 2], [-100.0, -300.0])
        kept.append(np.stack(env.actions))
    np.testing.assert_array_equal(long[0][:3], short[0][:3])
    assert (long[0][3:] != short[0][3:]).any()


def test_returns_stop_when_the_episode_does():
    env = Recorder([3, 9, 5])
    returns = roll_out(agent(), env, [1, 2, 3], [0.0] * 3)
    assert returns.tolist() == [30.0, 90.0, 50.0]


def test_what_the_model_is_shown():
    """Scaled states, the executed action, and a return-to-go lowered by what was paid."""
    shown = []

    class Spy(torch.nn.Module):
        streams = True

        class config:
            discrete_actions, action_dim, context = False, 1, 5

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def allocate_stream(self, batch):
            return None

        def step(self, state, to_go, previous, stream):
            shown.append((state, to_go, previous))
            return torch.full((len(state), 1), 1.7)  # beyond the bounds: executed as 1.0

    env = Recorder([3])
    first = env.reset([4])
    roll_out(ModelAgent(Spy(), SCALING), env, [4], [-50.0])
    torch.testing.assert_close(shown[0][0], SCALING.states(first))
    assert [to_go.item() for _, to_go, _ in shown] == pytest.approx([-0.5, -0.6, -0.7])
    assert shown[0][2] is None
    assert [previous.item() for _, _, previous in shown[1:]] == [1.0, 1.0]
    assert all((action == 2.0).all() for action in env.actions)


def test_faithful_padding_feeds_pads_to_mamba_but_not_to_attention():
    for name, same in (("decision-mamba", False), ("decision-transformer", True)):
        actions = []
        for faithful in (False, True):
            env = Recorder([4, 4])
            roll_out(agent(name, "windowed", context=6, faithful=faithful), env, [1, 2], [-100.0, -300.0])
            actions.append(np.stack(env.actions))
        assert np.allclose(*actions, atol=1e-5) is same
    with pytest.raises(ValueError, match="a stream has no pads"):
        agent("decision-mamba", "streaming", faithful=True)


def test_every_target_meets_the_same_starts():
    env = PendulumEnvironment()
    policy = agent("behaviour-cloning")
    returns = returns_at_targets(policy, env, [-100.0, -900.0], episodes=3)
    assert returns.shape == (2, 3)
    # The rows of a batch may be rounded differently, no more.
    np.testing.assert_allclose(returns[0], returns[1], rtol=1e-6)
    assert (returns_at_targets(policy, env, [0.0], episodes=3, seed=1)[0] != returns[0]).all()


def test_discrete_actions_are_choices():
    env = make_environment("CartPole-v1")
    data = episode_set((5, 6), observation_dim=4, count=2)
    torch.manual_seed(0)
    model = trajectory_model("decision-mamba", None, state_dim=4, action_dim=2, discrete_actions=True, dim=16, depth=1)
    for mode in ("streaming", "windowed"):
        returns = roll_out(ModelAgent(model, Scaling.of(data), mode=mode), env, [0, 1], [20.0, 20.0])
        assert (returns >= 8).all()
