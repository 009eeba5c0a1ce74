"""ssm2d_kernel: every backend against the float64 reference, the published recurrence cell by cell, transposition."""

import pytest
import torch

from ssmkit.ops import ssm2d_kernel
from ssmkit.ops.ssm2d_kernel import ssm2d_kernel_bwd, ssm2d_kernel_fwd
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, run, ssm2d_kernel_inputs, to_double

SHAPES = {  # height, width, ngroups, channels, dstate
    "smallest": (1, 1, 1, 1, 1),
    "one row": (1, 7, 2, 6, 3),
    "one column": (7, 1, 2, 4, 3),
    "odd everything": (5, 3, 3, 9, 7),
    "wider than high": (4, 9, 2, 2, 16),
}
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
backends = pytest.mark.parametrize("backend", available("ssm2d_kernel"))
every_backend = pytest.mark.parametrize("backend", available("ssm2d_kernel", reference=True))


def cotangents(inputs, seed=1):
    """Weights of K."""
    generator = torch.Generator().manual_seed(seed)
    shape = (inputs["C"].shape[1], inputs["height"], inputs["width"])
    return {"K": torch.randn(shape, generator=generator, dtype=torch.float64)}


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    inputs = ssm2d_kernel_inputs(*shape, dtype=dtype, device=device_of(backend))
    weights = cotangents(inputs)
    actual = run(ssm2d_kernel, inputs, weights, backend=backend)
    expected = run(ssm2d_kernel, to_double(inputs), weights, backend="reference")
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == (inputs["A"] if name != "K" else inputs["A"].abs()).dtype
        assert_close(name, actual[name], expected[name], slack=1.0 if name == "K" else CANCELLATION)


def published(A, B, C, height, width):
    """The paper's recurrence: half of a sum only where both of its states can differ from zero, borders doubled."""
    A, B, C = (t.detach().cpu() for t in (A, B, C))
    ngroups, dstate = A.shape[1:]
    h = torch.zeros(height, width, ngroups, dstate, dtype=A.dtype)
    v = torch.zeros_like(h)
    for i in range(height):
        for j in range(width):
            alpha_h = 0.5 if (i == 0 and j == 1) or (i >= 1 and j >= 2) else 1.0
            alpha_v = 0.5 if (i == 1 and j == 0) or (i >= 2 and j >= 1) else 1.0
            if j > 0:
                h[i, j] = alpha_h * (A[0] * h[i, j - 1] + A[1] * v[i, j - 1])
            if i > 0:
                v[i, j] = alpha_v * (A[2] * h[i - 1, j] + A[3] * v[i - 1, j])
            if i == j == 0:
                h[i, j], v[i, j] = B
    group = torch.arange(C.shape[1]) % ngroups
    K = (C[0] * h[:, :, group] + C[1] * v[:, :, group]).sum(-1) / dstate**0.5
    K = K.real.clone() if K.is_complex() else K
    K[0] *= 2
    K[:, 0] *= 2
    K[0, 0] /= 4
    return K.permute(2, 0, 1)


@every_backend
@wide_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_published_recurrence(shape, dtype, backend):
    inputs = ssm2d_kernel_inputs(*shape, dtype=dtype, device=device_of(backend), requires_grad=False)
    torch.testing.assert_close(
        ssm2d_kernel(**inputs, backend=backend).cpu(), published(**inputs), rtol=1e-12, atol=1e-12
    )


def test_where_the_published_recurrence_halves():
    """A sum is halved where both terms can differ from zero: there, and nowhere else."""
    reached_h, reached_v = {(0, 0)}, {(0, 0)}
    for i in range(6):
        for j in range(6):
            from_h, from_v = (i, j - 1) in reached_h, (i, j - 1) in reached_v
            assert (from_h and from_v) == ((i == 0 and j == 1) or (i >= 1 and j >= 2))
            if from_h or from_v:
                reached_h.add((i, j))
            from_h, from_v = (i - 1, j) in reached_h, (i - 1, j) in reached_v
            assert (from_h and from_v) == ((i == 1 and j == 0) or (i >= 2 and j >= 1))
            if from_h or from_v:
                reached_v.add((i, j))


