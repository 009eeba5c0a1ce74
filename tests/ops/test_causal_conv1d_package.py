"""causal_conv1d by the package of the same name: what it is given, what it is not asked for, and its numbers."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_cases import compare

from ssmkit.ops import causal_conv1d
from ssmkit.testing import available, causal_conv1d_inputs


@pytest.fixture
def package(monkeypatch):
    """A stand-in with the package's signature and layout, which notes what it is called with."""
    calls = []

    def causal_conv1d_fn(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        assert x.stride(1) == 1
        assert initial_states is None or initial_states.stride(1) == 1
        assert seq_idx is None
        assert final_states_out is None
        calls.append((x.shape, activation))
        dim, width = weight.shape
        before = x.new_zeros(x.shape[0], dim, width - 1) if initial_states is None else initial_states
        line = torch.cat([before, x], dim=-1)
        y = F.conv1d(line, weight.unsqueeze(1), bias, groups=dim)
        y = y if activation is None else F.silu(y)
        return (y, line[..., line.shape[-1] - width + 1 :]) if return_final_states else y

    fake = types.ModuleType("causal_conv1d")
    fake.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", fake)
    # The stand-in runs where the tests run.
    monkeypatch.setattr("ssmkit.backends.runs_on", lambda row, device: row.name == "causal_conv1d")
    monkeypatch.setattr("ssmkit.backends.unusable", lambda name, module: None)
    return calls


@pytest.mark.parametrize("optional", [(), ("bias",), ("bias", "initial_state")], ids=["bare", "bias", "state"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_package_gets_its_arguments(activation, optional, package):
    inputs = causal_conv1d_inputs(2, 9, 8, 4, activation=activation, optional=optional)
    compare(inputs, "causal_conv1d")
    assert package == [((2, 8, 9), activation)]


OUTSIDE = {
    "a wide filter": ({}, (2, 9, 8, 5), "takes widths 2 to 4, got 5"),
    "an odd dim": ({}, (2, 9, 7, 4), "takes a dim that is a multiple of 8"),
    "float64": ({}, (2, 9, 8, 4), "takes float32, bfloat16 and float16, got float64"),
    "resets": ({"resets": torch.zeros(2, 9, dtype=torch.bool)}, (2, 9, 8, 4), "takes no resets"),
    "reverse": ({"reverse": True}, (2, 9, 8, 4), "takes no resets"),
}


@pytest.mark.parametrize(("walk", "shape", "reason"), OUTSIDE.values(), ids=OUTSIDE)
def test_the_package_is_not_asked_for_what_it_cannot_do(walk, shape, reason, package):
    inputs = causal_conv1d_inputs(*shape, dtype=torch.float64 if "float64" in reason else torch.float32)
    with pytest.raises(NotImplementedError, match=f"causal_conv1d: {reason}"):
        causal_conv1d(**inputs, **walk, backend="causal_conv1d")
    assert not package


@pytest.mark.skipif(
    "causal_conv1d" not in available("causal_conv1d"), reason="the package causal-conv1d is not installed"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_package_itself(dtype):
    compare(causal_conv1d_inputs(2, 65, 16, 4, dtype=dtype, device="cuda"), "causal_conv1d")
