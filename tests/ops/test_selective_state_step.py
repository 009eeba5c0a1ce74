"""selective_state_step: each backend against the float64 reference, the scan it is a token of, the official numbers."""

import importlib

import pytest
import torch
from golden_cases import load, names
from step_cases import (
    compare_compiled,
    compare_narrow_state,
    compare_slots,
    compare_step,
    refuse,
    refuse_a_missing_slot,
    skip_a_missing_slot,
)

from ssmkit.ops import selective_scan, selective_state_step
from ssmkit.ops.selective_state_step import BACKENDS, selective_state_step_op
from ssmkit.testing import (
    assert_close,
    available,
    device_of,
    selective_scan_inputs,
    selective_state_step_inputs,
)

SHAPES = {  # batch, dim, dstate
    "smallest": (1, 1, 1),
    "odd": (3, 7, 5),
    "one vector of states": (2, 33, 16),
    "more states than lanes": (2, 20, 37),
    "enough for two threads": (4, 520, 16),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("selective_state_step"))
every_backend = pytest.mark.parametrize("backend", available("selective_state_step", reference=True))


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_state(shape, dtype, backend):
    compare_step(
        selective_state_step, selective_state_step_inputs(*shape, dtype=dtype, device=device_of(backend)), backend
    )


OPTIONS = {
    "bare": {"optional": ()},
    "skip": {"optional": ("D",)},
    "gate": {"optional": ("z",)},
    "bias": {"optional": ("dt_bias",)},
    "groups": {"ngroups": 3},
}


@backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, backend):
    compare_step(
        selective_state_step, selective_state_step_inputs(2, 12, 5, device=device_of(backend), **options), backend
    )


@backends
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_state_of_lower_precision(state_dtype, backend):
    inputs = selective_state_step_inputs(2, 12, 5, device=device_of(backend))
    compare_narrow_state(selective_state_step, inputs, state_dtype, backend)


@every_backend
def test_steps_equal_the_scan(backend):
    inputs = selective_scan_inputs(2, 9, 6, 4, dtype=torch.float64, ngroups=2, requires_grad=False)
    inputs = {k: v.to(device_of(backend)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    y, final_state = selective_scan(**inputs, return_final_state=True, backend="reference")
    shared = {k: inputs[k] for k in ("A", "D", "dt_bias", "dt_softplus")}
    state = inputs["initial_state"].clone()
    for token in range(9):
        rows = {k: inputs[k][:, token] for k in ("x", "dt", "B", "C", "z")}
        stepped = selective_state_step(state, **rows, **shared, backend=backend)
        torch.testing.assert_close(stepped, y[:, token], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("state_update_flat*"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    given = {k: v.to(device_of(backend), dtype) for k, v in case.inputs.items()}
    shared = {k: given[k] for k in ("A", "D", "dt_bias") if k in given}
    state = given["state"]
    for step in range(case.meta["args"]["steps"]):
        rows = {k: given[f"{k}{step}"] for k in ("x", "dt", "B", "C", "z") if f"{k}{step}" in given}
        y = selective_state_step(state, **rows, **shared, dt_softplus=case.meta["args"]["dt_softplus"], backend=backend)
        for key, actual in ((f"out{step}", y), (f"state{step}", state)):
            expected = case.outputs[key]
            if dtype == torch.float64:
                assert (actual.cpu() - expected).abs().max() <= 1e-10 * expected.abs().max(), key
            else:
                assert_close(key, actual, expected)


@every_backend
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slots(index_dtype, backend):
    inputs = selective_state_step_inputs(3, 6, 4, dtype=torch.float64, device=device_of(backend))
    compare_slots(selective_state_step, inputs, index_dtype, backend)


# On a GPU nothing waits for the values.
@pytest.mark.parametrize(
    "backend", [b for b in available("selective_state_step", reference=True) if device_of(b).type == "cpu"]
)
def test_a_slot_that_does_not_exist_is_refused(backend):
    refuse_a_missing_slot(selective_state_step, selective_state_step_inputs(2, 6, 4), backend)


@pytest.mark.skipif("triton" not in available("selective_state_step"), reason="Triton cannot run here")
def test_triton_skips_a_slot_that_does_not_exist():
    inputs = selective_state_step_inputs(2, 6, 4, device=device_of("triton"))
    arguments = [inputs[name] for name in ("x", "dt", "A")] + [inputs[name].unsqueeze(1) for name in ("B", "C")]
    arguments += [inputs[name] for name in ("D", "z", "dt_bias")] + [inputs["dt_softplus"]]
    kernels = importlib.import_module("ssmkit.kernels.selective_state_step")
    skip_a_missing_slot(kernels.step, selective_state_step, inputs, arguments)


@every_backend
def test_views_of_a_projection(backend):
    inputs = selective_state_step_inputs(3, 6, 4, device=device_of(backend))
    x, z, dt, B, C = torch.cat([inputs[k].flatten(1) for k in ("x", "z", "dt", "B", "C")], -1).split(
        (6, 6, 6, 4, 4), -1
    )
    views = inputs | {"x": x, "z": z, "dt": dt, "B": B, "C": C, "state": inputs["state"].clone()}
    assert torch.equal(selective_state_step(**views, backend=backend), selective_state_step(**inputs, backend=backend))
    assert torch.equal(views["state"], inputs["state"])


@every_backend
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4)], ids=str)
def test_empty(shape, backend):
    inputs = selective_state_step_inputs(*shape, device=device_of(backend))
    assert selective_state_step(**inputs, backend=backend).shape == shape[:2]


@backends
def test_opcheck(backend):
    inputs = selective_state_step_inputs(2, 6, 4, device=device_of(backend))
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    torch.library.opcheck(selective_state_step_op, (*(inputs[name] for name in order), True, None, backend))


@backends
def test_compile_fullgraph(backend):
    compare_compiled(selective_state_step, selective_state_step_inputs(2, 6, 4, device=device_of(backend)), backend)


BAD = {
    "x per token": ({"x": torch.zeros(2, 1, 6)}, r"x must have shape \(batch, dim\), got \(2, 1, 6\)"),
    "state of another batch": ({"state": torch.zeros(3, 6, 4)}, r"state must have shape \(2, 6, 4\)"),
    "state that cannot be updated": ({"state": torch.zeros(2, 4, 6).mT}, "state must be contiguous to be updated in place"),
    "state too wide": ({"state": torch.zeros(2, 6, 4).double()}, "state must be of dtype .* got float64"),
    "dt of another shape": ({"dt": torch.zeros(2, 5)}, r"dt must have shape \(2, 6\)"),
    "A of another shape": ({"A": torch.zeros(5, 4)}, r"A must have shape \(6, 4\)"),
    "B of another dtype": ({"B": torch.zeros(2, 4).half()}, "B must be of dtype float32 like x"),
    "groups that do not divide": ({"C": torch.zeros(2, 4, 4)}, "C has 4 groups, which must divide dim 6"),
    "slots of floats": ({"state_indices": torch.zeros(2)}, "state_indices must be of dtype int32, int64"),
    "too many slots": ({"state_indices": torch.zeros(3, dtype=torch.int64)}, r"state_indices must have shape \(2,\)"),
    "another device": ({"A": torch.zeros(6, 4, device="meta")}, "A must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "simd"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    refuse(selective_state_step, selective_state_step_inputs(2, 6, 4), change, message)


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("selective_state_step"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        selective_state_step(**selective_state_step_inputs(2, 6, 4), backend=name)
