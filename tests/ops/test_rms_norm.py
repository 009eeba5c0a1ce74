"""rms_norm: every backend against the float64 reference and the official numbers, in every combination of its options."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.ops import rms_norm
from ssmkit.ops.rms_norm import BACKENDS, rms_norm_bwd, rms_norm_fwd
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, rms_norm_inputs, run, to_double

SHAPES = {  # leading axes, dim, group_size
    "smallest": ((1,), 1, None),
    "one row": ((1, 1), 24, None),
    "no leading axis": ((), 7, None),
    "odd rows, odd channels": ((3, 37), 33, 11),
    "more rows than a block": ((150,), 20, 4),
    "a wide row": ((2,), 1500, None),
    "groups beyond the registers": ((5,), 8202, 4101),
    "groups of one": ((5,), 6, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("rms_norm"))
every_backend = pytest.mark.parametrize("backend", available("rms_norm", reference=True))


def cotangents(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    outputs = ("y", "residual") if "residual" in inputs else ("y",)
    return {name: torch.randn(inputs["x"].shape, generator=generator).to(inputs["x"].dtype) for name in outputs}


def compare(inputs, backend, **options):
    weights = cotangents(inputs)
    actual = run(rms_norm, inputs, weights, backend=backend, **options)
    expected = run(rms_norm, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], slack=slack(name))
    return actual


def slack(name):
    return CANCELLATION if name in ("dweight", "dbias") else 1.0


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("leading", "dim", "group"), SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(leading, dim, group, dtype, backend):
    inputs = rms_norm_inputs(*leading, dim, dtype=dtype, device=device_of(backend))
    compare(inputs, backend, group_size=group)


@pytest.mark.skipif("triton" not in available("rms_norm"), reason="Triton cannot run here")
@pytest.mark.parametrize("group", [33, 4101], ids=["narrow", "wide"])
def test_triton_programs_of_several_tiles(group, monkeypatch):
    """Small tiles and few programs: each adds up the parameters' gradients over three tiles, the last one partial."""
    kernels = importlib.import_module("ssmkit.kernels.rms_norm")
    tiles = kernels.configuration
    monkeypatch.setattr(kernels, "configuration", lambda *key: {**tiles(*key), "ROWS": 2})
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)
    compare(rms_norm_inputs(19, group, device=device_of("triton")), "triton")


OPTIONS = {
    "bare": (),
    "bias": ("bias",),
    "gate": ("z",),
    "residual": ("residual",),
    "residual and gate": ("residual", "z"),
    "all": ("bias", "residual", "z"),
}


@backends
@pytest.mark.parametrize("before", [True, False], ids=["norm before gate", "gate before norm"])
@pytest.mark.parametrize("optional", OPTIONS.values(), ids=OPTIONS)
def test_options(optional, before, backend):
    inputs = rms_norm_inputs(3, 20, 24, optional=optional, device=device_of(backend))
    compare(inputs, backend, norm_before_gate=before, group_size=8, eps=1e-3)


