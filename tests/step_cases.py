"""What the tests of ops that update a state in place share: comparison, slots, refused calls.

`step` is the op, `inputs` its arguments by name, the state among them.
"""

import pytest
import torch

from ssmkit.testing import assert_close, device_of, to_double


def compare_step(step, inputs, backend, **options):
    """Output and state of one backend against the reference in float64."""
    expected = to_double(inputs | {"state": inputs["state"].clone()})
    y_expected = step(**expected, **options, backend="reference")
    y = step(**inputs, **options, backend=backend)
    assert_close("y", y, y_expected)
    assert_close("state", inputs["state"], expected["state"])


def compare_narrow_state(step, inputs, state_dtype, backend):
    """The same with a state of lower precision, which keeps its dtype."""
    inputs["state"] = inputs["state"].to(state_dtype)
    compare_step(step, inputs, backend)
    assert inputs["state"].dtype == state_dtype


def compare_slots(step, inputs, index_dtype, backend):
    """Three rows, of which the first and last have a slot: a pool of states against states of their own."""
    device = device_of(backend)
    slots = torch.tensor([5, -1, 2], dtype=index_dtype, device=device)
    pool = torch.randn(7, *inputs["state"].shape[1:], dtype=torch.float64).to(device)
    pool[[5, 2]] = inputs["state"][[0, 2]]
    before = pool.clone()
    y_expected = step(**inputs, backend="reference")
    y = step(**(inputs | {"state": pool}), state_indices=slots, backend=backend)
    torch.testing.assert_close(y[[0, 2]], y_expected[[0, 2]])
    torch.testing.assert_close(pool[[5, 2]], inputs["state"][[0, 2]])
    assert (y[1] == 0).all()
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(pool[untouched], before[untouched])


def refuse_a_missing_slot(step, inputs, backend):
    """Of two rows, the second asks for a third state."""
    with pytest.raises(ValueError, match="state_indices must be below the number of slots 2, got 2"):
        step(**inputs, state_indices=torch.tensor([0, 2]), backend=backend)


def skip_a_missing_slot(kernel, step, inputs, arguments):
    """Behind the op's check, which sees no values on a GPU: `kernel` writes nothing outside the state."""
    expected = step(**inputs | {"state": inputs["state"].clone()}, backend="triton")
    pool = torch.cat([inputs["state"], torch.full_like(inputs["state"], 7.0)])
    y = kernel(pool[:2], *arguments, torch.tensor([0, 2], device=pool.device))
    assert torch.equal(y[0], expected[0])
    assert (y[1] == 0).all()
    assert torch.equal(pool[1], inputs["state"][1])
    assert (pool[2:] == 7.0).all()


def compare_compiled(step, inputs, backend):
    """Compiled without a break, the op gives the same output and state."""
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    same = inputs | {"state": inputs["state"].clone()}
    torch.testing.assert_close(compiled(**inputs, backend=backend), step(**same, backend=backend))
    torch.testing.assert_close(inputs["state"], same["state"])


def refuse(step, inputs, change, message):
    """A call that is refused leaves the state as it was."""
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=message):
        step(**(inputs | change))
    assert torch.equal(inputs["state"], before)
