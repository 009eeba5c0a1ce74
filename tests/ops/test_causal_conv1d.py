"""causal_conv1d: every backend against the float64 reference, torch's own convolution, the official numbers."""

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_cases import compare, cotangents
from golden_cases import load, names

from ssmkit import ScanPath
from ssmkit.ops import causal_conv1d
from ssmkit.ops.causal_conv1d import BACKENDS, causal_conv1d_bwd, causal_conv1d_fwd
from ssmkit.testing import CANCELLATION, assert_close, available, causal_conv1d_inputs, device_of, run, to_double

SHAPES = {  # batch, seqlen, dim, width
    "smallest": (1, 1, 1, 1),
    "one tap": (2, 5, 3, 1),
    "shorter than the filter": (3, 2, 7, 4),
    "one short of a chunk": (2, 63, 24, 4),
    "one past a chunk": (2, 65, 33, 3),
    "several chunks": (1, 300, 70, 2),
    "wide filter": (2, 37, 18, 9),
    "trajectory": (4, 60, 16, 4),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# The package of the same name takes plain walks only; test_causal_conv1d_package has its tests.
BENDING = [backend for backend in available("causal_conv1d") if backend != "causal_conv1d"]
backends = pytest.mark.parametrize("backend", BENDING)
every_backend = pytest.mark.parametrize("backend", [*BENDING, "reference"])


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    compare(causal_conv1d_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("optional", [(), ("bias",), ("initial_state",)], ids=["bare", "bias", "state"])
def test_options(optional, activation, reverse, backend):
    inputs = causal_conv1d_inputs(2, 37, 12, 4, optional=optional, activation=activation, device=device_of(backend))
    compare(inputs, backend, reverse=reverse)


@backends
def test_large_inputs_do_not_overflow_the_activation(backend):
    inputs = causal_conv1d_inputs(1, 9, 4, 3, device=device_of(backend))
    inputs["x"] = (inputs["x"].detach() * 200).requires_grad_()
    compare(inputs, backend)


@every_backend
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_equals_the_convolution_of_torch(width, backend):
    inputs = causal_conv1d_inputs(2, 19, 6, width, dtype=torch.float64, optional=("bias",), device=device_of(backend))
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=6)).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**inputs, backend=backend), expected, rtol=1e-12, atol=1e-12)


GOLDEN = {"x": "x", "weight": "weight", "bias": "bias", "initial_states": "initial_state"}


def golden_inputs(case, dtype, device):
    """An official case in our names and layout, (batch, dim, seqlen) turned to channels last."""
    turned = {GOLDEN[k]: v.transpose(1, 2) if v.ndim == 3 else v for k, v in case.inputs.items()}
    inputs = {k: v.to(device, dtype).requires_grad_() for k, v in turned.items()}
    return inputs | {"activation": case.meta["args"]["activation"]}


