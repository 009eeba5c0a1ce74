"""What the tests of ssd share: weights of its outputs, and the bounds that a backend is held to."""

import torch

from ssmkit import native
from ssmkit.ops import ssd
from ssmkit.testing import CANCELLATION, assert_close, run, to_double


def cotangents(inputs, *, nseq=None, bidirectional=False, seed=1):
    """Weights of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, nheads, headdim = inputs["x"].shape
    state = (batch if nseq is None else nseq, nheads, headdim, inputs["B"].shape[3])
    dy = torch.randn(inputs["x"].shape, generator=generator).to(inputs["x"].dtype)
    return {"y": dy, "final_state": torch.randn((2,) * bidirectional + state, generator=generator)}


def products_in(dtype, backend):
    """Whether a backend's matrix products take their operands in this half precision: tl.dot does, and AVX-512's in bf16."""
    if backend == "triton":
        return dtype.itemsize == 2
    return backend == "cpu" and dtype == torch.bfloat16 and native.library().cpu_capability() == "avx512_bf16"


def check(name, actual, expected, dtype, backend):
    """One result within the bounds of its arithmetic."""
    slack = 1.0
    if name in ("dA", "dD", "ddt_bias"):
        # A few sums over all tokens, whose terms cancel: the rounding of the terms is large beside the result.
        slack = CANCELLATION
    if dtype == torch.float64:
        # The exponent of a decay is a sum over its chunk, in fp64 too: its rounding is amplified by its size, some 20.
        slack = max(slack, 4.0)
    if products_in(dtype, backend):
        # Operands are rounded to the dtype of x, so that states and sums in fp32 carry its rounding too.
        actual = actual.to(dtype)
        if backend == "triton":
            # Each product's operands anew, states and gradients several times.
            slack = max(slack, 4.0)
    assert_close(name, actual, expected, slack=slack)


def compare(inputs, backend, *, nseq=None, chunk=None, **options):
    """One backend against the recurrence in float64, outputs and all gradients."""
    weights = cotangents(inputs, nseq=nseq, bidirectional=options.get("bidirectional", False))
    options["return_final_state"] = True
    actual = run(ssd, inputs, weights, backend=backend, chunk=chunk, **options)
    expected = run(ssd, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        check(name, actual[name], expected[name], inputs["x"].dtype, backend)
