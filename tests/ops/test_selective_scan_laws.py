"""selective_scan: the laws of a scan (cut and carry, reversal, zero steps, causality, restarts, pads, packing, paths)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same

from ssmkit import ScanPath
from ssmkit.ops import selective_scan
from ssmkit.testing import available, device_of, selective_scan_inputs

every_backend = pytest.mark.parametrize("backend", available("selective_scan", reference=True))


def draw(data, *, optional=("D", "z", "dt_bias", "initial_state"), min_seqlen=1, **kwargs):
    """Small inputs of any shape, in float64 so that a law holds to rounding."""
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(min_seqlen, 20))
    dim, dstate = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 2**16))
    kwargs = {"dtype": torch.float64, "requires_grad": False, "seed": seed, "optional": optional} | kwargs
    return selective_scan_inputs(batch, seqlen, dim, dstate, **kwargs)


def scan(inputs, backend, **options):
    inputs = {k: v.to(device_of(backend)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    out = selective_scan(**inputs, return_final_state=True, backend=backend, **options)
    return out.y.cpu(), out.final_state.cpu()


def part(inputs, start, end):
    """Tokens start..end of every per-token input."""
    return {k: v[:, start:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}


@every_backend
@law
@given(data=st.data())
def test_cut_anywhere_and_carry_the_state(backend, data):
    inputs = draw(data)
    seqlen = inputs["x"].shape[1]
    cut = data.draw(st.integers(0, seqlen))
    reverse = data.draw(st.booleans())
    y, final = scan(inputs, backend, reverse=reverse)
    first, second = part(inputs, 0, cut), part(inputs, cut, seqlen)
    early, late = (second, first) if reverse else (first, second)
    y_early, carried = scan(early, backend, reverse=reverse)
    y_late, final_late = scan(late | {"initial_state": carried}, backend, reverse=reverse)
    parts = (y_late, y_early) if reverse else (y_early, y_late)
    same(torch.cat(parts, dim=1), y)
    same(final_late, final)


@every_backend
@law
@given(data=st.data())
def test_reverse_is_flip_scan_flip(backend, data):
    inputs = draw(data)
    flipped = {k: v.flip(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    y, final = scan(inputs, backend, reverse=True)
    y_flipped, final_flipped = scan(flipped, backend)
    same(y, y_flipped.flip(1))
    same(final, final_flipped)


@every_backend
@law
@given(data=st.data())
def test_zero_step_keeps_the_state(backend, data):
    inputs = draw(data, optional=("initial_state",))
    inputs = inputs | {"dt": torch.zeros_like(inputs["dt"]), "dt_softplus": False}
    _, final = scan(inputs, backend)
    same(final, inputs["initial_state"])


@every_backend
@law
@given(data=st.data())
def test_a_token_leaves_the_past_alone(backend, data):
    inputs = draw(data)
    token = data.draw(st.integers(0, inputs["x"].shape[1] - 1))
    changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        changed[name][:, token] += 1.0
    y, _ = scan(inputs, backend)
    y_changed, _ = scan(changed, backend)
    assert torch.equal(y[:, :token], y_changed[:, :token])
    assert not torch.equal(y[:, token], y_changed[:, token])


@every_backend
@law
@given(data=st.data())
def test_resets_separate_sequences(backend, data):
    inputs = draw(data)
    batch, seqlen, _ = inputs["x"].shape
    cut = data.draw(st.integers(0, seqlen - 1))
    resets = torch.zeros(batch, seqlen, dtype=torch.bool)
    resets[:, cut] = True
    y, final = scan(inputs | {"resets": resets}, backend)
    y_first, _ = scan(part(inputs, 0, cut), backend)
    fresh = torch.zeros_like(inputs["initial_state"])
    y_second, final_second = scan(part(inputs, cut, seqlen) | {"initial_state": fresh}, backend)
    same(y, torch.cat([y_first, y_second], dim=1))
    same(final, final_second)


@every_backend
@law
@given(data=st.data())
def test_pads_might_as_well_not_be_there(backend, data):
    inputs = draw(data)
    batch, seqlen, _ = inputs["x"].shape
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=seqlen, max_size=seqlen)))
    reverse = data.draw(st.booleans())
    poisoned = {
        k: torch.where(real.view(1, -1, *[1] * (v.ndim - 2)), v, torch.nan) if k in ("x", "dt", "B", "C", "z") else v
        for k, v in inputs.items()
    }
    y, final = scan(poisoned | {"mask": real.expand(batch, seqlen)}, backend, reverse=reverse)
    without = {k: v[:, real] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    y_without, final_without = scan(without, backend, reverse=reverse)
    same(y[:, real], y_without)
    assert (y[:, ~real] == 0).all()
    same(final, final_without)


@every_backend
@law
@given(data=st.data())
def test_packed_equals_separate(backend, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    seed, reverse = data.draw(st.integers(0, 2**16)), data.draw(st.booleans())
    inputs = selective_scan_inputs(
        1, sum(lengths), 3, 2, nseq=len(lengths), dtype=torch.float64, requires_grad=False, seed=seed
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    y, final = scan(inputs | {"cu_seqlens": offsets.to(device_of(backend))}, backend, reverse=reverse)
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        one = part(inputs, start, end) | {"initial_state": inputs["initial_state"][s : s + 1]}
        y_one, final_one = scan(one, backend, reverse=reverse)
        same(y[:, start:end], y_one)
        same(final[s : s + 1], final_one)


@every_backend
@law
@given(data=st.data())
def test_a_path_is_gather_scan_scatter(backend, data):
    inputs = draw(data)
    seqlen = inputs["x"].shape[1]
    order = torch.tensor(data.draw(st.permutations(range(seqlen))))
    restarts = data.draw(st.lists(st.integers(0, seqlen - 1), max_size=2))
    path = ScanPath(order, restarts=restarts)
    gathered = {k: v[:, order] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    resets = torch.zeros(inputs["x"].shape[:2], dtype=torch.bool)
    resets[:, restarts] = True
    y, final = scan(inputs, backend, path=path)
    y_gathered, final_gathered = scan(gathered | {"resets": resets}, backend)
    same(y[:, order], y_gathered)
    same(final, final_gathered)