def golden_expected(case):
    """Outputs and gradients by our names."""
    expected = {"y": case.outputs["out"], **{f"d{GOLDEN[k[3:]]}": v for k, v in case.gradients.items()}}
    if "final_states" in case.outputs:
        expected["final_state"] = case.outputs["final_states"]
    return {k: v.transpose(1, 2) if v.ndim == 3 else v for k, v in expected.items()}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("conv1d_w*"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    expected = golden_expected(case)
    weights = {"y": case.cotangents["out"].transpose(1, 2)}
    if "final_state" in expected:
        cotangent = case.cotangents.get("final_states", torch.zeros_like(case.outputs["final_states"]))
        weights["final_state"] = cotangent.transpose(1, 2)
    inputs = golden_inputs(case, dtype, device_of(backend))
    actual = run(causal_conv1d, inputs, weights, return_final_state="final_state" in expected, backend=backend)
    assert actual.keys() == expected.keys()
    for key in actual:
        if dtype == torch.float64:
            assert (actual[key].cpu() - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), key
        else:
            assert_close(key, actual[key], expected[key])


# Gradients of the irregular walks


IRREGULAR = {
    "resets": {"resets": torch.arange(150).remainder(9).eq(3).expand(2, 150)},
    "pads left and right": {"mask": torch.arange(150).sub(70).abs().le(60).expand(2, 150)},
    "few real tokens": {"mask": torch.arange(150).remainder(61).eq(7).expand(2, 150)},
    "no real token": {"mask": torch.zeros(2, 150, dtype=torch.bool)},
    "pads and resets": {
        "mask": torch.arange(150).remainder(5).ne(2).expand(2, 150),
        "resets": torch.arange(150).remainder(7).eq(2).expand(2, 150),
    },
    "path": {"path": ScanPath(torch.arange(150).mul(13).remainder(150))},
    "path with restarts": {"path": ScanPath(torch.arange(150).mul(7).remainder(150), restarts=[10, 140])},
    "reverse path": {"path": ScanPath.reverse(150)},
}


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("walk", IRREGULAR.values(), ids=IRREGULAR)
def test_gradients_along_irregular_walks(walk, reverse, backend):
    device = device_of(backend)
    walk = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in walk.items()}
    compare(causal_conv1d_inputs(2, 150, 9, 4, device=device), backend, reverse=reverse, **walk)


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_of_packed_sequences(reverse, backend):
    lengths = [64, 0, 1, 65, 2, 20, 0]
    offsets = torch.tensor([0, *lengths], device=device_of(backend)).cumsum(0)
    inputs = causal_conv1d_inputs(1, sum(lengths), 9, 4, nseq=len(lengths), device=device_of(backend))
    compare(inputs, backend, reverse=reverse, cu_seqlens=offsets.to(torch.int32))


@backends
def test_pads_get_no_gradient(backend):
    inputs = causal_conv1d_inputs(2, 20, 5, 3, device=device_of(backend))
    mask = torch.ones(2, 20, dtype=torch.bool, device=device_of(backend))
    mask[:, 12:15] = False
    grads = run(causal_conv1d, inputs, cotangents(inputs), return_final_state=True, backend=backend, mask=mask)
    assert (grads["dx"][:, 12:15] == 0).all()
    assert (grads["dx"][:, 11] != 0).any()


