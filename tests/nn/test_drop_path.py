"""Stochastic depth."""

import pytest
import torch

from ssmkit.nn import DropPath


def test_samples_are_dropped_whole_and_the_rest_scaled():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(400, 2, 3))
    assert torch.equal(y, torch.where(y > 0, torch.tensor(1 / 0.75), torch.tensor(0.0)))
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))
    assert 60 < (y[:, 0, 0] == 0).sum() < 140


def test_evaluation_and_zero_rates_change_nothing():
    x = torch.randn(3, 4)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_a_rate_of_one_drops_all():
    assert torch.equal(DropPath(1.0)(torch.ones(3, 4)), torch.zeros(3, 4))


def test_rates_outside_are_refused():
    with pytest.raises(ValueError, match=r"drop_prob must lie in 0..1, got 1.5"):
        DropPath(1.5)
