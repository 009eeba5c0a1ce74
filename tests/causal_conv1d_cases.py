"""What the tests of causal_conv1d share: weights of its outputs, and how a backend is compared."""

import torch

from ssmkit.ops import causal_conv1d
from ssmkit.testing import assert_close, run, to_double


def cotangents(inputs, seed=1):
    """Weights of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    x, state, window = inputs["x"], inputs.get("initial_state"), inputs["weight"].shape[1] - 1
    nseq = x.shape[0] if state is None else state.shape[0]
    shapes = {"y": x.shape, "final_state": (nseq, window, x.shape[2])}
    return {name: torch.randn(shape, generator=generator).to(x.dtype) for name, shape in shapes.items()}


def compare(inputs, backend, **options):
    """One backend against the reference in float64, outputs and all gradients."""
    weights = cotangents(inputs)
    actual = run(causal_conv1d, inputs, weights, return_final_state=True, backend=backend, **options)
    expected = run(causal_conv1d, to_double(inputs), weights, return_final_state=True, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name])