@backends
def test_several_tiles_to_a_program(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr("ssmkit.kernels.causal_conv1d.PROGRAMS", 1)
    mask = torch.arange(3000).remainder(11).ne(5).expand(1, 3000).to(device_of(backend))
    inputs = causal_conv1d_inputs(1, 3000, 3, 4, device=device_of(backend))
    weights = cotangents(inputs)
    actual = run(causal_conv1d, inputs, weights, mask=mask, return_final_state=True, backend=backend)
    expected = run(causal_conv1d, to_double(inputs), weights, mask=mask, return_final_state=True, backend="reference")
    for name in actual:
        assert_close(name, actual[name], expected[name], slack=CANCELLATION if name in ("dweight", "dbias") else 1)


@pytest.mark.parametrize("backend", [b for b in [*BENDING, "reference"] if b != "triton"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 3, 6])
def test_gradcheck(width, activation, reverse, backend):
    device = device_of(backend)
    inputs = causal_conv1d_inputs(2, 7, 3, width, dtype=torch.float64, device=device)
    names, leaves = zip(*((k, v) for k, v in inputs.items() if isinstance(v, torch.Tensor)), strict=True)
    resets = torch.zeros(2, 7, dtype=torch.bool, device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    resets[1, 3], mask[0, 2:4] = True, False
    walk = {"resets": resets, "mask": mask, "reverse": reverse, "activation": activation}

    def call(*values):
        named = dict(zip(names, values, strict=True))
        return tuple(causal_conv1d(**named, **walk, return_final_state=True, backend=backend))

    assert torch.autograd.gradcheck(call, leaves)


# Registration


@backends
def test_opcheck(backend):
    inputs = causal_conv1d_inputs(2, 9, 4, 3, device=device_of(backend))
    flags = torch.zeros(2, 9, dtype=torch.uint8, device=device_of(backend))
    tensors = [inputs[name] for name in ("x", "weight", "bias", "initial_state")]
    walk = (None, flags, None, False, True, backend)
    torch.library.opcheck(causal_conv1d_fwd, (*tensors, *walk))
    grads = cotangents(inputs)
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(causal_conv1d_bwd, (*(g.to(detached[0]) for g in grads.values()), *detached, *walk))
    torch.library.opcheck(causal_conv1d_fwd, (*detached[:2], None, None, None, None, None, True, False, backend))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@backends
def test_compile_fullgraph(backend, dynamic):
    device = device_of(backend)

    def layer(mask, **inputs):
        out = causal_conv1d(**inputs, mask=mask, return_final_state=True, backend=backend)
        return causal_conv1d(**inputs, reverse=True, backend=backend) + out.y, out.final_state

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (19, 23):
        inputs = causal_conv1d_inputs(2, seqlen, 6, 4, device=device)
        mask = torch.arange(seqlen, device=device).ne(5).expand(2, seqlen)
        weights = cotangents(inputs)
        actual, expected = (run(f, inputs, weights, mask=mask) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_export(backend):
    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias):
            return causal_conv1d(x, weight, bias, activation="silu", backend=backend)

    def args(seqlen):
        inputs = causal_conv1d_inputs(2, seqlen, 4, 3, device=device_of(backend), requires_grad=False)
        return tuple(inputs[name] for name in ("x", "weight", "bias"))

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Layer(), args(9), dynamic_shapes=({1: length}, {}, {}))
    torch.testing.assert_close(program.module()(*args(17)), Layer()(*args(17)))


# Layouts, sizes, bits


@backends
def test_views_of_wider_projections(backend):
    plain = causal_conv1d_inputs(2, 20, 6, 4, device=device_of(backend))
    x = plain["x"].detach()
    wide = torch.cat([x, x + 1], dim=-1)
    views = {
        "a slice of channels": wide[..., :6],
        "a slice of tokens": torch.cat([x, x], dim=1)[:, :20],
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens before the batch": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    expected = run(causal_conv1d, plain, cotangents(plain), return_final_state=True, backend=backend)
    for label, view in views.items():
        inputs = plain | {"x": view.requires_grad_()}
        actual = run(causal_conv1d, inputs, cotangents(plain), return_final_state=True, backend=backend)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), f"{label}: {name}"


@backends
def test_one_token_of_a_longer_row(backend):
    plain = causal_conv1d_inputs(3, 1, 6, 4, requires_grad=False, device=device_of(backend))
    longer = torch.cat([plain["x"], plain["x"]], dim=1)
    expected = causal_conv1d(**plain, backend=backend)
    assert torch.equal(causal_conv1d(**(plain | {"x": longer[:, :1]}), backend=backend), expected)


@every_backend
def test_an_expanded_gradient(backend):
    inputs = causal_conv1d_inputs(2, 9, 4, 3, dtype=torch.float64, device=device_of(backend))
    (dx,) = torch.autograd.grad(causal_conv1d(**inputs, backend=backend).sum(), inputs["x"])
    ones = torch.ones_like(inputs["x"])
    (expected,) = torch.autograd.grad(causal_conv1d(**inputs, backend="reference"), inputs["x"], ones)
    torch.testing.assert_close(dx, expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3)], ids=["batch", "tokens", "channels"])
