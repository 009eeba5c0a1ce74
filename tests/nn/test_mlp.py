"""The MLP of vision backbones."""

import pytest
import torch

from ssmkit.nn import MLP


def test_equation():
    torch.manual_seed(0)
    mlp, x = MLP(4, 6, 5).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_widths_and_dropout():
    mlp = MLP(4, drop=1.0)
    assert {name: tuple(t.shape) for name, t in mlp.state_dict().items()} == {
        "fc1.weight": (4, 4),
        "fc1.bias": (4,),
        "fc2.weight": (4, 4),
        "fc2.bias": (4,),
    }
    assert not mlp(torch.ones(2, 4)).any()
    assert mlp.eval()(torch.ones(2, 4)).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="hidden_features must be at least 1, got 0"):
        MLP(4, 0)
