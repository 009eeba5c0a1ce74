"""grid_scan: each backend against the float64 reference, the laws of a grid, the official numbers."""

from functools import partial

import pytest
import torch
from golden_cases import load, names
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same

from ssmkit.ops import selective_scan
from ssmkit.ops.grid_scan import BACKENDS, STARTS, TILE, grid_scan, grid_scan_bwd, grid_scan_fwd, grid_scan_ref
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, grid_scan_inputs, run, to_double

SHAPES = {  # batch, height, width, dim, dstate
    "smallest": (1, 1, 1, 1, 1),
    "within a tile": (2, 3, 4, 33, 7),
    "tiles side by side, more states than registers": (1, 2, 18, 3, 21),
    "tiles on top of each other": (1, 17, 2, 19, 3),
}
# In both directions. The interpreter takes long over a cell; on a GPU few images are cut into tiles, many are not.
TILED = {
    "cpu": [(1, 33, 50, 5, 3), (3, 18, 17, 40, 2)],
    "triton": [(1, 17, 17, 2, 2), (4, 2, 17, 2, 2)],
}
SIZES = {"triton": (1, 2, 3)}  # of what hypothesis draws, where not all of these:
ALL_SIZES = (1, 2, 5, 16, 19, 33)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
IMAGES = ("x", "dt_top", "dt_left", "B_top", "B_left", "C", "z")
SIDES = ("dt_{}", "A_{}", "B_{}", "dt_bias_{}")
TENSORS = (
    *("x", "dt_top", "dt_left", "A_top", "A_left", "B_top", "B_left", "C", "D", "z", "dt_bias_top", "dt_bias_left"),
)
backends = pytest.mark.parametrize("backend", available("grid_scan"))
every_backend = pytest.mark.parametrize("backend", available("grid_scan", reference=True))


def cotangent(inputs):
    """Weights of y."""
    return {"y": torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["x"].dtype)}


def check(name, actual, expected):
    """One result within the bounds of its arithmetic."""
    parameter = name.startswith(("dA", "dD", "ddt_bias"))
    assert_close(name, actual, expected, slack=CANCELLATION if parameter else 1.0)


