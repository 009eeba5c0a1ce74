"""causal_conv1d_step: each backend against the float64 reference, the convolution it continues, the official numbers."""

import importlib

import pytest
import torch
from golden_cases import load, names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_cases import compare_narrow_state, compare_slots, compare_step, refuse_a_missing_slot

from ssmkit.ops import causal_conv1d, causal_conv1d_step
from ssmkit.ops.causal_conv1d_step import BACKENDS, causal_conv1d_step_op
from ssmkit.testing import (
    assert_close,
    available,
    causal_conv1d_inputs,
    causal_conv1d_step_inputs,
    device_of,
)

CALLS = {  # batch, dim, width and what else
    "smallest": ((1, 1, 1), {}),
    "one tap, a ring": ((2, 3, 1), {"state_len": 2}),
    "odd": ((3, 7, 3), {}),
    "enough for two threads": ((4, 4200, 4), {}),
    "longer state": ((2, 33, 4), {"state_len": 6}),
    "several tokens": ((2, 20, 4), {"seqlen": 2}),
    "more tokens than the state holds": ((2, 20, 3), {"seqlen": 9, "state_len": 5}),
    "wide filter": ((2, 18, 9), {"seqlen": 3}),
    "no bias": ((2, 18, 4), {"optional": ()}),
    "no activation": ((2, 18, 4), {"activation": None}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("causal_conv1d_step"))
every_backend = pytest.mark.parametrize("backend", available("causal_conv1d_step", reference=True))


@backends
@pytest.mark.parametrize("ring", [False, True], ids=["line", "ring"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("sizes", "options"), CALLS.values(), ids=CALLS)
def test_output_and_state(sizes, options, dtype, ring, backend):
    inputs = causal_conv1d_step_inputs(*sizes, **options, dtype=dtype, device=device_of(backend))
    seen = torch.arange(sizes[0], device=device_of(backend)) * 5 + 3 if ring and inputs["state"].shape[1] else None
    compare_step(causal_conv1d_step, inputs, backend, cache_seqlens=seen)


@backends
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_state_of_lower_precision(state_dtype, backend):
    inputs = causal_conv1d_step_inputs(2, 12, 4, device=device_of(backend))
    compare_narrow_state(causal_conv1d_step, inputs, state_dtype, backend)


@backends
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_filter_of_lower_precision(kind, backend):
    inputs = causal_conv1d_step_inputs(2, 12, 4, device=device_of(backend))
    compare_step(causal_conv1d_step, inputs | {name: inputs[name].to(kind) for name in ("weight", "bias")}, backend)


@every_backend
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_steps_equal_the_convolution(backend, data):
    batch, seqlen, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    width, ring = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**16))
    inputs = causal_conv1d_inputs(batch, seqlen, dim, width, dtype=torch.float64, requires_grad=False, seed=seed)
    expected = causal_conv1d(**inputs, return_final_state=True, backend="reference")

    state_len = width - 1 + data.draw(st.integers(1 if ring else 0, 3))
    state = torch.zeros(batch, state_len, dim, dtype=torch.float64)
    if width > 1:
        state[:, state_len - width + 1 :] = inputs["initial_state"]
    device = device_of(backend)
    x, state, weight, bias = (t.to(device) for t in (inputs["x"], state, inputs["weight"], inputs["bias"]))
    token, y = 0, []
    while token < seqlen:
        count = data.draw(st.integers(1, seqlen - token))
        seen = torch.full((batch,), token + state_len, device=device) if ring else None
        y.append(
            causal_conv1d_step(
                x[:, token : token + count], state, weight, bias, activation="silu", cache_seqlens=seen, backend=backend
            )
        )
        token += count
    torch.testing.assert_close(torch.cat(y, dim=1).cpu(), expected.y, rtol=1e-12, atol=1e-12)
    last = (torch.arange(seqlen - width + 1, seqlen) + state_len) % state_len if ring else torch.arange(1 - width, 0)
    torch.testing.assert_close(state.cpu()[:, last], expected.final_state)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("conv1d_update_*"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    device = device_of(backend)
    given = {k: v if k == "cache_seqlens" else v.to(dtype) for k, v in case.inputs.items()}
    turned = {k: v.mT.contiguous() if v.ndim == 3 else v for k, v in given.items()}
    inputs = {k: v.to(device) for k, v in turned.items()}
    state, seen = inputs["conv_state"], inputs.get("cache_seqlens")
    for step in range(case.meta["args"]["steps"]):
        y = causal_conv1d_step(
            inputs[f"x{step}"],
            state,
            inputs["weight"],
            inputs.get("bias"),
            activation=case.meta["args"]["activation"],
            cache_seqlens=seen,
            backend=backend,
        )
        seen = None if seen is None else seen + max(1, case.meta["args"]["T"])
        for key, actual in ((f"out{step}", y), (f"conv_state{step}", state)):
            expected = case.outputs[key].mT if case.outputs[key].ndim == 3 else case.outputs[key]
            if dtype == torch.float64:
                assert (actual.cpu() - expected).abs().max() <= 1e-10 * expected.abs().max(), key
            else:
                assert_close(key, actual, expected)


@every_backend
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slots(index_dtype, backend):
    inputs = causal_conv1d_step_inputs(3, 6, 4, dtype=torch.float64, device=device_of(backend))
    compare_slots(causal_conv1d_step, inputs, index_dtype, backend)


# On a GPU nothing waits for the values.
@pytest.mark.parametrize(
    "backend", [b for b in available("causal_conv1d_step", reference=True) if device_of(b).type == "cpu"]
)
def test_values_that_lead_outside_are_refused(backend):
    inputs = causal_conv1d_step_inputs(2, 6, 4)
    refuse_a_missing_slot(causal_conv1d_step, inputs, backend)
    with pytest.raises(ValueError, match="cache_seqlens must not be negative, got -1"):
        causal_conv1d_step(**inputs, cache_seqlens=torch.tensor([0, -1]), backend=backend)


@pytest.mark.skipif("triton" not in available("causal_conv1d_step"), reason="Triton cannot run here")
def test_triton_stays_within_the_state():
    """Behind the op's checks, which see no values on a GPU: nothing is written outside the slots and their rings."""
    device = device_of("triton")
    inputs = causal_conv1d_step_inputs(2, 6, 4, device=device)
    arguments = (inputs["weight"], inputs["bias"])
    step = importlib.import_module("ssmkit.kernels.causal_conv1d_step").step
    for counts, slots in (([0, 0], [0, 2]), ([-1, 0], [0, 1])):
        pool = torch.cat(
            [torch.full_like(inputs["state"], 7.0), inputs["state"], torch.full_like(inputs["state"], 7.0)]
        )
        y = step(inputs["x"], pool[2:4], *arguments, *(torch.tensor(v, device=device) for v in (counts, slots)), True)
        assert (pool[:2] == 7.0).all()
        assert (pool[4:] == 7.0).all()
        if slots[1] == 2:
            assert (y[1] == 0).all()
            assert torch.equal(pool[3], inputs["state"][1])


@every_backend
def test_views_of_a_projection(backend):
    inputs = causal_conv1d_step_inputs(3, 6, 4, seqlen=2, device=device_of(backend))
    x = torch.cat([inputs["x"], inputs["x"] + 1], dim=-1)[..., :6]
    views = inputs | {"x": x, "state": inputs["state"].clone()}
    assert torch.equal(causal_conv1d_step(**views, backend=backend), causal_conv1d_step(**inputs, backend=backend))
    assert torch.equal(views["state"], inputs["state"])


@every_backend
def test_empty(backend):
    device = device_of(backend)
    assert causal_conv1d_step(**causal_conv1d_step_inputs(0, 6, 4, device=device), backend=backend).shape == (0, 6)
    assert causal_conv1d_step(**causal_conv1d_step_inputs(2, 0, 4, device=device), backend=backend).shape == (2, 0)
    inputs = causal_conv1d_step_inputs(2, 6, 4, seqlen=0, device=device)
    before = inputs["state"].clone()
    assert causal_conv1d_step(**inputs, backend=backend).shape == (2, 0, 6)
    assert torch.equal(inputs["state"], before)


@backends
def test_opcheck(backend):
    inputs = causal_conv1d_step_inputs(2, 6, 4, device=device_of(backend))
    order = ("x", "state", "weight", "bias")
    torch.library.opcheck(causal_conv1d_step_op, (*(inputs[name] for name in order), None, None, True, backend))


@backends
def test_compile_fullgraph(backend):
    compiled = torch.compile(causal_conv1d_step, fullgraph=True, backend="aot_eager")
    inputs = causal_conv1d_step_inputs(2, 6, 4, device=device_of(backend))
    same = inputs | {"state": inputs["state"].clone()}
    torch.testing.assert_close(compiled(**inputs, backend=backend), causal_conv1d_step(**same, backend=backend))
    torch.testing.assert_close(inputs["state"], same["state"])


BAD = {
    "x of one axis": ({"x": torch.zeros(6)}, r"x must have shape \(batch, dim\) or \(batch, seqlen, dim\), got \(6,\)"),
    "state of another batch": ({"state": torch.zeros(3, 3, 6)}, r"state must have shape \(2, 3, 6\)"),
    "state too short": ({"state": torch.zeros(2, 2, 6)}, "state must hold at least width - 1 = 3 inputs, got 2"),
    "state that cannot be updated": ({"state": torch.zeros(2, 6, 3).mT}, "state must be contiguous to be updated in place"),
    "state too wide": ({"state": torch.zeros(2, 3, 6).double()}, "state must be of dtype .* got float64"),
    "weight of other channels": ({"weight": torch.zeros(5, 4)}, r"weight must have shape \(6, 4\)"),
    "weight of a Conv1d": ({"weight": torch.zeros(6, 1, 4)}, r"weight.squeeze\(1\)"),
    "activation": ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
    "a ring without entries": (
        {"weight": torch.zeros(6, 1), "state": torch.zeros(2, 0, 6), "cache_seqlens": torch.tensor([0, 0])},
        "state must have an entry to be a ring",
    ),
    "counts of floats": ({"cache_seqlens": torch.zeros(2)}, "cache_seqlens must be of dtype int32, int64"),
    "slots of another batch": ({"state_indices": torch.tensor([0])}, r"state_indices must have shape \(2,\)"),
    "another device": ({"bias": torch.zeros(6, device="meta")}, "bias must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "simd"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    inputs = causal_conv1d_step_inputs(2, 6, 4)
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(**(inputs | change))
    assert torch.equal(inputs["state"], before)


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("causal_conv1d_step"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        causal_conv1d_step(**causal_conv1d_step_inputs(2, 6, 4), backend=name)
