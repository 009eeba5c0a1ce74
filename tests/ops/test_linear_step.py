"""linear_step: each backend against the float64 reference; a row is what it is alone, on any number of threads."""

import pytest
import torch
from torch import nn

from ssmkit.ops import linear_step
from ssmkit.ops.linear_step import BACKENDS, linear_step_op
from ssmkit.testing import assert_close, available, device_of, linear_step_inputs, to_double

SHAPES = {  # batch, in_features, out_features
    "smallest": (1, 1, 1),
    "one feature short of a vector": (2, 15, 7),
    "odd": (3, 77, 33),
    "a tail of vectors": (4, 1000, 65),
    "five rows": (5, 150, 40),
    "eight rows": (8, 64, 96),
    "more rows than one walk serves": (19, 130, 34),
    "enough for two threads": (1, 768, 900),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("linear_step"))
every_backend = pytest.mark.parametrize("backend", available("linear_step", reference=True))


def compare(inputs, backend):
    assert_close("y", linear_step(**inputs, backend=backend), linear_step(**to_double(inputs), backend="reference"))


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output(shape, dtype, backend):
    compare(linear_step_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


@every_backend
def test_without_a_bias(backend):
    inputs = linear_step_inputs(3, 20, 9, optional=(), dtype=torch.float64, device=device_of(backend))
    expected = (inputs["x"][:, None] * inputs["weight"]).sum(-1)
    torch.testing.assert_close(linear_step(**inputs, backend=backend), expected)


@every_backend
def test_views(backend):
    """Rows of a longer row, a transposed weight, every other entry of a bias."""
    inputs = linear_step_inputs(3, 40, 9, device=device_of(backend))
    padded = {name: torch.cat([inputs[name], inputs[name] + 1], dim=-1)[..., :40] for name in ("x", "weight")}
    expected = linear_step(**inputs, backend=backend)
    assert torch.equal(linear_step(**padded, bias=inputs["bias"], backend=backend), expected)
    turned = inputs | {name: inputs[name].mT.contiguous().mT for name in ("x", "weight")}
    turned["bias"] = inputs["bias"].repeat_interleave(2)[::2]
    assert torch.equal(linear_step(**turned, backend=backend), expected)
    repeated = inputs | {"x": inputs["x"][:1].expand(3, 40)}
    assert torch.equal(linear_step(**repeated, backend=backend)[2], expected[0])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_is_what_it_is_alone(dtype, backend):
    inputs = linear_step_inputs(13, 150, 37, dtype=dtype, device=device_of(backend))
    together = linear_step(**inputs, backend=backend)
    for b in range(13):
        alone = linear_step(inputs["x"][b : b + 1], inputs["weight"], inputs["bias"], backend=backend)
        assert torch.equal(together[b], alone[0])
    for o in (0, 5, 36):
        one = linear_step(inputs["x"], inputs["weight"][o : o + 1], inputs["bias"][o : o + 1], backend=backend)
        assert torch.equal(together[:, o], one[:, 0])


@pytest.mark.skipif("cpu" not in available("linear_step"), reason="the compiled library is not here")
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing(batch):
    inputs, threads = linear_step_inputs(batch, 512, 1100), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear_step(**inputs, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_backend
def test_empty(backend):
    for shape in ((0, 4, 5), (3, 4, 0)):
        y = linear_step(**linear_step_inputs(*shape, device=device_of(backend)), backend=backend)
        assert y.shape == (shape[0], shape[2])
    inputs = linear_step_inputs(3, 0, 5, device=device_of(backend))
    assert torch.equal(linear_step(**inputs, backend=backend), inputs["bias"].expand(3, 5))


@backends
def test_opcheck(backend):
    inputs = linear_step_inputs(2, 20, 6, device=device_of(backend))
    torch.library.opcheck(linear_step_op, (*inputs.values(), backend))


@backends
def test_compile_fullgraph(backend):
    compiled = torch.compile(linear_step, fullgraph=True, backend="aot_eager")
    inputs = linear_step_inputs(2, 20, 6, device=device_of(backend))
    assert torch.equal(compiled(**inputs, backend=backend), linear_step(**inputs, backend=backend))


@backends
def test_export(backend):
    class Layer(nn.Module):
        def forward(self, x, weight, bias):
            return linear_step(x, weight, bias, backend=backend)

    inputs = tuple(linear_step_inputs(2, 20, 6, device=device_of(backend)).values())
    exported = torch.export.export(Layer(), inputs).module()
    assert torch.equal(exported(*inputs), linear_step(*inputs, backend=backend))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@every_backend
def test_a_gradient_is_refused(name, backend):
    inputs = linear_step_inputs(2, 20, 6, device=device_of(backend))
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"no gradient and {name} requires one.*torch\.nn\.functional\.linear"):
        linear_step(**inputs, backend=backend)
    with torch.no_grad():
        assert not linear_step(**inputs, backend=backend).requires_grad


BAD = {
    "x of three axes": ({"x": torch.zeros(2, 1, 20)}, r"x must have shape \(batch, in_features\), got \(2, 1, 20\)"),
    "x of integers": ({"x": torch.zeros(2, 20, dtype=torch.int64)}, "x must be of dtype float32, .* got int64"),
    "other features": ({"weight": torch.zeros(6, 19)}, r"weight must have shape \(6, 20\)"),
    "weight of one axis": ({"weight": torch.zeros(20)}, r"weight must have shape \(out_features, in_features\)"),
    "another dtype": ({"weight": torch.zeros(6, 20).half()}, "weight must be of dtype float32 like x, got float16"),
    "bias of other features": ({"bias": torch.zeros(7)}, r"bias must have shape \(6,\) \(out_features\), got \(7,\)"),
    "bias of another dtype": ({"bias": torch.zeros(6).double()}, "bias must be of dtype float32 like x"),
    "another device": ({"weight": torch.zeros(6, 20, device="meta")}, "weight must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "blas"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_step(**(linear_step_inputs(2, 20, 6) | change))


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("linear_step"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        linear_step(**linear_step_inputs(1, 4, 4), backend=name)