def compare(inputs, backend, **options):
    """One backend against the reference in float64, output and all gradients."""
    actual = run(grid_scan, inputs, cotangent(inputs), backend=backend, **options)
    expected = run(grid_scan, to_double(inputs), cotangent(inputs), backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        check(name, actual[name], expected[name])


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    compare(grid_scan_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


@pytest.mark.parametrize(
    ("backend", "shape"), [(name, shape) for name in available("grid_scan") for shape in TILED[name]], ids=str
)
def test_tiles_in_both_directions(backend, shape):
    compare(grid_scan_inputs(*shape, device=device_of(backend)), backend)


OPTIONS = {
    "bare": ({"optional": ()}, {}),
    "gate": ({"optional": ("z",)}, {}),
    "one bias": ({"optional": ("D", "dt_bias_left")}, {}),
    "without softplus": ({"optional": ("D", "z")}, {"dt_softplus": False}),
    **{start: ({}, {"start": start}) for start in STARTS[1:]},
}


@backends
@pytest.mark.parametrize(("made", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(made, options, backend):
    inputs = grid_scan_inputs(1, 2, 17, 4, 2, device=device_of(backend), **made)
    if "dt_softplus" in options:
        inputs = changed(inputs, lambda k, v: v.abs() if k in ("dt_top", "dt_left") else v)
    compare({k: v for k, v in inputs.items() if k not in options}, backend, **options)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("mamba2d_op*"))
def test_official_numbers(name, dtype, backend):
    case, device = load(name), device_of(backend)
    ours = {"deltaT": "dt_top", "deltaL": "dt_left", "AT": "A_top", "AL": "A_left", "BT": "B_top", "BL": "B_left"}
    inputs = {ours.get(k, k): v.to(device, dtype).requires_grad_() for k, v in case.inputs.items()}
    actual = run(grid_scan, inputs, case.cotangents, backend=backend)
    expected = {"y": case.outputs["y"]}
    for key, value in case.gradients.items():
        theirs = key.removeprefix("in.")
        expected[f"d{ours.get(theirs, theirs)}"] = value
    assert actual.keys() == expected.keys()
    for key in actual:
        if dtype == torch.float64:
            assert (actual[key].cpu() - expected[key]).abs().max() <= 1e-13 * expected[key].abs().max(), key
        else:
            check(key, actual[key], expected[key])


# Laws, in float64 so that they hold to rounding


def doubles(*sizes, backend, **options):
    return grid_scan_inputs(*sizes, dtype=torch.float64, device=device_of(backend), **options)


def results(inputs, backend, **options):
    return run(grid_scan, inputs, {"y": cotangent(inputs)["y"]}, backend=backend, **options)


def sizes_for(backend):
    """Heights or widths within a tile, of a tile and beyond."""
    return st.sampled_from(SIZES.get(backend, ALL_SIZES))


def changed(inputs, change):
    """Other leaves with the same requests for gradients."""
    return {k: change(k, v.detach()).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()}  # fmt: skip


@every_backend
@law
@given(data=st.data(), dim=st.integers(1, 5), dstate=st.integers(1, 3))
def test_one_row_is_a_chain(backend, data, dim, dstate):
    length = data.draw(sizes_for(backend))
    inputs = doubles(1, 1, length, dim, dstate, backend=backend)
    chain = {k.removesuffix("_left"): v for k, v in inputs.items() if not k.endswith("_top")}
    flat = changed(chain, lambda k, v: v.flatten(1, 2) if k in ("x", "dt", "B", "C", "z") else v)
    weights = cotangent(inputs)
    expected = run(selective_scan, flat, {"y": weights["y"].flatten(1, 2)}, backend="reference")
    actual = results(inputs, backend)
    same(actual["y"].flatten(1, 2), expected["y"])
    for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"):
        ours = actual.get(f"d{name}", actual.get(f"d{name}_left"))
        same(ours.view_as(expected[f"d{name}"]), expected[f"d{name}"])
    for name in ("dt", "A", "B", "dt_bias"):
        assert (actual[f"d{name}_top"] == 0).all()


@every_backend
@law
@given(data=st.data(), dim=st.integers(1, 5), dstate=st.integers(1, 3))
def test_one_column_is_a_chain_after_its_first_cell(backend, data, dim, dstate):
    """The first cell has the term from the left, all others that from above."""
    length = data.draw(sizes_for(backend))
    inputs = doubles(2, length, 1, dim, dstate, backend=backend, requires_grad=False)
    first = torch.arange(length, device=device_of(backend))[:, None, None] == 0
    chain = {k: inputs[k] for k in ("x", "C", "D", "z")} | {"A": inputs["A_top"], "dt_softplus": True}
    for name in ("dt", "B"):
        left, top = inputs[f"{name}_left"], inputs[f"{name}_top"]
        if name == "dt":
            left, top = left + inputs["dt_bias_left"], top + inputs["dt_bias_top"]
        chain[name] = torch.where(first, left, top)
    flat = {k: v.flatten(1, 2) if isinstance(v, torch.Tensor) and v.ndim == 4 else v for k, v in chain.items()}
    same(grid_scan(**inputs, backend=backend).flatten(1, 2), selective_scan(**flat, backend="reference"))


@every_backend
@law
@given(data=st.data(), dim=st.integers(1, 4), dstate=st.integers(1, 3))
def test_a_transposed_image_with_its_sides_swapped(backend, data, dim, dstate):
    """But for the first cell, which takes the term from the left: there both have to be alike."""
    height, width = data.draw(sizes_for(backend)), data.draw(sizes_for(backend))
    inputs = doubles(1, height, width, dim, dstate, backend=backend, requires_grad=False)
    inputs["dt_left"][:, 0, 0] = (inputs["dt_top"] + inputs["dt_bias_top"] - inputs["dt_bias_left"])[:, 0, 0]
    inputs["B_left"][:, 0, 0] = inputs["B_top"][:, 0, 0]
    turned = {k: v.transpose(1, 2) if k in IMAGES else v for k, v in inputs.items()}
    for name in SIDES:
        top, left = name.format("top"), name.format("left")
        turned[top], turned[left] = turned[left], turned[top]
    same(grid_scan(**turned, backend=backend), grid_scan(**inputs, backend=backend).transpose(1, 2))


@every_backend
@pytest.mark.parametrize("start", STARTS[1:])
def test_another_start_is_flip_scan_flip(start, backend):
    inputs = doubles(1, 2, 5, 3, 2, backend=backend)
    axes = [axis for axis, there in ((1, start.startswith("bottom")), (2, start.endswith("right"))) if there]
    flipped = changed(inputs, lambda k, v: v.flip(axes) if k in IMAGES else v)
    weights = cotangent(inputs)["y"]
    expected = run(grid_scan, flipped, {"y": weights.flip(axes)}, backend=backend)
    actual = results(inputs, backend, start=start)
    for name in actual:
        image = name == "y" or name.removeprefix("d") in IMAGES
        same(actual[name], expected[name].flip(axes) if image else expected[name])


@every_backend
@pytest.mark.parametrize("cell", [(0, 0), (1, 15), (1, 16)], ids=str)
def test_a_cell_reaches_those_below_and_to_the_right(cell, backend):
    inputs = doubles(1, 3, 18, 2, 2, backend=backend, requires_grad=False, optional=("D",))
    before = grid_scan(**inputs, backend=backend)
    inputs["x"][0, cell[0], cell[1]] += 1
    reached = (grid_scan(**inputs, backend=backend) != before).any(-1)[0]
    expected = torch.zeros_like(reached)
    expected[cell[0] :, cell[1] :] = True
    assert torch.equal(reached, expected)


@every_backend
def test_a_step_of_zero_passes_on_the_mean(backend):
    inputs = doubles(1, 3, 18, 2, 2, backend=backend, requires_grad=False, optional=())
    inputs["dt_softplus"] = False
    inputs |= {k: inputs[k].abs() for k in ("dt_top", "dt_left")} | {"C": torch.ones_like(inputs["C"])}
    for name in ("dt_top", "dt_left"):
        inputs[name][:, 1:, 1:] = 0
    y = grid_scan(**inputs, backend=backend)
    same(y[:, 1:, 1:], (y[:, :-1, 1:] + y[:, 1:, :-1]) / 2)


@every_backend
def test_terms_that_are_not_there_are_not_read(backend):
    """The first row has none from above, the first column (but for its first cell) none from the left."""
    inputs = doubles(1, 2, 17, 3, 2, backend=backend, requires_grad=False)
    expected = grid_scan(**inputs, backend=backend)
    for name in ("dt", "B"):
        inputs[f"{name}_top"][:, 0] = float("nan") if name == "dt" else 1e30
        inputs[f"{name}_left"][:, 1:, 0] = float("nan") if name == "dt" else 1e30
    assert torch.equal(grid_scan(**inputs, backend=backend), expected)
    if backend == "reference":
        return  # autograd multiplies what is not there by zero
    asked = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    actual = results(asked, backend)
    for name in ("ddt", "dB"):
        assert (actual[f"{name}_top"][:, 0] == 0).all()
        assert (actual[f"{name}_left"][:, 1:, 0] == 0).all()
    assert all(value.isfinite().all() for value in actual.values())


@every_backend
def test_images_of_a_batch_are_independent(backend):
    inputs = doubles(3, 2, 3, 3, 2, backend=backend, requires_grad=False)
    whole = grid_scan(**inputs, backend=backend)
    for b in range(3):
        alone = {k: v[b : b + 1] if k in IMAGES else v for k, v in inputs.items()}
        same(grid_scan(**alone, backend=backend), whole[b : b + 1])


@every_backend
def test_views_and_other_strides(backend):
    inputs = grid_scan_inputs(2, 2, 3, 4, 3, device=device_of(backend))
    wide = torch.cat([inputs[k].detach() for k in IMAGES], -1).split([inputs[k].shape[-1] for k in IMAGES], -1)
    views = dict(zip(IMAGES, (v.requires_grad_() for v in wide), strict=True))
    channels_first = {k: inputs[k].detach().movedim(3, 1).contiguous().movedim(1, 3).requires_grad_() for k in IMAGES}
    columns_first = {k: inputs[k].detach().mT.contiguous().mT.requires_grad_() for k in ("A_top", "A_left")}
    expected = results(inputs, backend)
    for other in (inputs | views, inputs | channels_first, inputs | columns_first):
        actual = results(other, backend)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 17, 4, 0, 2)], ids=str)