@backends
@pytest.mark.parametrize("wide", [True, False], ids=["residual in fp32", "residual as x"])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32], ids=["from bf16", "from fp32"])
def test_residual_stream_in_fp32(residual_dtype, wide, backend):
    inputs = rms_norm_inputs(30, 24, optional=(), dtype=torch.bfloat16, device=device_of(backend))
    inputs["residual"] = torch.randn(30, 24).to(residual_dtype).to(inputs["x"].device).requires_grad_()
    out = compare(inputs, backend, residual_in_fp32=wide)
    assert out["y"].dtype == torch.bfloat16
    assert out["residual"].dtype == (torch.float32 if wide else residual_dtype)
    assert out["dresidual"].dtype == residual_dtype
    assert out["dx"].dtype == torch.bfloat16


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("gated_rmsnorm_*") + names("rmsnorm_nogate"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    args = case.meta["args"]
    inputs = {k: v.to(device_of(backend), dtype).requires_grad_() for k, v in case.inputs.items()}
    options = {k: args[k] for k in ("eps", "group_size", "norm_before_gate") if k in args}
    actual = run(rms_norm, inputs, {"y": case.cotangents["out"]}, backend=backend, **options)
    expected = {"y": case.outputs["out"], **{f"d{k.removeprefix('in.')}": v for k, v in case.gradients.items()}}
    assert actual.keys() == expected.keys()
    for key in actual:
        if dtype == torch.float64:
            assert (actual[key].cpu() - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), key
        else:
            assert_close(key, actual[key], expected[key], slack=slack(key))


@every_backend
def test_equals_torch(backend):
    inputs = rms_norm_inputs(11, 24, optional=("residual",), dtype=torch.float64, device=device_of(backend))
    y, total = rms_norm(**inputs, backend=backend)
    torch.testing.assert_close(total, inputs["x"] + inputs["residual"])
    torch.testing.assert_close(y, F.rms_norm(total, (24,), inputs["weight"], 1e-5))


@every_backend
def test_scale_does_not_matter(backend):
    inputs = rms_norm_inputs(4, 24, optional=(), dtype=torch.float64, requires_grad=False, device=device_of(backend))
    scaled = inputs | {"x": inputs["x"] * 1e3}
    torch.testing.assert_close(
        rms_norm(**scaled, eps=0.0, backend=backend), rms_norm(**inputs, eps=0.0, backend=backend)
    )


@pytest.mark.parametrize("backend", [b for b in available("rms_norm", reference=True) if b != "triton"])
@pytest.mark.parametrize("before", [True, False], ids=["norm before gate", "gate before norm"])
def test_gradcheck(before, backend):
    inputs = rms_norm_inputs(3, 6, dtype=torch.float64, device=device_of(backend))

    def call(*values):
        named = dict(zip(inputs, values, strict=True))
        return tuple(rms_norm(**named, group_size=3, norm_before_gate=before, backend=backend))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@backends
def test_opcheck(backend):
    inputs = rms_norm_inputs(5, 6, device=device_of(backend))
    args = tuple(inputs[name] for name in ("x", "weight", "bias", "residual", "z"))
    torch.library.opcheck(rms_norm_fwd, (*args, 1e-5, 3, True, True, backend))
    plain = [value.detach() for value in args]
    y, total, rstd = rms_norm_fwd(*plain, 1e-5, 3, True, True, backend)
    torch.library.opcheck(
        rms_norm_bwd, (torch.ones_like(y), None, total, None, plain[1], plain[2], plain[4], rstd, 3, True, backend)
    )


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, backend):
    def layer(**inputs):
        return tuple(rms_norm(**inputs, group_size=4, backend=backend))

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 11):
        inputs = rms_norm_inputs(2, rows, 8, device=device_of(backend))
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_views(backend):
    """Halves of a projection, and a layout that has no rows, give the same bits as dense tensors."""
    dense = rms_norm_inputs(4, 9, 6, optional=("z",), device=device_of(backend))
    expected = run(rms_norm, dense, cotangents(dense), backend=backend)
    x, z = torch.cat([dense["x"], dense["z"]], dim=-1).detach().chunk(2, dim=-1)
    turned = [t.detach().transpose(0, 2).contiguous().transpose(0, 2) for t in (dense["x"], dense["z"])]
    for pair in ((x, z), turned):
        views = dense | {name: value.requires_grad_() for name, value in zip(("x", "z"), pair, strict=True)}
        actual = run(rms_norm, views, cotangents(dense), backend=backend)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 6)], ids=str)
def test_empty(shape, backend):
    inputs = rms_norm_inputs(*shape, device=device_of(backend))
    out = run(rms_norm, inputs, cotangents(inputs), backend=backend)
    assert out["y"].shape == shape
    assert (out["dweight"] == 0).all()


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = rms_norm_inputs(200, 40, device=device_of(backend))
    once, twice = (run(rms_norm, inputs, cotangents(inputs), backend=backend) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


BAD = {
    "no axis": ({"x": torch.tensor(1.0)}, r"x must have shape \(\.\.\., dim\), got \(\)"),
    "integers": ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x must be of dtype float32"),
    "weight too long": ({"weight": torch.ones(5)}, r"weight must have shape \(4,\) \(dim\), got \(5,\)"),
    "weight too wide": ({"weight": torch.ones(4).double()}, "weight must be of dtype .* because x is float32, got float64"),
    "bias of another shape": ({"bias": torch.ones(4, 1)}, "bias must have shape"),
    "residual of another shape": ({"residual": torch.ones(4)}, r"residual must have shape \(3, 4\)"),
    "residual of fp16": ({"residual": torch.ones(3, 4).half()}, "residual must be of dtype float32"),
    "z of another dtype": ({"z": torch.ones(3, 4).bfloat16()}, "z must be of dtype float32 like x, got bfloat16"),
    "group that does not divide": ({"group_size": 3}, "group_size must be at least 1 and divide dim 4, got 3"),
    "another device": ({"weight": torch.ones(4, device="meta")}, "weight must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "fast"}, "rms_norm: backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**({"x": torch.zeros(3, 4), "weight": torch.ones(4)} | change))


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("rms_norm"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        rms_norm(torch.zeros(3, 4), torch.ones(4), backend=name)
