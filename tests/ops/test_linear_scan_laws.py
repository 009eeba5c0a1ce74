"""linear_scan: the laws of a scan (cut and carry, reversal, a decay of one, causality, resets, pads, packing)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same

from ssmkit.ops import linear_scan
from ssmkit.testing import available, device_of, linear_scan_inputs

every_backend = pytest.mark.parametrize("backend", available("linear_scan", reference=True))


def draw(data, *, min_seqlen=1, **kwargs):
    """Small inputs of any shape, in float64 or complex128 so that a law holds to rounding."""
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(min_seqlen, 20))
    options = {
        "dtype": data.draw(st.sampled_from([torch.float64, torch.complex128])),
        "constant_a": data.draw(st.booleans()),
        "requires_grad": False,
        "seed": data.draw(st.integers(0, 2**16)),
    }
    return linear_scan_inputs(batch, seqlen, data.draw(st.integers(1, 6)), **(options | kwargs))


def scan(inputs, backend, **options):
    inputs = {k: v.to(device_of(backend)) for k, v in inputs.items()}
    out = linear_scan(**inputs, return_final_state=True, backend=backend, **options)
    return out.h.cpu(), out.final_state.cpu()


def per_token(inputs, change):
    """The inputs with `change` applied to those that have a token axis."""
    return {k: change(v) if v.ndim == 3 else v for k, v in inputs.items()}


@every_backend
@law
@given(data=st.data())
def test_cut_anywhere_and_carry_the_state(backend, data):
    inputs = draw(data)
    seqlen = inputs["b"].shape[1]
    cut, reverse = data.draw(st.integers(0, seqlen)), data.draw(st.booleans())
    h, final = scan(inputs, backend, reverse=reverse)
    first, second = per_token(inputs, lambda v: v[:, :cut]), per_token(inputs, lambda v: v[:, cut:])
    early, late = (second, first) if reverse else (first, second)
    h_early, carried = scan(early, backend, reverse=reverse)
    h_late, final_late = scan(late | {"initial_state": carried}, backend, reverse=reverse)
    same(torch.cat((h_late, h_early) if reverse else (h_early, h_late), dim=1), h)
    same(final_late, final)


@every_backend
@law
@given(data=st.data())
def test_reverse_is_flip_scan_flip(backend, data):
    inputs = draw(data)
    h, final = scan(inputs, backend, reverse=True)
    h_flipped, final_flipped = scan(per_token(inputs, lambda v: v.flip(1)), backend)
    same(h, h_flipped.flip(1))
    same(final, final_flipped)


@every_backend
@law
@given(data=st.data())
def test_a_decay_of_one_sums(backend, data):
    inputs = draw(data, constant_a=False)
    h, _ = scan(inputs | {"a": torch.ones_like(inputs["a"])}, backend)
    same(h, inputs["b"].cumsum(1) + inputs["initial_state"][:, None])


@every_backend
@law
@given(data=st.data())
def test_later_tokens_do_not_touch_earlier_outputs(backend, data):
    inputs = draw(data)
    token = data.draw(st.integers(0, inputs["b"].shape[1] - 1))
    changed = inputs | {"b": inputs["b"].clone()}
    changed["b"][:, token] += 1.0
    h, h_changed = (scan(each, backend)[0] for each in (inputs, changed))
    assert torch.equal(h[:, :token], h_changed[:, :token])
    assert not torch.equal(h[:, token], h_changed[:, token])


@every_backend
@law
@given(data=st.data())
def test_resets_separate_sequences(backend, data):
    inputs = draw(data)
    batch, seqlen, _ = inputs["b"].shape
    cut = data.draw(st.integers(0, seqlen - 1))
    resets = torch.zeros(batch, seqlen, dtype=torch.bool)
    resets[:, cut] = True
    h, final = scan(inputs | {"resets": resets}, backend)
    h_first, _ = scan(per_token(inputs, lambda v: v[:, :cut]), backend)
    fresh = torch.zeros_like(inputs["initial_state"])
    h_second, final_second = scan(per_token(inputs, lambda v: v[:, cut:]) | {"initial_state": fresh}, backend)
    same(h, torch.cat([h_first, h_second], dim=1))
    same(final, final_second)


@every_backend
@law
@given(data=st.data())
def test_pads_might_as_well_not_be_there(backend, data):
    inputs = draw(data)
    batch, seqlen, _ = inputs["b"].shape
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=seqlen, max_size=seqlen)))
    reverse = data.draw(st.booleans())
    poisoned = per_token(inputs, lambda v: torch.where(real[None, :, None], v, torch.nan))
    h, final = scan(poisoned | {"mask": real.expand(batch, seqlen)}, backend, reverse=reverse)
    h_without, final_without = scan(per_token(inputs, lambda v: v[:, real]), backend, reverse=reverse)
    same(h[:, real], h_without)
    same(final, final_without)
    # h at a pad is the state carried past it
    carried = inputs["initial_state"]
    for token in reversed(range(seqlen)) if reverse else range(seqlen):
        if not real[token]:
            same(h[:, token], carried)
        carried = h[:, token]


@every_backend
@law
@given(data=st.data())
def test_packed_equals_separate(backend, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    seed, reverse, constant_a = (data.draw(s) for s in (st.integers(0, 2**16), st.booleans(), st.booleans()))
    options = {"dtype": torch.float64, "constant_a": constant_a, "requires_grad": False, "seed": seed}
    inputs = linear_scan_inputs(1, sum(lengths), 3, nseq=len(lengths), **options)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    h, final = scan(inputs | {"cu_seqlens": offsets}, backend, reverse=reverse)
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        one = {k: v[:, start:end] if v.ndim == 3 else v for k, v in inputs.items()}
        h_one, final_one = scan(one | {"initial_state": inputs["initial_state"][s : s + 1]}, backend, reverse=reverse)
        same(h[:, start:end], h_one)
        same(final[s : s + 1], final_one)
