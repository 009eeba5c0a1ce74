"""causal_conv1d: its laws (cut and carry, reversal, the filter's reach, resets, pads, packing, paths)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import law, same

from ssmkit import ScanPath
from ssmkit.ops import causal_conv1d
from ssmkit.testing import available, causal_conv1d_inputs, device_of

# The package of the same name takes plain walks only.
BENDING = [backend for backend in available("causal_conv1d", reference=True) if backend != "causal_conv1d"]
every_backend = pytest.mark.parametrize("backend", BENDING)
law = settings(law, max_examples=20)


def draw(data, **options):
    """Small inputs of any shape, in float64 so that a law holds to rounding."""
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    dim, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    options = {"dtype": torch.float64, "requires_grad": False, "seed": data.draw(st.integers(0, 2**16))} | options
    return causal_conv1d_inputs(batch, seqlen, dim, width, **options)


def conv(inputs, backend, **options):
    """(y, final_state) on the CPU."""
    device = device_of(backend)
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (inputs | options).items()}
    out = causal_conv1d(**arguments, return_final_state=True, backend=backend)
    return out.y.cpu(), out.final_state.cpu()


@every_backend
@law
@given(data=st.data())
def test_cutting_and_carrying_the_state_changes_nothing(backend, data):
    inputs = draw(data)
    x, reverse = inputs["x"], data.draw(st.booleans())
    cut = data.draw(st.integers(0, x.shape[1]))
    y, final = conv(inputs, backend, reverse=reverse)
    first, second = (x[:, cut:], x[:, :cut]) if reverse else (x[:, :cut], x[:, cut:])
    y_first, carried = conv(inputs | {"x": first}, backend, reverse=reverse)
    y_second, final_second = conv(inputs | {"x": second, "initial_state": carried}, backend, reverse=reverse)
    same(y, torch.cat([y_second, y_first] if reverse else [y_first, y_second], dim=1))
    same(final, final_second)


@every_backend
@law
@given(data=st.data())
def test_reverse_is_flip_conv_flip(backend, data):
    inputs = draw(data)
    y, final = conv(inputs, backend, reverse=True)
    y_flipped, final_flipped = conv(inputs | {"x": inputs["x"].flip(1)}, backend)
    same(y, y_flipped.flip(1))
    same(final, final_flipped)


@every_backend
@law
@given(data=st.data())
def test_a_token_reaches_as_far_as_the_filter(backend, data):
    inputs = draw(data)
    seqlen, width = inputs["x"].shape[1], inputs["weight"].shape[1]
    token = data.draw(st.integers(0, seqlen - 1))
    changed = inputs["x"].clone()
    changed[:, token] += 1
    differs = (conv(inputs, backend)[0] != conv(inputs | {"x": changed}, backend)[0]).any(-1).any(0)
    assert differs[token]
    assert not differs[:token].any()
    assert not differs[token + width :].any()


@every_backend
@law
@given(data=st.data())
def test_resets_separate_sequences(backend, data):
    inputs = draw(data)
    x = inputs["x"]
    cut = data.draw(st.integers(0, x.shape[1] - 1))
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    resets[:, cut] = True
    y, final = conv(inputs, backend, resets=resets)
    y_first, _ = conv(inputs | {"x": x[:, :cut]}, backend)
    fresh = inputs | {"x": x[:, cut:], "initial_state": torch.zeros_like(inputs["initial_state"])}
    y_second, final_second = conv(fresh, backend)
    same(y, torch.cat([y_first, y_second], dim=1))
    same(final, final_second)


@every_backend
@law
@given(data=st.data())
def test_pads_might_as_well_not_be_there(backend, data):
    inputs = draw(data)
    x, reverse = inputs["x"], data.draw(st.booleans())
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.shape[1], max_size=x.shape[1])))
    poisoned = inputs | {"x": torch.where(real.view(1, -1, 1), x, torch.nan)}
    y, final = conv(poisoned, backend, mask=real.expand(x.shape[:2]), reverse=reverse)
    y_without, final_without = conv(inputs | {"x": x[:, real]}, backend, reverse=reverse)
    same(y[:, real], y_without)
    assert (y[:, ~real] == 0).all()
    same(final, final_without)


@every_backend
@law
@given(data=st.data())
def test_packed_equals_separate(backend, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    seed, reverse = data.draw(st.integers(0, 2**16)), data.draw(st.booleans())
    options = {"nseq": len(lengths), "dtype": torch.float64, "requires_grad": False, "seed": seed}
    inputs = causal_conv1d_inputs(1, sum(lengths), 3, data.draw(st.integers(1, 5)), **options)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    y, final = conv(inputs, backend, cu_seqlens=offsets, reverse=reverse)
    for s, (start, end) in enumerate(pairwise(offsets)):
        one = inputs | {"x": inputs["x"][:, start:end], "initial_state": inputs["initial_state"][s : s + 1]}
        y_one, final_one = conv(one, backend, reverse=reverse)
        same(y[:, start:end], y_one)
        same(final[s : s + 1], final_one)


@every_backend
@law
@given(data=st.data())
def test_a_path_is_gather_conv_scatter(backend, data):
    inputs = draw(data)
    x = inputs["x"]
    order = torch.tensor(data.draw(st.permutations(range(x.shape[1]))))
    restarts = data.draw(st.lists(st.integers(0, x.shape[1] - 1), max_size=2))
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    resets[:, restarts] = True
    y, final = conv(inputs, backend, path=ScanPath(order, restarts=restarts))
    y_gathered, final_gathered = conv(inputs | {"x": x[:, order]}, backend, resets=resets)
    same(y[:, order], y_gathered)
    same(final, final_gathered)