def test_empty(shape, backend):
    actual = results(grid_scan_inputs(*shape, device=device_of(backend)), backend)
    assert actual["y"].shape == shape[:4]
    assert all((value == 0).all() for value in actual.values())


@every_backend
def test_no_states_leave_the_skip(backend):
    inputs = grid_scan_inputs(2, 2, 3, 4, 0, device=device_of(backend), optional=("D",))
    actual = results(inputs, backend)
    torch.testing.assert_close(actual["y"], (inputs["D"] * inputs["x"]).detach())


@backends
@pytest.mark.parametrize(("height", "width"), [(2, TILE + 1), (TILE + 1, 2)])
def test_nothing_is_kept_without_gradients(height, width, backend):
    inputs = grid_scan_inputs(1, height, width, 3, 2, device=device_of(backend), requires_grad=False)
    tensors = [inputs[k] for k in TENSORS]
    y, kept = grid_scan_fwd(*tensors, True, False, False, True, backend)
    assert kept.shape == (2, 2, 3)
    y_alone, none = grid_scan_fwd(*tensors, True, False, False, False, backend)
    assert none.shape == (0, 2, 3)
    assert torch.equal(y, y_alone)


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = grid_scan_inputs(1, 1, TILE + 1, 5, 3, device=device_of(backend))
    first, second = results(inputs, backend), results(inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif("cpu" not in available("grid_scan"), reason="the compiled library is not built")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_number_of_threads_changes_no_bit(batch):
    """With more threads than there are blocks of channels, the tiles of a diagonal run at once."""
    inputs, before = grid_scan_inputs(batch, 50, 35, 40, 5), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7, 24):
            torch.set_num_threads(threads)
            found.append(results(inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.mark.parametrize("start", ["top_left", "bottom_right"])
def test_gradients_of_the_reference(start):
    inputs = grid_scan_inputs(1, 3, 2, 2, 2, dtype=torch.float64)
    flips = (start.startswith("bottom"), start.endswith("right"))
    torch.autograd.gradcheck(lambda *t: grid_scan_ref(*t, True, *flips), [inputs[k] for k in TENSORS])


@backends
def test_opcheck(backend):
    inputs = grid_scan_inputs(1, 2 if backend == "triton" else TILE + 1, 2, 2, 3, device=device_of(backend))
    tensors = [inputs[k] for k in TENSORS]
    torch.library.opcheck(grid_scan_fwd, (*tensors, True, True, False, True, backend))
    plain = [t.detach() for t in tensors]
    y, kept = grid_scan_fwd(*plain, True, True, False, True, backend)
    torch.library.opcheck(grid_scan_bwd, (y, *plain, kept, True, True, False, backend))


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend):
    call = partial(grid_scan, start="bottom_left", backend=backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = grid_scan_inputs(1, 2, 2, 4, 2, device=device_of(backend))
    actual, expected = run(compiled, inputs, cotangent(inputs)), run(call, inputs, cotangent(inputs))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


BAD = {
    "x in a row": ({"x": torch.zeros(2, 12, 4)}, r"x must have shape \(batch, height, width, dim\), got \(2, 12, 4\)"),
    "integers": ({"x": torch.zeros(2, 3, 4, 4).int()}, "x must be of dtype float32, .*, got int32"),
    "dt of another size": ({"dt_left": torch.zeros(2, 4, 3, 4)}, r"dt_left must have shape \(2, 3, 4, 4\) \(batch, "),
    "A of a state": ({"A_top": torch.zeros(4)}, r"A_top must have shape \(dim, dstate\)"),
    "A of the sides that differ": ({"A_left": torch.zeros(4, 6)}, r"A_left must have shape \(4, 5\) \(dim, dstate\)"),
    "complex A": ({"A_left": torch.zeros(4, 5).cfloat()}, "A_left must be of dtype .* because x is float32, got complex64"),
    "B in groups": ({"B_top": torch.zeros(2, 3, 4, 1, 5)}, r"B_top must have shape \(2, 3, 4, 5\)"),
    "C of another dtype": ({"C": torch.zeros(2, 3, 4, 5).half()}, "C must be of dtype float32 like x"),
    "z of another dtype": ({"z": torch.zeros(2, 3, 4, 4).double()}, "z must be of dtype float32 like x"),
    "D of another shape": ({"D": torch.zeros(5)}, r"D must have shape \(4,\)"),
    "a bias too wide": ({"dt_bias_top": torch.zeros(4).double()}, "dt_bias_top must be of dtype .* because x is float32"),
    "another device": ({"A_top": torch.zeros(4, 5, device="meta")}, "A_top must be on cpu like x, got meta"),
    "no corner": ({"start": "left"}, "start must be one of top_left, top_right, bottom_left, bottom_right, got 'left'"),
    "unknown backend": ({"backend": "simd"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        grid_scan(**(grid_scan_inputs(2, 3, 4, 4, 5, requires_grad=False) | change))


def test_a_backend_asked_for_by_name_never_falls_back():
    inputs = grid_scan_inputs(1, 1, 1, 1, 1)
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for row in BACKENDS:
        with pytest.raises(
            NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: needs a {row.device} tensor"
        ):
            grid_scan(**elsewhere, backend=row.name)