@every_backend
@wide_dtypes
def test_transposed(dtype, backend):
    """Rows and columns change places with the two kinds of states."""
    inputs = ssm2d_kernel_inputs(4, 6, 2, 4, 3, dtype=dtype, device=device_of(backend), requires_grad=False)
    A, B, C = (inputs[name] for name in "ABC")
    other = ssm2d_kernel(A.flip(0), B.flip(0), C.flip(0), 6, 4, backend=backend)
    torch.testing.assert_close(other.mT, ssm2d_kernel(**inputs, backend=backend), rtol=1e-12, atol=1e-12)


@every_backend
def test_a_smaller_kernel_is_a_corner_of_a_larger_one(backend):
    inputs = ssm2d_kernel_inputs(6, 5, 2, 4, 3, dtype=torch.float64, device=device_of(backend), requires_grad=False)
    smaller = ssm2d_kernel(**inputs | {"height": 3, "width": 4}, backend=backend)
    torch.testing.assert_close(smaller, ssm2d_kernel(**inputs, backend=backend)[:, :3, :4], rtol=1e-12, atol=1e-12)


@every_backend
def test_one_row_of_models_that_do_not_mix_is_a_geometric_series(backend):
    inputs = ssm2d_kernel_inputs(1, 9, 2, 2, 1, dtype=torch.float64, device=device_of(backend), requires_grad=False)
    A, B, C = (inputs[name] for name in "ABC")
    A = torch.stack([A[0], torch.zeros_like(A[0]), A[2], A[3]])
    K = ssm2d_kernel(A, B, C, 1, 9, backend=backend)[:, 0]
    expected = C[0] * B[0] * A[0] ** torch.arange(9, device=A.device)
    expected[:, 0] += (C[1] * B[1])[:, 0]
    torch.testing.assert_close(K, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [b for b in available("ssm2d_kernel", reference=True) if b != "triton"])
@wide_dtypes
@pytest.mark.parametrize("size", [(3, 3), (1, 4), (4, 1)], ids=str)
def test_gradcheck(size, dtype, backend):
    inputs = ssm2d_kernel_inputs(*size, 2, 4, 2, dtype=dtype, device=device_of(backend))
    A, B, C = (inputs[name] for name in "ABC")
    assert torch.autograd.gradcheck(lambda *given: ssm2d_kernel(*given, *size, backend=backend), (A, B, C))


# Registration


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["fp32", "complex64"])
def test_opcheck(dtype, backend):
    inputs = ssm2d_kernel_inputs(3, 4, 2, 4, 2, dtype=dtype, device=device_of(backend))
    A, B, C = (inputs[name] for name in "ABC")
    torch.library.opcheck(ssm2d_kernel_fwd, (A, B, C, 3, 4, True, backend))
    A, B, C = (t.detach() for t in (A, B, C))
    K, h, v = ssm2d_kernel_fwd(A, B, C, 3, 4, True, backend)
    torch.library.opcheck(ssm2d_kernel_bwd, (torch.ones_like(K), A, C, h, v, backend))


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, backend):
    def layer(A, B, C, height, width):
        return ssm2d_kernel(A.sigmoid(), B, C, height, width, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for width in (3, 4):
        inputs = ssm2d_kernel_inputs(3, width, 2, 4, 2, device=device_of(backend))
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


# Layouts, sizes, bits


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["fp32", "complex64"])
def test_views(dtype, backend):
    plain = ssm2d_kernel_inputs(3, 4, 2, 4, 3, dtype=dtype, device=device_of(backend))
    views = {
        "states outermost": {k: plain[k].detach().movedim(-1, 0).contiguous().movedim(0, -1) for k in "ABC"},
        "groups by column": {k: plain[k].detach().mT.contiguous().mT for k in "ABC"},
        "conjugated and negated lazily": {k: (-plain[k].detach().conj().resolve_conj()).conj().neg() for k in "ABC"},
    }
    expected = run(ssm2d_kernel, plain, cotangents(plain), backend=backend)
    for label, changed in views.items():
        strided = plain | {k: v.requires_grad_() for k, v in changed.items()}
        actual = run(ssm2d_kernel, strided, cotangents(plain), backend=backend)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), f"{label}: {name}"


