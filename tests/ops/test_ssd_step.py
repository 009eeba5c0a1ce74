"""ssd_step: each backend against the float64 reference, the op that it is a token of, the official numbers."""

import importlib
import math

import pytest
import torch
from golden_cases import load
from step_cases import (
    compare_compiled,
    compare_narrow_state,
    compare_slots,
    compare_step,
    refuse,
    refuse_a_missing_slot,
    skip_a_missing_slot,
)

from ssmkit.ops import ssd, ssd_step
from ssmkit.ops.ssd_step import BACKENDS, ssd_step_op
from ssmkit.testing import available, device_of, ssd_inputs, ssd_step_inputs

SHAPES = {  # batch, nheads, headdim, dstate
    "smallest": (1, 1, 1, 1),
    "odd": (3, 3, 7, 5),
    "one vector of states": (2, 2, 33, 16),
    "more states than lanes": (2, 5, 20, 37),
    "more states than Triton's tile": (1, 2, 6, 300),
    "enough for two threads": (2, 4, 64, 128),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("ssd_step"))
every_backend = pytest.mark.parametrize("backend", available("ssd_step", reference=True))


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_state(shape, dtype, backend):
    compare_step(ssd_step, ssd_step_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


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
    compare_step(ssd_step, ssd_step_inputs(2, 6, 5, 7, device=device_of(backend), **options), backend)


@backends
def test_skip_per_channel_without_softplus_within_limits(backend):
    inputs = ssd_step_inputs(2, 6, 5, 7, device=device_of(backend))
    inputs |= {"D": torch.randn(6, 5).to(device_of(backend)), "dt": inputs["dt"].abs() + 1.8, "dt_softplus": False}
    dt = inputs["dt"] + inputs["dt_bias"]
    limits = (dt.quantile(0.25).item(), dt.quantile(0.75).item())
    compare_step(ssd_step, inputs | {"dt_limit": limits}, backend)


@backends
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_state_of_lower_precision(state_dtype, backend):
    inputs = ssd_step_inputs(2, 3, 4, 21, device=device_of(backend))
    compare_narrow_state(ssd_step, inputs, state_dtype, backend)


def walk(state, inputs, shared, backend, tokens=None):
    """Token by token; y of all of them, or of the first `tokens`."""
    y = []
    for token in range(inputs["x"].shape[1] if tokens is None else tokens):
        rows = {k: inputs[k][:, token] for k in ("x", "dt", "B", "C", "z") if k in inputs}
        y.append(ssd_step(state, **rows, **shared, backend=backend))
    return torch.stack(y, 1)


@every_backend
def test_steps_equal_the_op(backend):
    inputs = ssd_inputs(2, 9, 4, 3, 5, dtype=torch.float64, ngroups=2, requires_grad=False)
    inputs = {k: v.to(device_of(backend)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    inputs["dt_limit"] = (0.02, 0.2)
    expected, final_state = ssd(**inputs, return_final_state=True, backend="reference")
    shared = {k: inputs[k] for k in ("A", "D", "dt_bias", "dt_softplus", "dt_limit")}
    state = inputs["initial_state"].clone()
    torch.testing.assert_close(walk(state, inputs, shared, backend), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("name", ["ssd_dt_limit", "ssd_D_hp", "ssd_full_g2_init_final"])
def test_official_numbers_of_the_op(name, backend):
    """The official chunked form, walked token by token."""
    case = load(name)
    args, device = case.meta["args"], device_of(backend)
    given = {k: v.to(device, torch.float64) for k, v in case.inputs.items()}
    shared = {k: given[k] for k in ("A", "D", "dt_bias") if k in given}
    low, high = args["dt_limit"]
    shared |= {"dt_softplus": args["dt_softplus"], "dt_limit": (low, math.inf if high is None else high)}
    batch, _, nheads, headdim = given["x"].shape
    state = given.get("initial_states")
    if state is None:
        state = torch.zeros(batch, nheads, headdim, given["B"].shape[-1], dtype=torch.float64, device=device)
    # Triton's interpreter is slow: a few tokens there
    tokens = 12 if backend == "triton" else given["x"].shape[1]
    results = {"out": walk(state, given, shared, backend, tokens)}
    if "final_states" in case.outputs and backend != "triton":
        results["final_states"] = state
    for key, actual in results.items():
        expected = case.outputs[key][:, :tokens] if key == "out" else case.outputs[key]
        assert (actual.cpu() - expected).abs().max() <= 1e-10 * expected.abs().max(), key


@every_backend
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slots(index_dtype, backend):
    inputs = ssd_step_inputs(3, 2, 3, 4, dtype=torch.float64, device=device_of(backend))
    compare_slots(ssd_step, inputs, index_dtype, backend)


# On a GPU nothing waits for the values.
@pytest.mark.parametrize("backend", [b for b in available("ssd_step", reference=True) if device_of(b).type == "cpu"])
def test_a_slot_that_does_not_exist_is_refused(backend):
    refuse_a_missing_slot(ssd_step, ssd_step_inputs(2, 2, 3, 4), backend)


@pytest.mark.skipif("triton" not in available("ssd_step"), reason="Triton cannot run here")
def test_triton_skips_a_slot_that_does_not_exist():
    inputs = ssd_step_inputs(2, 2, 3, 4, device=device_of("triton"), optional=())
    arguments = [inputs[name] for name in ("x", "dt", "A", "B", "C")] + [None] * 3 + [True, 0.0, math.inf]
    kernels = importlib.import_module("ssmkit.kernels.ssd_step")
    skip_a_missing_slot(kernels.step, ssd_step, inputs, arguments)


@every_backend
def test_views_of_a_projection(backend):
    inputs = ssd_step_inputs(3, 4, 5, 6, ngroups=2, device=device_of(backend))
    parts = {k: inputs[k].flatten(1) for k in ("z", "x", "B", "C", "dt")}
    rows = torch.cat([*parts.values()], -1).split([part.shape[1] for part in parts.values()], -1)
    views = inputs | {k: row.unflatten(1, inputs[k].shape[1:]) for k, row in zip(parts, rows, strict=True)}
    views["state"] = inputs["state"].clone()
    assert torch.equal(ssd_step(**views, backend=backend), ssd_step(**inputs, backend=backend))
    assert torch.equal(views["state"], inputs["state"])


@every_backend
def test_one_value_for_all_heads_and_transposed_rows(backend):
    """Strides of zero and rows that are not dense, as callers of the official step have them."""
    inputs = ssd_step_inputs(2, 4, 5, 6, device=device_of(backend))
    odd = inputs | {
        "dt": inputs["dt"][:, :1].expand(2, 4),
        "x": inputs["x"].mT.contiguous().mT,
        "D": inputs["D"][:, None].expand(4, 5),
        "state": inputs["state"].clone(),
    }
    dense = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in odd.items()} | {"D": inputs["D"]}
    dense["state"] = inputs["state"].clone()
    assert torch.equal(ssd_step(**odd, backend=backend), ssd_step(**dense, backend=backend))
    assert torch.equal(odd["state"], dense["state"])


@every_backend
@pytest.mark.parametrize("shape", [(0, 6, 4, 3), (2, 0, 4, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape, backend):
    inputs = ssd_step_inputs(*shape, device=device_of(backend))
    assert ssd_step(**inputs, backend=backend).shape == shape[:3]


@every_backend
def test_no_states_leave_the_skip(backend):
    inputs = ssd_step_inputs(2, 3, 4, 0, device=device_of(backend), optional=("D",))
    torch.testing.assert_close(ssd_step(**inputs, backend=backend), inputs["D"][:, None] * inputs["x"])


@backends
def test_opcheck(backend):
    inputs = ssd_step_inputs(2, 4, 3, 5, device=device_of(backend))
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    given = [inputs[name] for name in order]
    given[6] = given[6][:, None].expand(4, 3)
    torch.library.opcheck(ssd_step_op, (*given, True, 0.0, math.inf, None, backend))


@backends
def test_compile_fullgraph(backend):
    compare_compiled(ssd_step, ssd_step_inputs(2, 4, 3, 5, device=device_of(backend)), backend)


BAD = {
    "x without heads": ({"x": torch.zeros(2, 12)}, r"x must have shape \(batch, nheads, headdim\), got \(2, 12\)"),
    "state of another batch": ({"state": torch.zeros(3, 4, 3, 5)}, r"state must have shape \(2, 4, 3, 5\)"),
    "state that cannot be updated": ({"state": torch.zeros(2, 4, 5, 3).mT}, "state must be contiguous to be updated"),
    "state too wide": ({"state": torch.zeros(2, 4, 3, 5).double()}, "state must be of dtype .* got float64"),
    "dt per channel": ({"dt": torch.zeros(2, 4, 3)}, r"dt must have shape \(2, 4\)"),
    "A per state": ({"A": torch.zeros(4, 5)}, r"A must have shape \(4,\)"),
    "B of another dtype": ({"B": torch.zeros(2, 5).half()}, "B must be of dtype float32 like x"),
    "C in other groups": ({"C": torch.zeros(2, 2, 5)}, r"C must have shape \(2, 1, 5\)"),
    "groups that do not divide": ({k: torch.zeros(2, 3, 5) for k in "BC"}, "B has 3 groups, which must divide nheads 4"),
    "D of another shape": ({"D": torch.zeros(4, 5)}, r"D must have shape \(4, 3\)"),
    "limits the wrong way round": ({"dt_limit": (1.0, 0.0)}, "dt_limit must be .* low <= high"),
    "slots of floats": ({"state_indices": torch.zeros(2)}, "state_indices must be of dtype int32, int64"),
    "too many slots": ({"state_indices": torch.zeros(3, dtype=torch.int64)}, r"state_indices must have shape \(2,\)"),
    "another device": ({"A": torch.zeros(4, device="meta")}, "A must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "simd"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    refuse(ssd_step, ssd_step_inputs(2, 4, 3, 5), change, message)


def test_a_backend_asked_for_by_name_never_falls_back():
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in ssd_step_inputs(1, 1, 1, 1).items()}
    for row in BACKENDS:
        with pytest.raises(
            NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: needs a {row.device} tensor"
        ):
            ssd_step(**elsewhere, backend=row.name)
