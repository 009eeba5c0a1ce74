"""long_conv: transforms against the direct sum, in one and two dimensions, from every start."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from laws import law

from ssmkit.ops import causal_conv1d, long_conv
from ssmkit.ops.long_conv import STARTS, good_size
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, long_conv_inputs, run, to_double

CORNERS = tuple(STARTS[2])
CASES = {  # batch and size of x, taps, start
    "smallest": ((1, 1, 1), None, None),
    "causal": ((2, 13, 4), None, "first"),
    "reversed": ((2, 13, 4), None, "last"),
    "both ways": ((2, 12, 3), None, ("first", "last")),
    "short kernel": ((3, 17, 2), (5,), ("last", "first")),
    "kernel longer than the input": ((2, 6, 3), (11,), ("first", "last")),
    "image": ((2, 5, 6, 3), None, None),
    "image from the bottom right": ((2, 5, 6, 3), None, "bottom_right"),
    "image, two corners": ((2, 5, 7, 3), None, ("top_left", "bottom_right")),
    "image, four corners": ((2, 6, 4, 3), None, CORNERS),
    "image, same rows": ((1, 6, 4, 3), None, ("bottom_left", "bottom_right")),
    "image, one row": ((2, 1, 9, 2), None, CORNERS),
    "image, small and long kernels": ((2, 5, 6, 3), (2, 9), CORNERS),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
cases = pytest.mark.parametrize(("shape", "taps", "start"), CASES.values(), ids=CASES)
backends = pytest.mark.parametrize("backend", available("long_conv"))
every_backend = pytest.mark.parametrize("backend", available("long_conv", reference=True))


def cotangents(inputs, seed=1):
    """Weights of y."""
    generator = torch.Generator().manual_seed(seed)
    return {"y": torch.randn(inputs["x"].shape, generator=generator, dtype=torch.float64).to(inputs["x"].dtype)}


def draw(shape, taps, start, backend, **options):
    return long_conv_inputs(*shape, taps=taps, start=start, device=device_of(backend), **options)


@backends
@cases
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_outputs_and_gradients(shape, taps, start, dtype, backend):
    inputs = draw(shape, taps, start, backend, dtype=dtype)
    weights = cotangents(inputs)
    actual = run(long_conv, inputs, weights, backend=backend)
    expected = run(long_conv, to_double(inputs), weights, backend="reference")
    assert actual.keys() == expected.keys()
    for name in actual:
        slack = CANCELLATION if name in ("dkernel", "dD") else 1.0
        assert actual[name].dtype == (inputs["x"] if name == "y" else inputs[name[1:]]).dtype
        assert_close(name, actual[name], expected[name], slack=slack)


def flipped(x, start):
    """The input as the direction meets it."""
    return x.flip([axis + 1 for axis, back in enumerate(STARTS[x.ndim - 2][start]) if back])


@every_backend
@pytest.mark.parametrize(("axes", "start"), [(axes, start) for axes in STARTS for start in STARTS[axes]])
def test_a_direction_is_flip_convolve_flip(axes, start, backend):
    """Convolved by torch, channel by channel, with zeros before the start."""
    inputs = draw((2, *(7, 5)[:axes], 3), (4, 6)[:axes], start, backend, dtype=torch.float64, requires_grad=False)
    x, kernel = (inputs[name] for name in ("x", "kernel"))
    convolve = (F.conv1d, F.conv2d)[axes - 1]
    pads = [pad for taps in reversed(kernel.shape[1:]) for pad in (taps - 1, 0)]
    before = F.pad(flipped(x, start).movedim(-1, 1), pads)
    by_torch = convolve(before, kernel.flip([*range(1, axes + 1)])[:, None], groups=3).movedim(1, -1)
    expected = flipped(by_torch, start) + inputs["D"] * x
    torch.testing.assert_close(long_conv(**inputs, backend=backend), expected, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("axes", [1, 2])
def test_directions_add_up(axes, backend):
    starts = tuple(STARTS[axes])
    inputs = draw((2, *(6, 5)[:axes], 3), None, starts, backend, dtype=torch.float64, requires_grad=False)
    x, kernels, D = (inputs[name] for name in ("x", "kernel", "D"))
    each = [long_conv(x, k, start=start, backend=backend) for k, start in zip(kernels, starts, strict=True)]
    torch.testing.assert_close(long_conv(**inputs, backend=backend), sum(each) + D * x, rtol=1e-12, atol=1e-12)


@every_backend
def test_a_short_kernel_is_the_short_convolution(backend):
    inputs = draw((2, 11, 3), (4,), None, backend, dtype=torch.float64, optional=(), requires_grad=False)
    x, kernel = inputs["x"], inputs["kernel"]
    expected = causal_conv1d(x, kernel.flip(1), backend="reference")
    torch.testing.assert_close(long_conv(x, kernel, backend=backend), expected, rtol=1e-12, atol=1e-12)


@every_backend
def test_an_image_of_one_row_is_a_sequence(backend):
    inputs = draw((2, 9, 3), None, ("first", "last"), backend, dtype=torch.float64, requires_grad=False)
    image = inputs | {
        "x": inputs["x"].unsqueeze(1),
        "kernel": inputs["kernel"].unsqueeze(2),
        "start": ("top_left", "top_right"),
    }
    actual = long_conv(**image, backend=backend).squeeze(1)
    torch.testing.assert_close(actual, long_conv(**inputs, backend=backend), rtol=1e-12, atol=1e-12)


@backends
@law
@given(data=st.data())
def test_nothing_wraps_around(backend, data):
    """An impulse brings out the kernel, moved there and cut at the edges, whatever the sizes."""
    height, width, rows, cols = (data.draw(st.integers(1, 7)) for _ in range(4))
    i, j = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    start = data.draw(st.sampled_from(CORNERS))
    met = torch.zeros(1, height, width, 1, dtype=torch.float64)
    met[0, i, j] = 1.0
    x = flipped(met, start).to(device_of(backend))
    kernel = torch.rand(1, rows, cols, generator=torch.Generator().manual_seed(i + 7 * j), dtype=torch.float64)
    expected = torch.zeros(height, width, dtype=torch.float64)
    fits = kernel[0, : height - i, : width - j]
    expected[i : i + fits.shape[0], j : j + fits.shape[1]] = fits
    actual = flipped(long_conv(x, kernel.to(x.device), start=start, backend=backend).cpu(), start)
    torch.testing.assert_close(actual[0, :, :, 0], expected, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("token", [0, 4, 8])
def test_causality(token, backend):
    inputs = draw((1, 9, 2), None, None, backend, dtype=torch.float64, requires_grad=False)
    changed = inputs | {"x": inputs["x"].index_add(1, torch.tensor([token]), torch.ones(1, 1, 2, dtype=torch.float64))}
    before, after = (long_conv(**given, backend=backend) for given in (inputs, changed))
    torch.testing.assert_close(after[:, :token], before[:, :token], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, token], before[:, token])


@every_backend
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 2), (2, 0, 2), (2, 4, 0), (2, 0, 3, 2), (2, 3, 0, 2)],
    ids=["no batch", "no tokens", "no channels", "no rows", "no columns"],
)
def test_empty(shape, backend):
    taps = (3,) if len(shape) == 3 else (3, 2)
    inputs = draw(shape, taps, None, backend)
    out = run(long_conv, inputs, cotangents(inputs), backend=backend)
    assert out["y"].shape == shape
    assert not any(out[f"d{name}"].any() for name in ("x", "kernel", "D"))


@every_backend
@pytest.mark.parametrize("axes", [1, 2])
def test_gradcheck(axes, backend):
    inputs = draw((2, *(4, 3)[:axes], 2), None, tuple(STARTS[axes]), backend, dtype=torch.float64)
    start = inputs.pop("start")
    assert torch.autograd.gradcheck(
        lambda x, k, D: long_conv(x, k, D=D, start=start, backend=backend), tuple(inputs.values())
    )


@backends
def test_derivatives_of_derivatives_and_of_maps(backend):
    """It consists of operations of torch, so everything that torch derives of them holds."""
    inputs = draw((2, 5, 3), None, ("first", "last"), backend, dtype=torch.float64, requires_grad=False)
    x, given = inputs.pop("x"), inputs
    tangent = torch.randn_like(x)

    def function(x, which=backend):
        return long_conv(x, **given, backend=which).pow(2)

    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.grad(lambda x: (torch.func.grad(lambda x: f(x).sum())(x) * tangent).sum())(x),
        lambda f: torch.vmap(f)(torch.stack([x, 2 * x])),
    ):
        actual, expected = (transform(lambda x, which=which: function(x, which)) for which in (backend, "reference"))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, backend):
    def layer(x, kernel, D, start):
        return long_conv(x.sin(), kernel, D=D, start=start, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (6, 7):
        inputs = draw((2, seqlen, 3), (6,), ("first", "last"), backend)
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_views_and_repetition(backend):
    plain = draw((2, 4, 5, 3), None, CORNERS, backend)
    expected = run(long_conv, plain, cotangents(plain), backend=backend)
    views = plain | {
        "x": plain["x"].detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_(),
        "kernel": plain["kernel"].detach().mT.contiguous().mT.requires_grad_(),
    }
    again, strided = (run(long_conv, given, cotangents(plain), backend=backend) for given in (plain, views))
    for name in expected:
        assert torch.equal(again[name], expected[name])
        torch.testing.assert_close(strided[name], expected[name])
    assert strided["y"].is_contiguous()


def test_good_sizes():
    assert [good_size(n) for n in (0, 1, 7, 11, 31, 121, 447)] == [1, 1, 8, 12, 32, 125, 450]


BAD = {
    "x of two axes": ({"x": torch.zeros(2, 3)}, r"x must have shape \(batch, seqlen, dim\) or .*got \(2, 3\)"),
    "x complex": ({"x": torch.zeros(2, 6, 3).cfloat()}, "x must be of dtype float32"),
    "kernel of other channels": (
        {"kernel": torch.zeros(2, 6)},
        r"kernel must have shape \(3, 6\) \(dim, length\), got \(2, 6\)",
    ),
    "kernel of an image": (
        {"kernel": torch.zeros(3, 6, 6)},
        r"kernel must have shape \(dim, length\), got \(3, 6, 6\)",
    ),
    "too few kernels": (
        {"start": ("first", "last"), "kernel": torch.zeros(1, 3, 6)},
        r"kernel must have shape \(2, 3, 6\) \(ndirections, dim, length\), got \(1, 3, 6\)",
    ),
    "kernel without taps": ({"kernel": torch.zeros(3, 0)}, r"kernel must have at least one tap.*got \(3, 0\)"),
    "kernel too precise": ({"kernel": torch.zeros(3, 6).double()}, "kernel must be of dtype .*because x is float32"),
    "kernel elsewhere": ({"kernel": torch.zeros(3, 6, device="meta")}, "kernel must be on cpu like x, got meta"),
    "D of other channels": ({"D": torch.zeros(2)}, r"D must have shape \(3,\) \(dim\), got \(2,\)"),
    "a corner of a sequence": ({"start": "top_left"}, "start must be of first, last for x of 3 axes, got 'top_left'"),
    "no direction": ({"start": ()}, "start must name at least one direction, got none"),
    "unknown backend": ({"backend": "cpu"}, "long_conv: backend must be one of auto, reference, fft.*got 'cpu'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        long_conv(**long_conv_inputs(2, 6, 3, requires_grad=False) | changes)
