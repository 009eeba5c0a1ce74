"""mamba_ssm's and causal_conv1d's functions by their own names: the official numbers, and what their layouts ask for."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.interop.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from ssmkit.interop.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from ssmkit.interop.mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from ssmkit.interop.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from ssmkit.interop.mamba_ssm.ops.triton.layer_norm import layer_norm_fn
from ssmkit.interop.mamba_ssm.ops.triton.layernorm_gated import layernorm_fn, rmsnorm_fn
from ssmkit.interop.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)
from ssmkit.interop.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
)
from ssmkit.testing import CANCELLATION, assert_close, run

FUNCTIONS = {
    "selscan_*": selective_scan_fn,
    "conv1d_w*": causal_conv1d_fn,
    "ssd_[!m]*": mamba_chunk_scan_combined,
    "ssd_minimal*": ssd_minimal_discrete,
    "gated_rmsnorm_*": rmsnorm_fn,
    "rmsnorm_nogate": rmsnorm_fn,
}
CASES = {name: function for pattern, function in FUNCTIONS.items() for name in names(pattern)}
# The official arguments without a default that a case leaves out.
GIVEN = {rmsnorm_fn: {"bias": None}}
PARAMETERS = ("dA", "dD", "ddelta_bias", "ddt_bias", "dweight", "dbias")


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(case):
    """The arguments of a case that are not tensors."""
    options = {key: value for key, value in case.meta["args"].items() if value is not None}
    if "dt_limit" in options:
        low, high = options["dt_limit"]
        options["dt_limit"] = (low, math.inf if high is None else high)
    return options


@pytest.mark.parametrize("name", CASES)
def test_official_numbers(name):
    case, function = load(name), CASES[name]
    inputs = {
        key: value.requires_grad_() if value.is_floating_point() or value.is_complex() else value
        for key, value in case.inputs.items()
    }
    weights = {key: case.cotangents.get(key, torch.zeros_like(value)) for key, value in case.outputs.items()}
    actual = run(function, GIVEN.get(function, {}) | inputs, weights, **arguments(case))
    # The minimal form sums its decays plainly, a chunk at a time, and its exponents carry that rounding.
    least = 8.0 if function is ssd_minimal_discrete else 1.0
    for key, expected in case.outputs.items():
        assert_close(key, actual[key], expected, slack=least)
    for key, expected in case.gradients.items():
        gradient = "d" + key.removeprefix("in.")
        # Sums over all tokens, whose terms cancel.
        slack = max(least, CANCELLATION if gradient in PARAMETERS else 1.0)
        assert_close(gradient, actual[gradient], expected, slack=slack)


@pytest.mark.parametrize("name", names("state_update_*"))
@pytest.mark.parametrize("update", [selective_state_update, selective_state_update_ref], ids=["op", "reference"])
def test_official_steps(name, update):
    case = load(name)
    constant = {key: case.inputs[key] for key in ("A", "D", "dt_bias") if key in case.inputs}
    state = case.inputs["state"].clone()
    for step in range(case.meta["args"]["steps"]):
        token = {
            key: case.inputs[f"{key}{step}"] for key in ("x", "dt", "B", "C", "z") if f"{key}{step}" in case.inputs
        }
        out = update(state, **token, **constant, dt_softplus=case.meta["args"]["dt_softplus"])
        assert_close(f"out{step}", out, case.outputs[f"out{step}"])
        assert_close(f"state{step}", state, case.outputs[f"state{step}"])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("update", [causal_conv1d_update, causal_conv1d_update_ref], ids=["op", "reference"])
@pytest.mark.parametrize("name", names("conv1d_update_*"))
def test_official_convolution_steps(name, update, channels_last):
    case = load(name)
    args, inputs = case.meta["args"], case.inputs
    state = inputs["conv_state"].clone()
    if channels_last:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    seen = inputs.get("cache_seqlens")
    for step in range(args["steps"]):
        x = inputs[f"x{step}"]
        out = update(x, state, inputs["weight"], inputs.get("bias"), args["activation"], cache_seqlens=seen)
        assert_close(f"out{step}", out, case.outputs[f"out{step}"])
        assert_close(f"conv_state{step}", state, case.outputs[f"conv_state{step}"])
        seen = None if seen is None else seen + (x.shape[-1] if x.ndim == 3 else 1)


def test_convolution_of_packed_sequences_with_states():
    """seq_idx cuts, negative numbers are pads, an initial state reaches the first sequence, final states are written."""
    x, weight, bias = normal(2, 6, 9), normal(6, 4, seed=1), normal(6, seed=2)
    initial = normal(2, 3, 6, seed=3).transpose(1, 2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    buffer = torch.full((2, 6, 3), torch.nan)
    out, final = causal_conv1d_fn(x, weight, bias, seq_idx, initial, True, buffer, "swish")
    first = causal_conv1d_fn(x[:1, :, :3], weight, bias, initial_states=initial[:1], activation="silu")
    second = causal_conv1d_fn(x[:1, :, 3:7], weight, bias, activation="silu")
    assert torch.equal(out[:1, :, :7], torch.cat([first, second], dim=2)) and not out[0, :, 7:].any()
    whole, left = causal_conv1d_fn(x[1:], weight, bias, None, initial[1:], True, activation="silu")
    assert torch.equal(out[1:], whole) and final is buffer and torch.equal(buffer[1:], left)
    assert torch.equal(left, x[1:, :, -3:])


def test_channels_last_tensors_are_read_in_place():
    """No copy: the op sees the memory that the caller holds."""
    rows = normal(2, 7, 12).requires_grad_()
    out = causal_conv1d_fn(rows.transpose(1, 2), normal(12, 3, seed=1), activation=None)
    assert out.stride() == (7 * 12, 1, 12)
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("channels_last", [True, False])
def test_slots_of_a_convolution_state(channels_last):
    """Slots in any order, a padded row gives 0 and touches nothing."""
    x, weight = normal(3, 6), normal(6, 4, seed=1)
    pool = normal(5, 4, 6, seed=2).transpose(1, 2)
    pool = pool if channels_last else pool.contiguous()
    before = pool.clone()
    out = causal_conv1d_update(x, pool, weight, conv_state_indices=torch.tensor([4, -1, 0], dtype=torch.int32))
    for row, slot in ((0, 4), (2, 0)):
        state = before[slot : slot + 1].clone()
        expected = causal_conv1d_update(x[row : row + 1], state, weight)
        assert torch.equal(out[row : row + 1], expected) and torch.equal(pool[slot], state[0])
    assert not out[1].any() and torch.equal(pool[1:4], before[1:4])
    with pytest.raises(ValueError, match="below the number of slots"):
        causal_conv1d_update(x, pool, weight, conv_state_indices=torch.tensor([4, -1, 9]))


def test_states_left_by_packed_sequences():
    x, offsets = normal(9, 4), torch.tensor([0, 2, 2, 9])
    states = causal_conv1d_varlen_states(x, offsets, 3)
    expected = [F.pad(x[:2].T, (1, 0)), torch.zeros(4, 3), x[6:9].T]
    assert torch.equal(states, torch.stack(expected))


@pytest.mark.parametrize("tied", [True, False], ids=["Mamba-2's views", "channels of their own"])
def test_step_of_mixed_dtypes_and_slots(tied):
    """bf16 inputs beside fp32 weights are widened; the state keeps its dtype and its slot."""
    heads, dim, dstate = 4, 8, 16
    state = normal(5, heads, dim, dstate)
    x = normal(2, heads, dim, seed=1, dtype=torch.bfloat16)
    B, C = normal(2, 2, dstate, seed=2), normal(2, 2, dstate, seed=3)
    D, z = normal(heads, dim, seed=4), normal(2, heads, dim, seed=5, dtype=torch.bfloat16)
    dt, A, bias = normal(2, heads, seed=6), -normal(heads, seed=7).exp(), normal(heads, seed=8)
    views = dt[..., None].expand(-1, -1, dim), A[:, None, None].expand(-1, dim, dstate), bias[:, None].expand(-1, dim)
    views = views if tied else tuple(view.contiguous() for view in views)
    before, slots = state.clone(), torch.tensor([3, -1])
    out = selective_state_update(state, x, *views[:2], B, C, D, z, views[2], True, slots)
    step = F.softplus(dt.double() + bias.double())
    decay = (step * A.double()).exp()[0, :, None, None]
    group = torch.arange(heads) // 2
    h = decay * before[3].double() + step[0, :, None, None] * x[0].double()[..., None] * B[0, group].double()[:, None]
    expected = ((h * C[0, group].double()[:, None]).sum(-1) + D.double() * x[0].double()) * F.silu(z[0].double())
    assert out.dtype == torch.bfloat16 and not out[1].any()
    assert_close("out", out[0], expected)
    assert_close("state", state[3], h)
    assert torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def inner_inputs(complex_A, dtype=torch.float64):
    dim, rank, dstate, width = 6, 3, 4, 5
    states = dstate * (2 if complex_A else 1)
    A = -normal(dim, dstate, seed=1, dtype=dtype).exp()
    leaves = {
        "xz": normal(2, 2 * dim, 9, dtype=dtype),
        "conv1d_weight": normal(dim, 1, 3, seed=2, dtype=dtype),
        "conv1d_bias": normal(dim, seed=3, dtype=dtype),
        "x_proj_weight": normal(rank + 2 * states, dim, seed=4, dtype=dtype),
        "delta_proj_weight": normal(dim, rank, seed=5, dtype=dtype),
        "out_proj_weight": normal(width, dim, seed=6, dtype=dtype),
        "out_proj_bias": normal(width, seed=7, dtype=dtype),
        "A": torch.complex(A, normal(dim, dstate, seed=8, dtype=dtype)) if complex_A else A,
        "D": normal(dim, seed=9, dtype=dtype),
        "delta_bias": normal(dim, seed=10, dtype=dtype),
        "B_proj_bias": normal(states, seed=11, dtype=dtype),
        "C_proj_bias": normal(states, seed=12, dtype=dtype),
        "b_rms_weight": normal(states, seed=13, dtype=dtype),
        "c_rms_weight": normal(states, seed=14, dtype=dtype),
        "dt_rms_weight": normal(rank, seed=15, dtype=dtype),
    }
    return {key: value.requires_grad_() for key, value in leaves.items()}


@pytest.mark.parametrize("complex_A", [False, True], ids=["real", "complex"])
def test_inner_function_is_the_layer_written_out(complex_A):
    """mamba_inner_fn against plain torch, every gradient included; and the norm of step sizes in either place."""
    inputs = inner_inputs(complex_A)
    weights = {"out": normal(2, 9, 5, seed=20, dtype=torch.float64)}

    def written_out(xz, **p):
        x, z = xz.chunk(2, dim=1)
        x = F.silu(F.conv1d(F.pad(x, (2, 0)), p["conv1d_weight"], p["conv1d_bias"], groups=6)).transpose(1, 2)
        dt, B, C = (x @ p["x_proj_weight"].T).split((3, (x_dbl := p["B_proj_bias"]).numel(), x_dbl.numel()), dim=-1)

        def rms(v, weight):
            return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6) * weight

        dt = F.softplus(rms(dt, p["dt_rms_weight"]) @ p["delta_proj_weight"].T + p["delta_bias"])
        B = rms(B + p["B_proj_bias"], p["b_rms_weight"])
        C = rms(C + p["C_proj_bias"], p["c_rms_weight"])
        if complex_A:
            B, C = (torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) for v in (B, C))
        h, y = torch.zeros_like(p["A"]).expand(2, -1, -1), []
        for t in range(9):
            h = (dt[:, t, :, None] * p["A"]).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            y.append((h * C[:, t, None]).sum(-1))
        y = torch.stack(y, dim=1)
        y = (2 * y.real if complex_A else y) + p["D"] * x
        return (y * F.silu(z.transpose(1, 2))) @ p["out_proj_weight"].T + p["out_proj_bias"]

    expected = run(written_out, inputs, weights)
    for function in (mamba_inner_fn, mamba_inner_ref):
        actual = run(function, inputs, weights)
        for key, value in expected.items():
            assert_close(key, actual[key], value, slack=CANCELLATION)
    with torch.no_grad():
        after = {**inputs, "dt_rms_weight": torch.ones(6, dtype=torch.float64)}
        assert not torch.allclose(mamba_inner_fn(**after), mamba_inner_fn(**inputs))


def test_scan_widens_and_answers_in_the_dtype_of_u():
    u, delta = normal(2, 4, 9, dtype=torch.bfloat16), normal(2, 4, 9, seed=1).abs()
    A, B, C = -normal(4, 3, seed=2).exp(), normal(2, 3, 9, seed=3), normal(2, 1, 3, 9, seed=4)
    out, state = selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    expected, last = selective_scan_ref(
        u.double(), delta.double(), A.double(), B.double(), C.double(), return_last_state=True
    )
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close("out", out, expected)
    assert_close("state", state, last)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_conv1d_fn(normal(2, 3), normal(3, 4)), r"x must have shape \(batch, dim, seqlen\)"),
        (lambda: causal_conv1d_fn(normal(2, 3, 5), normal(3, 4), activation="relu"), "activation must be None"),
        (lambda: causal_conv1d_fn(normal(2, 3, 5), normal(3, 4), final_states_out=normal(2, 3, 3)), "final_states_out"),
        (lambda: causal_conv1d_varlen_states(normal(9, 4), torch.tensor([0, 9]), 0), "state_len must be at least 1"),
        (lambda: layer_norm_fn(normal(2, 3), normal(3), None, x1=normal(2, 3)), "x1 must be None"),
        (lambda: layer_norm_fn(normal(2, 3), normal(3), None, return_dropout_mask=True), "return_dropout_mask"),
        (lambda: layernorm_fn(normal(2, 6), normal(6), None, group_size=4), "group_size must be at least 1 and divide"),
        (
            lambda: selective_scan_fn(
                *[normal(1, 2, 3)] * 2, torch.zeros(2, 4, dtype=torch.complex64), *[normal(1, 4, 5)] * 2
            ),
            "odd length 5",
        ),
        (
            lambda: selective_state_update(normal(2, 3), *[normal(2, 3)] * 2, *[normal(3, 1)] * 3),
            "state must have shape",
        ),
        (
            lambda: selective_state_update(normal(2, 3, 4), *[normal(2, 3)] * 2, normal(3, 5), *[normal(2, 4)] * 2),
            "A must have shape",
        ),
        (lambda: ssd_minimal_discrete(*[normal(1, 2, 3, 4)] * 4, 0), "block_len must be at least 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
