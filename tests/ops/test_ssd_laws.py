"""ssd: the laws of a scan (cut and carry, reversal, zero steps, causality, pads, packing), its derivative by differences."""

from itertools import pairwise

import pytest
import torch
from laws import same

from ssmkit.ops import ssd
from ssmkit.testing import available, device_of, ssd_inputs

PER_TOKEN = ("x", "dt", "B", "C", "z")
every_backend = pytest.mark.parametrize("backend", available("ssd", reference=True))


def scan(inputs, backend, **options):
    out = ssd(**inputs, return_final_state=True, backend=backend, **options)
    return out.y.cpu(), out.final_state.cpu()


def part(inputs, start, end):
    """Tokens start..end of every per-token input."""
    return {k: v[:, start:end] if k in PER_TOKEN else v for k, v in inputs.items()}


def law_inputs(backend, **kwargs):
    return ssd_inputs(
        2, 30, 4, 3, 5, ngroups=2, dtype=torch.float64, device=device_of(backend), requires_grad=False, **kwargs
    )


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cut", [0, 1, 16, 29, 30])
def test_cut_anywhere_and_carry_the_state(cut, reverse, backend):
    inputs = law_inputs(backend)
    y, final = scan(inputs, backend, reverse=reverse)
    halves = [part(inputs, 0, cut), part(inputs, cut, 30)]
    early, late = halves[::-1] if reverse else halves
    y_early, carried = scan(early, backend, reverse=reverse)
    y_late, final_late = scan(late | {"initial_state": carried.to(device_of(backend))}, backend, reverse=reverse)
    same(torch.cat((y_late, y_early) if reverse else (y_early, y_late), dim=1), y)
    same(final_late, final)


@every_backend
def test_reverse_is_flip_scan_flip_and_bidirectional_is_their_sum(backend):
    inputs = law_inputs(backend, optional=("initial_state",))
    flipped = {k: v.flip(1) if k in PER_TOKEN else v for k, v in inputs.items()}
    ahead, final_ahead = scan(inputs, backend)
    back, final_back = scan(inputs, backend, reverse=True)
    y_flipped, final_flipped = scan(flipped, backend)
    same(back, y_flipped.flip(1))
    same(final_back, final_flipped)
    both = inputs | {"initial_state": inputs["initial_state"].expand(2, -1, -1, -1, -1)}
    y, final = scan(both, backend, bidirectional=True)
    same(y, ahead + back)
    same(final, torch.stack([final_ahead, final_back]))


@every_backend
def test_zero_step_keeps_the_state(backend):
    inputs = law_inputs(backend, optional=("initial_state",))
    _, final = scan(inputs | {"dt": torch.zeros_like(inputs["dt"]), "dt_softplus": False}, backend)
    same(final, inputs["initial_state"].cpu())


@every_backend
def test_a_token_leaves_the_past_alone(backend):
    inputs = law_inputs(backend)
    changed = {k: v.clone() if k in PER_TOKEN else v for k, v in inputs.items()}
    for name in PER_TOKEN:
        changed[name][:, 17] += 1.0
    (y, _), (y_changed, _) = scan(inputs, backend), scan(changed, backend)
    assert torch.equal(y[:, :17], y_changed[:, :17])
    assert (y[:, 17] != y_changed[:, 17]).any()


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_pads_might_as_well_not_be_there(reverse, backend):
    inputs = law_inputs(backend)
    real = torch.arange(30, device=device_of(backend)).remainder(4).ne(1)
    poisoned = {
        k: torch.where(real.view(1, -1, *[1] * (v.ndim - 2)), v, torch.nan) if k in PER_TOKEN else v
        for k, v in inputs.items()
    }
    y, final = scan(poisoned | {"mask": real.expand(2, 30)}, backend, reverse=reverse)
    without = {k: v[:, real] if k in PER_TOKEN else v for k, v in inputs.items()}
    y_without, final_without = scan(without, backend, reverse=reverse)
    real = real.cpu()
    same(y[:, real], y_without)
    assert (y[:, ~real] == 0).all()
    same(final, final_without)


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_separate(reverse, backend):
    lengths = [5, 0, 17, 1, 7]
    inputs = ssd_inputs(
        1, 30, 4, 3, 5, ngroups=2, nseq=5, dtype=torch.float64, device=device_of(backend), requires_grad=False
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    y, final = scan(inputs | {"cu_seqlens": offsets.to(device_of(backend))}, backend, reverse=reverse)
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        one = part(inputs, start, end) | {"initial_state": inputs["initial_state"][s : s + 1]}
        y_one, final_one = scan(one, backend, reverse=reverse)
        same(y[:, start:end], y_one)
        same(final[s : s + 1], final_one)


@pytest.mark.parametrize("backend", [b for b in available("ssd", reference=True) if b != "triton"])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"bidirectional": True}], ids=str)
def test_gradcheck(options, backend):
    walks = 2 if options.get("bidirectional") else 1
    inputs = ssd_inputs(2, 5, 2, 2, 3, ngroups=2, walks=walks, dtype=torch.float64, device=device_of(backend))
    names_, leaves = zip(*((k, v) for k, v in inputs.items() if isinstance(v, torch.Tensor)), strict=True)
    resets = torch.zeros(2, 5, dtype=torch.bool, device=device_of(backend))
    resets[1, 3] = True

    def call(*values):
        named = dict(zip(names_, values, strict=True)) | options
        return tuple(ssd(**named, dt_softplus=True, resets=resets, chunk=2, return_final_state=True, backend=backend))

    assert torch.autograd.gradcheck(call, leaves)