@every_backend
@pytest.mark.parametrize("size", [(0, 3), (3, 0)], ids=str)
def test_empty(size, backend):
    inputs = ssm2d_kernel_inputs(*size, 2, 4, 3, device=device_of(backend))
    if backend == "reference":
        assert ssm2d_kernel(**inputs, backend=backend).shape == (4, *size)
        return
    out = run(ssm2d_kernel, inputs, cotangents(inputs), backend=backend)
    assert out["K"].shape == (4, *size)
    assert not any(out[f"d{name}"].any() for name in "ABC")


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["fp32", "complex64"])
def test_threads_and_repetition_do_not_change_the_bits(dtype, backend):
    inputs = ssm2d_kernel_inputs(4, 5, 5, 5, 9, dtype=dtype, device=device_of(backend))
    runs = []
    for threads in (1, 3, 3, 40) if backend == "cpu" else (1, 1):
        torch.set_num_threads(threads)
        runs.append(run(ssm2d_kernel, inputs, cotangents(inputs), backend=backend))
    for other in runs[1:]:
        assert all(torch.equal(other[name], runs[0][name]) for name in other)


@backends
def test_parameters_in_lower_precision_are_widened(backend):
    inputs = ssm2d_kernel_inputs(3, 4, 2, 4, 3, dtype=torch.bfloat16, device=device_of(backend))
    actual = run(ssm2d_kernel, inputs, cotangents(inputs), backend=backend)
    expected = run(ssm2d_kernel, to_double(inputs), cotangents(inputs), backend="reference")
    assert actual["K"].dtype == torch.float32
    for name in actual:
        assert_close(name, actual[name], expected[name], slack=1.0 if name == "K" else CANCELLATION)


@backends
def test_nothing_is_kept_where_no_gradient_is_wanted(backend):
    inputs = ssm2d_kernel_inputs(3, 4, 2, 4, 3, device=device_of(backend), requires_grad=False)
    for save in (False, True):
        _, h, v = ssm2d_kernel_fwd(*inputs.values(), save, backend)
        assert h.shape == v.shape == ((3, 4, 2, 3) if save else (0,))


# Refusals

BAD = {
    "A of three matrices": (
        {"A": torch.zeros(3, 2, 3)},
        r"A must have shape \(4, 2, 3\) \(4, ngroups, dstate\).*got \(3",
    ),
    "A of one axis": ({"A": torch.zeros(4)}, r"A must have shape \(4, ngroups, dstate\), got \(4,\)"),
    "A of integers": ({"A": torch.zeros(4, 2, 3, dtype=torch.int64)}, "A must be of dtype float32"),
    "B of other groups": ({"B": torch.zeros(2, 1, 3)}, r"B must have shape \(2, 2, 3\).*got \(2, 1, 3\)"),
    "C of other states": ({"C": torch.zeros(2, 4, 2)}, r"C must have shape \(2, 4, 3\).*got \(2, 4, 2\)"),
    "C complex": ({"C": torch.zeros(2, 4, 3).cfloat()}, "C must be of dtype float32 like A, got complex64"),
    "channels of no group": ({"C": torch.zeros(2, 5, 3)}, "A has 2 groups, which must divide the 5 channels of C"),
    "no states": (
        {"A": torch.zeros(4, 2, 0), "B": torch.zeros(2, 2, 0), "C": torch.zeros(2, 4, 0)},
        "A must have at least one state",
    ),
    "negative width": ({"width": -1}, r"width must be from 0 to 2\*\*31 - 1, got -1"),
    "B elsewhere": ({"B": torch.zeros(2, 2, 3, device="meta")}, "B must be on cpu like A, got meta"),
    "unknown backend": ({"backend": "table"}, "ssm2d_kernel: backend must be one of auto, reference.*got 'table'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        ssm2d_kernel(**ssm2d_kernel_inputs(3, 4, 2, 4, 3, requires_grad=False) | changes)
