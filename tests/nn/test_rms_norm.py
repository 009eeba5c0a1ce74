"""RMSNorm: the layer hands its parameters and options to the op."""

import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import RMSNorm
from ssmkit.ops import rms_norm


def test_plain_norm_equals_torch():
    norm = RMSNorm(8, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-3))


def test_options_reach_the_op():
    norm = RMSNorm(8, group_size=4, norm_before_gate=False, bias=True).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, z, residual = torch.randn(3, 5, 8, dtype=torch.float64).unbind()
    y, total = norm(x, z, residual=residual)
    expected, _ = rms_norm(
        x,
        norm.weight,
        bias=norm.bias,
        z=z,
        residual=residual,
        group_size=4,
        norm_before_gate=False,
        backend="reference",
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(total, x + residual)


def test_names_of_the_parameters():
    assert list(RMSNorm(4).state_dict()) == ["weight"]
    assert list(RMSNorm(4, bias=True).state_dict()) == ["weight", "bias"]


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size must be at least 1 and divide dim 8, got 3"):
        RMSNorm(8, group_size=3)
