"""ssd: the two references against each other, every backend against the official numbers."""

import math

import pytest
import torch
from golden_cases import load, names
from ssd_cases import check

from ssmkit.ops import ssd
from ssmkit.ops._ssd_reference import ssd_quadratic, ssd_ref
from ssmkit.testing import available, device_of, run, ssd_inputs

every_backend = pytest.mark.parametrize("backend", available("ssd", reference=True))


# The two references


REFERENCES = {
    "plain": {},
    "reverse": {"reverse": True},
    "bidirectional": {"bidirectional": True},
    "resets": {"resets": torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.3},
    "pads": {"mask": torch.rand(2, 19, generator=torch.Generator().manual_seed(1)) < 0.7},
    "one token": {"tokens": 1},
    "limits": {"dt_min": 0.1, "dt_max": 0.3},
    "strong decay": {"rate": 1e5},
}


@pytest.mark.parametrize("options", REFERENCES.values(), ids=REFERENCES)
def test_the_quadratic_form_is_the_recurrence(options):
    seqlen, rate = options.get("tokens", 19), options.get("rate", 1.0)
    walks = 2 if options.get("bidirectional") else 1
    inputs = ssd_inputs(2, seqlen, 4, 3, 5, ngroups=2, walks=walks, dtype=torch.float64)
    inputs["A"] = (inputs["A"].detach() * rate).requires_grad_()
    leaves = [inputs[name] for name in ("x", "dt", "A", "B", "C", "z", "dt_bias", "initial_state")]
    x, dt, A, B, C, z, bias, initial = leaves
    D = inputs["D"].detach()[:, None].expand(4, 3)
    args = (
        x, dt, A, B, C, D, z, bias, initial, options.get("resets"), options.get("mask"), None, True,
        options.get("dt_min", 0.0), options.get("dt_max", math.inf), options.get("reverse", False), walks == 2,
    )  # fmt: skip
    outputs = [form(*args) for form in (ssd_ref, ssd_quadratic)]
    grads = [torch.autograd.grad(y.square().sum() + h.sin().sum(), leaves) for y, h in outputs]
    for recurrent, quadratic in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(quadratic, recurrent, rtol=1e-11, atol=1e-12 * recurrent.abs().max().item())


# The official implementation


OURS = {"initial_states": "initial_state", "out": "y", "final_states": "final_state"}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [name for name in names("ssd_*") if "minimal" not in name])
def test_official_numbers(name, dtype, backend):
    case, device = load(name), device_of(backend)
    inputs = {OURS.get(k, k): v.to(device) for k, v in case.inputs.items()}
    sequence = inputs.pop("seq_idx", None)
    inputs = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    low, high = case.meta["args"]["dt_limit"]
    options = {"dt_softplus": case.meta["args"]["dt_softplus"], "dt_limit": (low, math.inf if high is None else high)}
    if sequence is not None:
        options["resets"] = sequence != torch.cat([sequence[:, :1], sequence[:, :-1]], dim=1)
    with_state = "final_states" in case.outputs
    weights = {OURS[k]: v for k, v in case.cotangents.items()}
    if with_state:
        weights.setdefault("final_state", torch.zeros_like(case.outputs["final_states"]))
    expected = {OURS[k]: v for k, v in case.outputs.items()}
    for key, value in case.gradients.items():
        name = key.removeprefix("in.")
        expected[f"d{OURS.get(name, name)}"] = value

    options |= {"return_final_state": with_state, "chunk": case.meta["args"]["chunk_size"]}
    actual = run(ssd, inputs, weights, backend=backend, **options)
    assert actual.keys() == expected.keys()
    for key in actual:
        if dtype == torch.float64:
            worst = (actual[key].cpu() - expected[key]).abs().max() / expected[key].abs().max()
            assert worst <= 1e-10, f"{key}: {worst:.3g}"
        else:
            check(key, actual[key], expected[key], dtype, backend)


@every_backend
@pytest.mark.parametrize("name", names("ssd_minimal*"))
def test_official_minimal_form(name, backend):
    case, device = load(name), device_of(backend)
    X, log_decay, B, C = (case.inputs[k].to(device).double().requires_grad_() for k in ("X", "A", "B", "C"))
    initial = case.inputs.get("initial_states")
    inputs = {"X": X, "A": log_decay, "B": B, "C": C}
    if initial is not None:
        inputs["initial_states"] = initial.to(device).double().requires_grad_()

    def minimal(X, A, B, C, initial_states=None):
        """Its X is our dt x, its A our dt A."""
        one = torch.full(A.shape[2:], -1.0, dtype=A.dtype, device=A.device)
        state = None if initial_states is None else initial_states[:, 0]
        out = ssd(X / -A[..., None], -A, one, B, C, initial_state=state, return_final_state=True, backend=backend)
        return tuple(out)

    weights = {"Y": case.cotangents["Y"], "final_state": case.cotangents["final_state"]}
    actual = run(minimal, inputs, weights)
    expected = case.outputs | {f"d{k.removeprefix('in.')}": v for k, v in case.gradients.items()}
    assert actual.keys() == expected.keys()
    for key in actual:
        worst = (actual[key].cpu() - expected[key]).abs().max() / expected[key].abs().max()
        assert worst <= 1e-10, f"{key}: {worst:.3g}"
