"""The objective: masked means, label refinement by a past policy, next-step terms."""

import pytest
import torch

from ssmkit.data import TrajectoryBatch
from ssmkit.models.trajectory import Prediction, trajectory_model
from ssmkit.train.losses import LossWeights, refined_actions, trajectory_loss


def batch(steps=6, discrete=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randn(3, steps, size, generator=generator)

    actions = torch.nn.functional.one_hot(draw(2).argmax(-1), 2).float() if discrete else draw(2).tanh()
    mask = torch.ones(3, steps, dtype=torch.bool)
    mask[0, 4:] = False
    times = torch.arange(steps).expand(3, -1)
    return TrajectoryBatch(draw(3), actions, draw(1), times, mask, draw(3), draw(1))


def model(seed=0, **options):
    torch.manual_seed(seed)
    return trajectory_model("decision-mamba", None, state_dim=3, action_dim=2, dim=16, depth=1, **options)


def predict(net, data):
    return net(data.states, data.actions, data.returns, data.timesteps)


def gradient(net, data, **options):
    net.zero_grad()
    terms = trajectory_loss(predict(net, data), data, discrete=net.config.discrete_actions, **options)
    terms["loss"].backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0).item()


def test_refinement_by_a_past_policy_is_more_than_a_scale():
    """A frozen past policy turns the gradient; the current policy in its place would only shrink it."""
    net, past, data = model(0), model(1), batch()
    plain = gradient(net, data, weights=None)
    with torch.no_grad():
        opinions = predict(past, data).actions
        own = predict(net, data).actions
    refined = gradient(net, data, weights=None, past_actions=opinions, beta=0.5)
    assert cosine(plain, refined) < 0.99
    shrunk = gradient(net, data, weights=None, past_actions=own, beta=0.5)
    assert cosine(plain, shrunk) > 1 - 1e-6
    torch.testing.assert_close(shrunk, plain / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_the_past_policy_gets_no_gradient(discrete):
    data = batch(discrete=discrete)
    opinions = torch.randn(3, 6, 2, requires_grad=True)
    target = refined_actions(data.actions, opinions, 0.3, discrete=discrete)
    assert not target.requires_grad
    if discrete:
        torch.testing.assert_close(target.sum(-1), torch.ones(3, 6))
    else:
        torch.testing.assert_close(target, 0.7 * data.actions + 0.3 * opinions.detach())


def test_the_terms_are_means_over_real_steps():
    data = batch()
    prediction = Prediction(torch.zeros(3, 6, 2), torch.zeros(3, 6, 3), torch.zeros(3, 6, 1))
    terms = trajectory_loss(prediction, data, discrete=False, weights=LossWeights(states=0.1, returns=0.2))
    expected = data.actions[data.mask].square().mean()
    torch.testing.assert_close(terms["action"], expected)
    huber = torch.nn.functional.smooth_l1_loss
    state, to_go = (huber(torch.zeros_like(x[data.mask]), x[data.mask]) for x in (data.next_states, data.next_returns))
    torch.testing.assert_close(terms["state"], state)
    torch.testing.assert_close(terms["return"], to_go)
    torch.testing.assert_close(terms["loss"], 0.7 * expected + 0.1 * state + 0.2 * to_go)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_pads_have_no_say(discrete):
    data = batch(discrete=discrete)
    wild = [torch.where(data.mask[..., None], x, 1e3) for x in (data.actions, data.next_states, data.next_returns)]
    other = data._replace(actions=wild[0], next_states=wild[1], next_returns=wild[2])
    prediction = Prediction(*(torch.randn(3, 6, size) for size in (2, 3, 1)))
    weights = LossWeights()
    one, two = (trajectory_loss(prediction, d, discrete=discrete, weights=weights)["loss"] for d in (data, other))
    assert torch.equal(one, two)


def test_discrete_actions_take_cross_entropy():
    data = batch(discrete=True)
    logits = torch.randn(3, 6, 2)
    terms = trajectory_loss(Prediction(logits), data, discrete=True, weights=None)
    chosen = data.actions.argmax(-1)
    expected = torch.nn.functional.cross_entropy(logits[data.mask], chosen[data.mask])
    torch.testing.assert_close(terms["loss"], expected)