def test_empty(shape, backend):
    inputs = causal_conv1d_inputs(*shape, device=device_of(backend))
    out = run(causal_conv1d, inputs, cotangents(inputs), return_final_state=True, backend=backend)
    assert out["y"].shape == shape[:3]
    assert all(out[f"d{name}"].shape == inputs[name].shape for name in ("x", "weight", "bias", "initial_state"))
    if shape[1] == 0:
        torch.testing.assert_close(out["final_state"], inputs["initial_state"].detach())
        torch.testing.assert_close(out["dinitial_state"].cpu(), cotangents(inputs)["final_state"])
    bare = causal_conv1d_inputs(*shape, device=device_of(backend), optional=())
    assert (causal_conv1d(**bare, return_final_state=True, backend=backend).final_state == 0).all()


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = causal_conv1d_inputs(3, 600, 40, 4, device=device_of(backend))
    once, twice = (
        run(causal_conv1d, inputs, cotangents(inputs), return_final_state=True, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.skipif("cpu" not in BENDING, reason="the compiled library is not built")
def test_the_number_of_threads_does_not_change_the_bits():
    inputs = causal_conv1d_inputs(3, 600, 70, 4)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(causal_conv1d, inputs, cotangents(inputs), return_final_state=True, backend="cpu"))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@backends
def test_a_wider_initial_state_is_rounded_to_x(backend):
    inputs = causal_conv1d_inputs(2, 9, 4, 3, dtype=torch.bfloat16, requires_grad=False, device=device_of(backend))
    rounded = inputs["initial_state"]
    wide = inputs | {"initial_state": rounded.float() * (1 + 2**-12)}
    out = causal_conv1d(**wide, return_final_state=True, backend=backend)
    expected = causal_conv1d(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(out.y, expected.y)
    assert out.final_state.dtype == torch.bfloat16


# Refusals


BAD = {
    "x not three axes": ({"x": torch.zeros(2, 6)}, r"x must have shape \(batch, seqlen, dim\), got \(2, 6\)"),
    "x of integers": ({"x": torch.zeros(2, 6, 4, dtype=torch.int64)}, "x must be of dtype float32"),
    "weight of a Conv1d": ({"weight": torch.zeros(4, 1, 3)}, r"\(dim, width\), got \(4, 1, 3\).*weight.squeeze\(1\)"),
    "weight of other channels": ({"weight": torch.zeros(5, 3)}, r"weight must have shape \(4, 3\) \(dim, width\)"),
    "no taps": ({"weight": torch.zeros(4, 0)}, "weight must have at least one tap, got width 0"),
    "weight wider than the sums": ({"weight": torch.zeros(4, 3).double()}, "weight must be of dtype .* got float64"),
    "bias per tap": ({"bias": torch.zeros(4, 3)}, r"bias must have shape \(4,\)"),
    "activation": ({"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
    "state of another width": ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state must have shape \(2, 2, 4\)"),
    "state of lower precision": ({"initial_state": torch.zeros(2, 2, 4).half()}, "initial_state must be of dtype float32"),
    "resets of floats": ({"resets": torch.zeros(2, 6)}, "resets must be of dtype bool"),
    "mask too short": ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must have shape \(2, 6\)"),
    "another device": ({"bias": torch.zeros(4, device="meta")}, "bias must be on cpu like x, got meta"),
    "path of another length": ({"path": ScanPath.identity(5)}, "path must visit 6 tokens like x, got 5"),
    "offsets of a batch": ({"cu_seqlens": torch.tensor([0, 6])}, "x must have batch 1, got 2"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    inputs = causal_conv1d_inputs(2, 6, 4, 3, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(inputs | change))


def test_offsets_with_a_path_or_descending_are_refused():
    inputs = causal_conv1d_inputs(1, 6, 4, 3, optional=(), requires_grad=False)
    with pytest.raises(ValueError, match="either path or cu_seqlens"):
        causal_conv1d(**inputs, cu_seqlens=torch.tensor([0, 6]), path=ScanPath.reverse(6))
    with pytest.raises(ValueError, match="must not descend"):
        causal_conv1d(**inputs, cu_seqlens=torch.tensor([0, 4, 2, 6]))


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("causal_conv1d"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        causal_conv1d(**causal_conv1d_inputs(2, 6, 4, 3), backend=name)
